"""Everything in an output folder that is not a shard: index, configuration, tokenizer, recipe, report, card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.disk import disk_errors, write_all
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.checkpoint.writer import ShardLayout, ShardWriter, index_json, index_name
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.card import model_card
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.provenance import REPORT_NAME, report
from mergekit_bayes.recipe import dump_yaml

RECIPE_NAME = "merge_recipe.yaml"

COPIED_FILES = (
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "*processor_config.json",
    "sentencepiece*",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "vocab*",
    "*.py",
)
"""What travels from the donor to a full checkpoint beside the weights: tokenizer, generation settings, model code."""


def finish_folder(
    plan: MergePlan,
    staging: Path,
    records: Mapping[str, Any],
    options: Mapping[str, object],
    divisors: Mapping[str, float],
) -> None:
    """Add what makes a folder of shards a model, and read the result back.

    Args:
        plan: the plan that was carried out.
        staging: the folder with all shards.
        records: what was measured, by step name.
        options: the options that can change bytes.
        divisors: what the curvatures of sources were divided by.

    Raises:
        OutputError: the disk failed.
        CheckpointError: the result cannot be read back, which would be a fault of this library.
    """
    dense = plan.space == "full"
    stem = "model" if dense else "adapter_model"
    _write_index(staging, stem, [unit.layout for unit in plan.units])
    _write(staging / ("config.json" if dense else "adapter_config.json"), _json(plan.configuration))
    if dense:
        _copy_files(plan, staging)
    _write_initial(plan, staging)
    mean = (open_checkpoint(staging) if dense else open_adapter(staging)).tensors
    _finish_sidecar(plan, staging, fingerprint(mean))
    _write(staging / RECIPE_NAME, dump_yaml(plan.recipe.resolved()))
    text = report(plan, records, options, divisors)
    _write(staging / REPORT_NAME, text)
    _write(staging / "README.md", model_card(plan, json.loads(text)))


def _write_initial(plan: MergePlan, staging: Path) -> None:
    """Copy what new modules started from; the result can then be merged like what it was made of."""
    if plan.initial is None:
        return
    from mergekit_bayes.merge.checks import check_block  # here only: plans import this module without torch

    path = staging / plan.initial.layout.filename
    with BlockReader() as reader, ShardWriter(path, plan.initial.layout) as writer:
        for name, tensor in plan.initial.tensors.items():
            values = reader.read_block(tensor, 0, tensor.numel)
            check_block(values, name, str(tensor.path))
            writer.write(name, 0, values)


def _finish_sidecar(plan: MergePlan, staging: Path, mean_fingerprint: str) -> None:
    """Write the fingerprint of the finished weights into the sidecar's headers, where room was left for it."""
    layouts = [unit.precision_layout for unit in plan.units if unit.precision_layout is not None]
    if plan.sidecar is None or not layouts:
        return
    metadata = replace(plan.sidecar, mean_fingerprint=mean_fingerprint).to_metadata()
    for layout in layouts:
        final = replace(layout, metadata=metadata)
        if len(final.header) != len(layout.header):
            raise CheckpointError(
                f"{layout.filename}: the header changed its length; this is a fault of mergekit_bayes"
            )
        path = staging / layout.filename
        with disk_errors(path, "write"):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                write_all(descriptor, memoryview(final.header), 0)
            finally:
                os.close(descriptor)
    _write_index(staging, "precision", layouts, sharded=len(plan.units) > 1)
    open_sidecar(staging)


def _write_index(staging: Path, stem: str, layouts: Sequence[ShardLayout], *, sharded: bool | None = None) -> None:
    if sharded if sharded is not None else len(layouts) > 1:
        _write(staging / index_name(stem), index_json(layouts).decode())


def _copy_files(plan: MergePlan, staging: Path) -> None:
    checkpoint = plan.donor.checkpoint
    assert checkpoint is not None  # a dense plan has a dense donor
    found = {path for pattern in COPIED_FILES for path in checkpoint.folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        with disk_errors(staging / path.name, "copy"):
            shutil.copyfile(path, staging / path.name)


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    with disk_errors(path, "write"):
        path.write_text(text, encoding="utf-8")
