"""Models, adapters and data that a pass cannot use: refused with a message, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import (
    CheckpointError,
    DataError,
    MissingTensorError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from mergekit_bayes.estimate.run import estimate_precision, target_of
from mergekit_bayes.model.trained import open_trained
from mergekit_bayes.recipe import PrecisionRecipe, load_recipe
from tests.estimate.runs import TABLES, recipe, run

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """The message of a refusal, after which nothing is there."""

    def check(content: dict[str, Any], error: type[Exception], **options: Any) -> str:
        with pytest.raises(error) as caught:
            run(content, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return check


def test_a_sidecar_that_is_there_is_refused_before_anything_is_read(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "precision.safetensors").write_bytes(b"mine")
    content = recipe(llama, data={"train": "nowhere.jsonl"})
    with pytest.raises(OutputError, match=r"holds precision\.safetensors; replace the sidecar with `--overwrite`"):
        run(content, tmp_path)
    assert (tmp_path / "precision.safetensors").read_bytes() == b"mine"


def test_what_is_of_the_hub_needs_another_folder(llama: Path, tmp_path: Path) -> None:
    trained = replace(open_trained(str(llama), None), local=False)
    loaded = load_recipe(recipe(llama), expect=PrecisionRecipe)
    with pytest.raises(RecipeError, match=r"output\.path: missing; the model is of the hub: name a folder there"):
        target_of(loaded, trained, None)
    assert target_of(loaded, trained, tmp_path) == tmp_path


def test_an_adapter_is_no_model(llama: Path, adapter: Path, refused: Refused) -> None:
    message = refused(recipe(adapter), ModelError)
    assert "is or has a PEFT adapter; expected the base as `model` and the adapter as `adapter`" in message


def test_a_model_is_no_adapter(llama: Path, refused: Refused) -> None:
    assert "is no PEFT adapter; expected a folder with adapter_config.json" in refused(recipe(llama, llama), ModelError)


def test_an_adapter_of_another_base(llama: Path, gpt2: Path, adapter: Path, refused: Refused) -> None:
    message = refused(recipe(gpt2, adapter), ModelError)
    assert message.startswith(f"adapter {adapter}: PEFT cannot load it")


def test_an_adapter_that_records_another_base(llama: Path, adapter: Path, tmp_path: Path, refused: Refused) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    told = json.dumps({"base_fingerprint": "blake2b-16:" + "0" * 32})
    save_file(
        load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.safetensors", {"mergekit_bayes": told}
    )
    message = refused(recipe(llama, copy), CheckpointError)
    assert f"belongs to a base with fingerprint blake2b-16:{'0' * 32}; expected blake2b-16:" in message


def test_data_of_another_tokenizer(llama: Path, tmp_path: Path, refused: Refused) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "wider"))
    words = json.loads((copy / "tokenizer.json").read_text())
    words["model"]["vocab"]["strange"] = 48
    (copy / "tokenizer.json").write_text(json.dumps(words))
    content = recipe(copy, data={"train": "rows"})
    with pytest.raises(DataError, match="the data holds token 48, the embedding has 48 rows; expected the tokenizer"):
        estimate_precision(content, tmp_path / "out", tables={"rows": [{"text": "w1 strange w2"}]})


def test_rows_longer_than_the_model_has_places_for(gpt2: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(["w1"] * 40)}]
    with pytest.raises(DataError, match=r"data\.max_length: the longest row has 41 tokens, .* has places for 32"):
        estimate_precision(recipe(gpt2, data={"train": "rows"}), tmp_path / "out", tables={"rows": rows})


def test_rows_without_labels(bert: Path, tmp_path: Path, refused: Refused) -> None:
    content = recipe(bert, task="sequence_classification", estimator="empirical_fisher", data={"train": "texts"})
    assert "label" in refused(content, DataError)


def test_labels_that_the_model_does_not_know(bert: Path, tmp_path: Path) -> None:
    content = recipe(bert, task="sequence_classification", data={"train": "rows"})
    rows = [{"text": "w1 w2", "label": "mineral"}]
    with pytest.raises(DataError, match="mineral"):
        estimate_precision(content, tmp_path / "out", tables={"rows": rows})


def test_a_language_model_has_no_head_to_classify_with(llama: Path, refused: Refused) -> None:
    message = refused(recipe(llama, task="sequence_classification"), MissingTensorError)
    assert "holds no score, which the task needs and which would start at random" in message


def test_no_linear_layer_that_is_small_enough(llama: Path, adapter: Path, refused: Refused) -> None:
    content = recipe(llama, adapter, estimator={"name": "gram", "max_dimension": 3})
    assert "has no linear layer to describe" in refused(content, ModelError)


def spoiled(adapter: Path, folder: Path) -> Path:
    """An adapter whose factors overflow, for one word alone, so that only rows with it do."""
    copy = Path(shutil.copytree(adapter, folder))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({n: t * 1e30 for n, t in tensors.items()}, copy / "adapter_model.safetensors", {"format": "pt"})
    return copy


def test_rows_that_are_not_finite_are_named_and_too_many_refused(
    llama: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    message = refused(recipe(llama, spoiled(adapter, tmp_path / "huge")), NonFiniteError)
    assert message.startswith("row ")
    assert " of texts, row " in message
    assert "gradients, inputs or logits are not finite;" in message
    assert "at most 0.01 of them may be (`max_skipped`)" in message


def test_a_few_rows_that_are_not_finite_are_skipped(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "poisoned"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"][45] = 3e38  # the word w45, which one row has
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    rows = [*TABLES["texts"][:11], {"text": "w1 w45 w2"}]
    content = recipe(copy, data={"train": "rows"}, max_skipped=0.1)
    result = estimate_precision(content, tmp_path / "out", tables={"rows": rows})
    assert result.report["rows"] == {"in_data": 12, "seen": 11, "skipped": ["row 12 of rows"]}
    assert "skipped row 12 of rows: gradients, inputs or logits are not finite" in result.report["notes"]
    sound = estimate_precision(
        recipe(copy, data={"train": "rows"}, training_units=result.report["units"]["num_examples"], num_examples=11),
        tmp_path / "sound",
        tables={"rows": rows[:11]},
    )
    one, other = (load_file(each.folder / "precision.safetensors") for each in (result, sound))
    for name, precision in one.items():
        torch.testing.assert_close(precision, other[name], rtol=1e-4, atol=1e-6)


def test_the_command_tells_it_in_a_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_bayes.cli.main import main

    (tmp_path / "r.yaml").write_text(
        f"kind: precision\nmodel: {llama}\nestimator: fisher\ndata: {{train: {tmp_path}/none.jsonl}}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "r.yaml"), str(tmp_path / "out")])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "none.jsonl" in printed.err
    assert "Traceback" not in printed.err
