"""Sidecars with factors that no merge can use, tasks that no method knows, and memory that is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from tests.bad_input.conftest import Refused
from tests.bad_input.site import MODULES, SHAPES, Site
from tests.merge.builders import random_precisions, random_tensors, write_precisions

LAYER = "model.layers.0.q_proj.weight"


def factors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A sound pair of factors for one layer, and diagonals for the rest."""
    root = random_tensors(5, {"root": (1, 4, 6)})["root"]
    found = {f"{LAYER}.input_factor": root @ root.mT, f"{LAYER}.output_factor": torch.eye(4)[None]}
    rest = random_precisions(1, {name: shape for name, shape in SHAPES.items() if name != LAYER}, above=1.0)
    return {**rest, **found, **{f"{LAYER}.{part}": value for part, value in changes.items()}}


def factored(site: Site, method: str = "kronecker", **changes: torch.Tensor) -> None:
    """Give `one` a sidecar with factors, and the recipe a method that can use them."""
    facts = {"family": "kronecker", "prior_precision": 0.5, "num_examples": 100}
    write_precisions(site.root / "one", factors(**changes), base=site.root / "base", **facts)
    site.recipe["merge_method"] = method


def broken(part: str, value: torch.Tensor) -> Callable[[Site], object]:
    """Factors of which one is no factor, as something else may have written them."""

    def change(site: Site) -> None:
        from safetensors.torch import load_file, save_file

        from mergekit_bayes.checkpoint.header import read_header

        factored(site)
        file = site.root / "one" / "precision.safetensors"
        metadata = dict(read_header(file).metadata)
        save_file({**load_file(file), f"{LAYER}.{part}": value}, file, metadata=metadata)

    return change


def of_updates(site: Site) -> None:
    site.use_adapters(space="factor", merge_method="posterior")
    shapes = {f"{module}.weight": (4, 4) for module in MODULES}
    write_precisions(site.root / "lora1", random_precisions(3, shapes), space="product", prior_precision=0.1)


def name_tasks(site: Site, *weights: float) -> None:
    for model, weight in zip(site.recipe["models"], weights, strict=True):
        model.update(task="code", parameters={"weight": weight})


CASES: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "a method for diagonals": (
        lambda site: factored(site, "gradient_matching"),
        (
            "one/precision.safetensors: holds precisions of the family kronecker, which gradient_matching cannot use",
            "methods that can: gram, kronecker",
            "`precision: false`",
        ),
    ),
    "factors of the base": (
        lambda site: (
            factored(site),
            write_precisions(site.root / "base", factors(), family="kronecker", prior_precision=0.5),
        ),
        ("{root}/base/precision.safetensors: has Kronecker factors, which no prior can have", "precision.prior"),
    ),
    "a factor with NaN": (
        broken("input_factor", torch.full((1, 4, 4), float("nan"))),
        (f"{LAYER}.input_factor", "not finite"),
    ),
    "a factor that is not symmetric": (
        broken("output_factor", torch.arange(16.0).reshape(1, 4, 4)),
        (f"{LAYER}.output_factor", "expected a symmetric factor"),
    ),
    "a negative curvature": (
        broken("output_factor", -torch.eye(4)[None]),
        (f"{LAYER}.output_factor", "expected a positive semidefinite curvature"),
    ),
    "a factor of another size": (
        broken("output_factor", torch.eye(5)[None]),
        (f"{LAYER}: input_factor has shape (1, 4, 4), output_factor has shape (1, 5, 5)",),
    ),
    "updates in factor space": (of_updates, ("lora1/precision.safetensors: describes the updates dW of an adapter",)),
    "whole updates in factor space": (
        lambda site: site.use_adapters(space="factor", merge_method="ties"),
        ("space", "factor merges A with A and B with B, but ties has to see all of dW", "expected product or full"),
    ),
    "tasks for another method": (
        lambda site: name_tasks(site, 0.5, 0.5),
        ("models[0].task: gradient_matching does not merge several models of one task", "mixture"),
    ),
    "a task with two weights": (
        lambda site: (name_tasks(site, 0.5, 0.25), site.recipe.update(merge_method="mixture")),
        ("models[1].parameters.weight", "0.25 for lm_head.weight, 0.5 in another source of task code"),
    ),
    "a removal too large": (
        lambda site: (factored(site), site.recipe["models"][0]["parameters"].update(weight=-5)),
        ("lm_head.weight: 100.0% of 24 merged precisions are zero or negative",),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), CASES.values(), ids=CASES)
def test_what_no_merge_can_use_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    change(site)
    refused(*fragments)
