"""Precisions that are not there, are no precisions, or belong to something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.header import read_header
from tests.bad_input.conftest import Refused
from tests.bad_input.site import SHAPES, Site
from tests.merge.builders import random_precisions, write_checkpoint, write_precisions

KEY = "mergekit_bayes"
FILE = "one/precision.safetensors"
HEAD = "lm_head.weight"


def sidecar(site: Site) -> Path:
    return site.root / FILE


def edit_metadata(site: Site, **changes: Any) -> None:
    """Change the metadata of the sidecar of `one`; None removes a key."""
    content = {**json.loads(read_header(sidecar(site)).metadata[KEY]), **changes}
    kept = {key: value for key, value in content.items() if value is not ...}
    save_file(load_file(sidecar(site)), sidecar(site), metadata={KEY: json.dumps(kept)})


def edit_values(site: Site, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    metadata = dict(read_header(sidecar(site)).metadata)
    tensors = load_file(sidecar(site))
    change(tensors)
    save_file(tensors, sidecar(site), metadata=metadata)


def put(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[HEAD].view(-1)[5].fill_(value)


def train_further(site: Site) -> None:
    tensors = site.tensors("one")
    tensors[HEAD] += 0.01
    write_checkpoint(site.root / "one", tensors)


def another_base(site: Site) -> None:
    tensors = site.tensors("base")
    tensors[HEAD] += 0.01
    write_checkpoint(site.root / "base", tensors)


def of_another_model(site: Site) -> None:
    site.recipe["models"][0]["precision"] = str(site.root / "two" / "precision.safetensors")


def no_sidecar(site: Site) -> None:
    sidecar(site).unlink()


CASES: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "none": (no_sidecar, ("{root}/one: no precision (no sidecar);", "add `precision:` to this source")),
    "ignored": (
        lambda site: site.recipe["models"][0].update(precision=False),
        ("{root}/one: no precision (no sidecar); gradient_matching needs one",),
    ),
    "named but nowhere": (
        lambda site: site.recipe["models"][0].update(precision=str(site.root / "nowhere.safetensors")),
        ("{root}/nowhere.safetensors",),
    ),
    "no metadata": (
        lambda site: save_file(load_file(sidecar(site)), sidecar(site)),
        (f"{{root}}/{FILE}: says nothing about its numbers",),
    ),
    "metadata that is no JSON": (
        lambda site: save_file(load_file(sidecar(site)), sidecar(site), metadata={KEY: "{"}),
        (f"{{root}}/{FILE}", "JSON"),
    ),
    "another format": (lambda site: edit_metadata(site, format="x"), (f"{{root}}/{FILE}: its format is 'x'",)),
    "a later version": (lambda site: edit_metadata(site, version=2), ("its version is 2; expected 1",)),
    "an unknown key": (
        lambda site: edit_metadata(site, num_example=3),
        ("num_example is unknown; did you mean num_examples?",),
    ),
    "a missing key": (lambda site: edit_metadata(site, family=...), ("family is missing",)),
    "a family of later": (
        lambda site: edit_metadata(site, family="mixture"),
        ("family is 'mixture', expected diagonal or kronecker",),
    ),
    "of an adapter's updates": (
        lambda site: edit_metadata(site, space="product"),
        (f"{{root}}/{FILE}: describes the updates of an adapter (space product); expected the adapter",),
    ),
    "factors of an adapter's factors": (
        lambda site: edit_metadata(site, family="kronecker", space="factor"),
        ("space is factor, expected product or full for the family kronecker",),
    ),
    "factors that do not fit": (
        lambda site: (
            edit_metadata(site, family="kronecker"),
            edit_values(site, lambda t: t.update({f"{HEAD}.input_factor": torch.eye(5)[None]})),
        ),
        ("lm_head.weight: input_factor has shape (1, 5, 5); expected the sides of a weight (6, 4)",),
    ),
    "factors of a layer that is not there": (
        lambda site: (
            edit_metadata(site, family="kronecker"),
            edit_values(site, lambda t: t.update({"extra.weight.input_factor": torch.eye(5)[None]})),
        ),
        ("holds precisions for extra.weight; expected only tensors of the checkpoint",),
    ),
    "half of the factors": (
        lambda site: (
            edit_metadata(site, family="kronecker"),
            edit_values(site, lambda t: t.update({f"{HEAD}.output_factor": torch.eye(6)[None]})),
        ),
        (f"{{root}}/{FILE}: lm_head.weight: has output_factor but no input_factor",),
    ),
    "no number": (
        lambda site: edit_metadata(site, prior_precision="much"),
        ("prior_precision is 'much', expected a finite number",),
    ),
    "another scale": (lambda site: edit_metadata(site, scale="mean"), ("scale is 'mean', expected sum",)),
    "weights trained further": (
        train_further,
        (
            f"{{root}}/{FILE}: describes weights with fingerprint blake2b-16:",
            "; expected blake2b-16:",
            "trained further",
        ),
    ),
    "another base": (
        another_base,
        (f"{{root}}/{FILE}: belongs to a base with fingerprint blake2b-16:", "(base); expected blake2b-16:"),
    ),
    "of another model": (of_another_model, ("{root}/two/precision.safetensors: describes weights with fingerprint",)),
    "shape": (
        lambda site: edit_values(site, lambda t: t.update({HEAD: torch.ones(4, 6)})),
        ("precision of lm_head.weight has shape (4, 6); expected (6, 4)",),
    ),
    "extra tensor": (
        lambda site: edit_values(site, lambda t: t.update(extra=torch.ones(2))),
        ("holds precisions for extra; expected only tensors of the checkpoint",),
    ),
    "dtype": (
        lambda site: edit_values(site, lambda t: t.update({HEAD: torch.ones(6, 4, dtype=torch.float16)})),
        ("tensor lm_head.weight: its dtype is F16; expected one of",),
    ),
    "NaN": (
        lambda site: edit_values(site, put(float("nan"))),
        (f"lm_head.weight: 1 of 24 values in {{root}}/{FILE} are NaN or infinite",),
    ),
    "infinite": (
        lambda site: edit_values(site, put(float("inf"))),
        (f"lm_head.weight: 1 of 24 values in {{root}}/{FILE} are NaN or infinite",),
    ),
    "zero": (
        lambda site: edit_values(site, put(0.0)),
        (f"lm_head.weight: 1 of 24 precisions in {{root}}/{FILE} are zero or negative (lowest 0)",),
    ),
    "negative": (
        lambda site: edit_values(site, put(-1.0)),
        (f"lm_head.weight: 1 of 24 precisions in {{root}}/{FILE} are zero or negative (lowest -1)",),
    ),
    "a prior that differs": (
        lambda site: edit_metadata(site, prior_precision=0.25),
        ("precision.prior", "{root}/one: 0.25, {root}/two: 0.5; expected a number, or a sidecar of the base"),
    ),
    "no prior": (
        lambda site: site.recipe.update(
            models=[{**model, "precision": 2.0} for model in site.recipe["models"]],
        ),
        ("precision.prior", "gradient_matching needs the prior precision S_0", "none recorded"),
    ),
    "a removal too large": (
        lambda site: site.recipe["models"][0]["parameters"].update(weight=-5),
        ("merged precisions are zero or negative", "{root}/one: -5, {root}/two: 0.5", "set precision.floor"),
    ),
    "no count for the mean": (
        lambda site: (edit_metadata(site, num_examples=None), site.recipe.update(scale="mean")),
        (f"{{root}}/{FILE}: num_examples is not recorded",),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), CASES.values(), ids=CASES)
def test_a_precision_that_does_not_belong_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    change(site)
    refused(*fragments)


def test_a_sidecar_of_the_base_for_another_base_is_refused(site: Site, refused: Refused) -> None:
    write_precisions(site.root / "two", random_precisions(5, SHAPES), to=site.root / "base" / "precision.safetensors")
    refused("{root}/base/precision.safetensors: describes weights with fingerprint")


def test_shards_of_a_sidecar_without_their_index_are_refused(site: Site, refused: Refused) -> None:
    sidecar(site).rename(site.root / "one" / "precision-00001-of-00002.safetensors")
    refused("{root}/one: holds precision-00001-of-00002.safetensors")
