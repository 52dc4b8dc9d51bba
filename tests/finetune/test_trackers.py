"""Experiment trackers through Accelerate, with one that remembers what it was told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.trackers import Trackers, check_trackers


class Memory(GeneralTracker):
    """A tracker in memory."""

    name = "memory"
    requires_logging_directory = False
    main_process_only = True
    told: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, run_name: str = "", **_: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        Memory.told.append(("config", dict(values)))

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        Memory.told.append((f"step {step}", dict(values)))

    def finish(self) -> None:
        Memory.told.append(("finish", None))


def test_trackers_hear_everything_also_what_was_before_they_started() -> None:
    Memory.told.clear()
    trackers = Trackers(Accelerator(cpu=True, log_with=Memory()), ["memory"])
    trackers.start({"training": {"seed": 0}, "data": {"train": [{"path": "x"}]}}, [{"step": 2, "loss": 3.0}])
    trackers.log({"step": 4, "eval": {"dev": {"loss": 2.0}}, "note": "text"})
    trackers.finish()
    assert Memory.told == [
        ("config", {"training.seed": 0, "data.train": "[{'path': 'x'}]"}),
        ("step 2", {"loss": 3.0}),
        ("step 4", {"eval/dev/loss": 2.0}),
        ("finish", None),
    ]


def test_without_names_nothing_happens() -> None:
    trackers = Trackers(Accelerator(cpu=True), [])
    trackers.start({}, [{"step": 1}])
    trackers.log({"step": 2})
    trackers.finish()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(FinetuneError, match="no tracker aim, wandb here; installed are tensorboard: install"):
        check_trackers(["tensorboard", "aim", "wandb"])
