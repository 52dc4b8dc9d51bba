"""An evaluation that was cut short, or asked for more, computes nothing twice and finds the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import NonFiniteError, OutputError
from mergekit_bayes.evaluate import open_model
from mergekit_bayes.evaluate.measure import measure_block
from tests.evaluate.runs import recipe, run


class Blocks:
    """Counts the blocks that are computed, and fails before number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.computed = 0

        def measured(*arguments: Any, **options: Any) -> Any:
            if self.computed == self.at:
                raise self.error
            self.computed += 1
            return measure_block(*arguments, **options)

        monkeypatch.setattr(open_model, "measure_block", measured)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    return Blocks(monkeypatch)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_goes_on_where_it_was(llama: Path, tuned: Path, tmp_path: Path, blocks: Blocks) -> None:
    asked = recipe([llama, {"model": str(tuned), "samples": {"count": 2}}])
    whole = run(asked, tmp_path / "whole").folder
    assert whole is not None
    needed, blocks.computed = blocks.computed, 0
    for moment in (0, 4, 8, needed - 1):
        blocks.at = moment
        with pytest.raises(KeyboardInterrupt):
            run(asked, tmp_path / "cut")
        assert not (tmp_path / "cut").exists()
    blocks.at = None
    run(asked, tmp_path / "cut")
    assert blocks.computed == needed, "no block was computed twice"
    assert content(tmp_path / "cut") == content(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_another_model_costs_no_more_than_itself(llama: Path, tuned: Path, tmp_path: Path, blocks: Blocks) -> None:
    run(recipe([llama]), tmp_path / "out")
    first = blocks.computed
    with pytest.raises(OutputError, match="not empty"):
        run(recipe([llama, tuned]), tmp_path / "out")
    run(recipe([llama, tuned]), tmp_path / "out", overwrite=True)
    assert blocks.computed == 2 * first
    run(recipe([tuned, llama], metrics="loss"), tmp_path / "out", overwrite=True)
    assert blocks.computed == 2 * first
    run(recipe([llama, tuned], data="other texts"), tmp_path / "out", overwrite=True)
    assert blocks.computed > 2 * first


def test_numbers_of_other_weights_are_not_used(
    llama: Path, tuned: Path, tmp_path: Path, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tuned, tmp_path / "model", ignore=shutil.ignore_patterns("precision*"))
    asked = recipe([{"model": str(tmp_path / "model"), "name": "model"}])
    before = run(asked, tmp_path / "out").value("model", "texts", "loss")
    path = tmp_path / "model" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    computed = blocks.computed
    after = run(asked, tmp_path / "out", overwrite=True).value("model", "texts", "loss")
    assert (after != before, blocks.computed) == (True, 2 * computed)


def test_numbers_of_an_adapter_at_another_scaling_are_not_used(tuned: Path, tmp_path: Path, blocks: Blocks) -> None:
    """The scaling stands in the configuration of an adapter alone; its tensors are the same."""
    import shutil

    shutil.copytree(tuned, tmp_path / "model", ignore=shutil.ignore_patterns("precision*"))
    asked = recipe([{"model": str(tmp_path / "model"), "name": "model"}])
    before = run(asked, tmp_path / "out").value("model", "texts", "loss")
    path = tmp_path / "model" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 8 * config["lora_alpha"]}))
    computed = blocks.computed
    after = run(asked, tmp_path / "out", overwrite=True).value("model", "texts", "loss")
    assert (after != before, blocks.computed) == (True, 2 * computed)


@pytest.mark.parametrize("error", [NonFiniteError("NaN"), OutputError("no space left")])
def test_what_was_finished_is_kept_after_a_failure(
    llama: Path, tmp_path: Path, blocks: Blocks, error: Exception
) -> None:
    blocks.at, blocks.error = 3, error
    with pytest.raises(type(error)):
        run(recipe([llama]), tmp_path / "out")
    blocks.at = None
    run(recipe([llama]), tmp_path / "out")
    assert blocks.computed == 6


def test_rows_of_a_damaged_folder_are_computed_again(llama: Path, tmp_path: Path, blocks: Blocks) -> None:
    run(recipe([llama]), tmp_path / "out")
    path, computed = tmp_path / "out" / "rows" / "00.jsonl", blocks.computed
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    run(recipe([llama]), tmp_path / "out", overwrite=True)
    assert blocks.computed == 2 * computed
    assert path.read_text() == whole
    head = json.loads(whole.splitlines()[0])
    assert head["title"] == str(llama)
