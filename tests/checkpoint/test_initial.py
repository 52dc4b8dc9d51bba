"""Starting values beside trained weights, and what headers tell about training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.initial import FRESH_NAME, open_initial
from mergekit_bayes.checkpoint.provenance import Provenance, read_provenance
from mergekit_bayes.errors import CheckpointError, PlanError

TOLD = {
    "architecture": "BertForSequenceClassification",
    "base_fingerprint": "blake2b-16:00",
    "labels": ["a", "b"],
    "pad_token_id": 0,
}


def test_a_folder_without_new_modules_has_none(tmp_path: Path) -> None:
    assert open_initial(tmp_path) is None


def test_what_is_there_is_known_by_its_header(tmp_path: Path) -> None:
    tensors = {"score.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}
    save_file(tensors, tmp_path / FRESH_NAME, metadata={"format": "pt", "mergekit_bayes": json.dumps(TOLD)})
    found = open_initial(tmp_path)
    assert found is not None
    assert list(found.tensors) == ["a.bias", "score.weight"]
    assert found.tensors["score.weight"].shape == (2, 3)
    assert found.path == tmp_path / FRESH_NAME
    assert found.provenance.base_fingerprint == "blake2b-16:00"


def test_integers_are_no_starting_values(tmp_path: Path) -> None:
    file = tmp_path / FRESH_NAME
    save_file({"a": torch.zeros(2, dtype=torch.int32)}, file)
    with pytest.raises(CheckpointError, match=r"tensor a: its dtype is I32; expected a float type"):
        open_initial(tmp_path)
    save_file({"a": torch.zeros(2, dtype=torch.int32), "b": torch.zeros(2, dtype=torch.bool)}, file)
    with pytest.raises(PlanError) as caught:
        open_initial(tmp_path)
    assert len(caught.value.problems) == 2


def test_a_header_is_read_and_written_again() -> None:
    told = read_provenance({"format": "pt", "mergekit_bayes": json.dumps({**TOLD, "base_model": "org/base"})})
    assert told == Provenance(
        architecture="BertForSequenceClassification",
        base_fingerprint="blake2b-16:00",
        labels=("a", "b"),
        pad_token_id=0,
    )
    assert read_provenance({"mergekit_bayes": json.dumps(told.facts())}) == told
    assert Provenance().facts() == {}


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[1]", "null", "[" * 100_000, json.dumps({"labels": [], "pad_token_id": True})]
    + [json.dumps({key: value}) for key in TOLD for value in (None, 1.5, {"a": 1}, [2])],
)
def test_what_is_told_in_another_form_is_not_told(text: str) -> None:
    assert read_provenance({"mergekit_bayes": text}) == Provenance()
