"""Merging: recipe -> plan -> one streaming loop -> checkpoint or adapter, sidecar, report.

    registry.py, parameter.py   what a merge method declares; methods/ holds one file per method
    schemas.py                  the methods as recipes see them
    inputs.py, setting.py       base and sources opened by their headers; weights, priors and dtypes decided
    sidecars.py, posteriors.py  which sidecars are of use; what they tell of one source's weights
    task.py, fresh.py, heads.py what the sources are for; heads the base has not: their start, a base seen with them
    attach.py, dense_inputs.py  an adapter on its base; inputs seen as full checkpoints
    dense.py, adapters.py       steps of a merge into a full checkpoint, into an adapter
    steps.py, plan.py           the plan: frozen data; plan_text.py prints it, memory.py sizes it
    tensor_steps.py, curvature.py   tensors that a merge sees whole; their Kronecker terms on disk
    blocks.py, lora.py          the arithmetic of a block, of LoRA updates; checks.py refuses bad numbers
    operands.py, normalise.py   from byte ranges to tensors; curvatures of sources brought to one size
    modules.py, tensors.py      one adapted layer; one dense tensor, whole; apply.py calls the method on either
    merged_terms.py, sink.py    their precision as a sidecar has it; where they are written
    consensus.py, spectral.py   signs and singular values of task vectors, for the methods without precisions
    low_rank.py, projected.py, truncation.py    an update in few directions
    execute.py, processes.py    the loop over blocks; several processes
    run.py, finish.py           from a plan to a published folder
    configuration.py, provenance.py, card.py    what the folder says about itself
    diagnosis.py, heat_map.py   a report read back: what the merge is predicted to cost, and where
    load.py, in_place.py        posteriors in memory, for Python; a merge in the weights of a model in memory

The package can be called: `from mergekit_bayes import merge; merge("recipe.yaml", "merged/")` runs `run.merge`. The
function and the package want the same name, and whichever is imported last would hide the other; as a callable package
both are there in every order of imports.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mergekit_bayes.merge.run import merge

        return merge(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
