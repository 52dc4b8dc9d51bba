"""A pass that was cut short goes on with the same call and ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.errors import NonFiniteError, OutputError
from mergekit_bayes.estimate import passes, state
from mergekit_bayes.estimate.rows import Feed
from tests.estimate.runs import recipe, run

EIGEN = {"name": "kfac", "eigenvalues": True}


@pytest.fixture(autouse=True)
def _save_after_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0.0)


class Interruptions:
    """Interrupts before batch number `at` of all that are dealt; `dealt` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.dealt = 0
        original = Feed.batches

        def batches(feed: Feed, block: list[int]) -> Iterator[dict[str, Any]]:
            for batch in original(feed, block):
                if self.dealt == self.at:
                    raise self.error
                self.dealt += 1
                yield batch

        monkeypatch.setattr(Feed, "batches", batches)


@pytest.fixture
def interruptions(monkeypatch: pytest.MonkeyPatch) -> Interruptions:
    return Interruptions(monkeypatch)


def published(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("precision.safetensors", "convergence.png")}


@pytest.mark.parametrize(
    ("keys", "moments", "dealt"),
    [
        ({}, (0, 2, 5), 6),
        ({"estimator": EIGEN}, (5, 6, 8), 12),  # at the end of the first pass, between the two, within the second
        ({"max_memory": "1kB"}, (1, 8), None),
    ],
)
def test_a_run_goes_on_where_it_was(
    llama: Path,
    adapter: Path,
    tmp_path: Path,
    interruptions: Interruptions,
    keys: dict[str, Any],
    moments: tuple[int, ...],
    dealt: int | None,
) -> None:
    asked = recipe(llama, adapter, **keys)
    whole = run(asked, tmp_path / "whole").folder
    needed, interruptions.dealt = interruptions.dealt, 0
    assert dealt in (None, needed)
    for moment in moments:
        interruptions.at = moment
        with pytest.raises(KeyboardInterrupt):
            run(asked, tmp_path / "cut")
        assert not (tmp_path / "cut" / "precision.safetensors").exists()
    interruptions.at = None
    cut = run(asked, tmp_path / "cut").folder
    assert published(cut) == published(whole)
    assert interruptions.dealt == needed, "no batch was looked at twice"
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
    reports = [json.loads((folder / "precision_report.json").read_text()) for folder in (cut, whole)]
    assert all(reports[0][key] == reports[1][key] for key in ("rows", "units", "metadata", "notes"))


def test_what_another_recipe_left_is_not_used(
    llama: Path, adapter: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    interruptions.at = 3
    with pytest.raises(KeyboardInterrupt):
        run(recipe(llama, adapter), tmp_path / "cut")
    interruptions.at, interruptions.dealt = None, 0
    asked = recipe(llama, adapter, seed=1)
    assert published(run(asked, tmp_path / "cut").folder) == published(run(asked, tmp_path / "whole").folder)


def test_a_full_disk_leaves_what_was_saved(
    llama: Path, adapter: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    interruptions.at, interruptions.error = 2, OutputError("no space left")
    with pytest.raises(OutputError, match="no space"):
        run(recipe(llama, adapter), tmp_path / "cut")
    assert (tmp_path / "cut" / ".precision.partial" / "journal").is_dir()
    interruptions.at, interruptions.dealt = None, 0
    run(recipe(llama, adapter), tmp_path / "cut")
    assert interruptions.dealt == 4, "four of six batches were left"


def test_what_would_fail_again_leaves_nothing(
    llama: Path, adapter: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    interruptions.at, interruptions.error = 2, NonFiniteError("rows")
    with pytest.raises(NonFiniteError):
        run(recipe(llama, adapter), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_states_of_more_processes_than_there_are_now_add_up(tmp_path: Path) -> None:
    """Three processes were cut short; two, and one, take up everything between them."""
    from mergekit_bayes.checkpoint.tensors import write_tensors
    from mergekit_bayes.estimate.folder import SidecarFolder

    class Processes:
        def __init__(self, index: int, count: int) -> None:
            self.process_index, self.num_processes = index, count

    with SidecarFolder(tmp_path / "out", overwrite=False, job="a") as folder:
        shares = []
        for rank in range(3):
            write_tensors(folder.staging / f"{rank}.safetensors", {"sum:w": torch.full((2,), 10.0**rank)})
            shares.append({"file": f"{rank}.safetensors", "rows": rank, "units": 2 * rank, "skipped": [rank]})
        record = {"position": {"group": 1, "index": 0, "block": 3}, "shares": shares, "units": []}
        folder.journal.add("state", record, [share["file"] for share in shares])
        for count in (1, 2, 3):
            found = [state.load_pass(folder, Processes(index, count)) for index in range(count)]  # type: ignore[arg-type]
            known = [each for each in found if each is not None]
            assert torch.stack([each.sums["w"] for each in known]).sum(0).tolist() == [111.0, 111.0]
            assert sum(each.counts.units for each in known) == 6
            assert sorted(row for each in known for row in each.counts.skipped) == [0, 1, 2]
            assert known[0].position == state.Position(1, 0, 3)
