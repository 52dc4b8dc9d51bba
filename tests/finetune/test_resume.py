"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import pytest

from mergekit_bayes.finetune.resume import Effect, recipe_changes

OLD = {
    "kind": "finetune",
    "model": {"path": "base", "task": "causal_lm"},
    "adapter": {"r": 8},
    "data": {"train": [{"path": "a.jsonl"}], "max_length": 64},
    "optimizer": {"name": "ivon", "lr": 0.1},
    "training": {"max_steps": 10, "logging_steps": 10},
}


def changed(key: str, value: object) -> list[tuple[str, object, object, Effect]]:
    *path, last = key.split(".")
    new = {name: dict(section) if isinstance(section, dict) else section for name, section in OLD.items()}
    node = new
    for name in path:
        node = node.setdefault(name, {})  # type: ignore[assignment]
    node[last] = value
    return [(change.key, change.old, change.new, change.effect) for change in recipe_changes(OLD, new)]


@pytest.mark.parametrize(
    ("key", "value", "effect"),
    [
        ("training.logging_steps", 1, Effect.NONE),
        ("training.save_total_limit", 2, Effect.NONE),
        ("output.path", "elsewhere", Effect.NONE),
        ("data.eval", [{"path": "dev.jsonl"}], Effect.NONE),
        ("training.max_steps", 20, Effect.LENGTH),
        ("training.num_train_epochs", 2.0, Effect.LENGTH),
        ("training.seed", 1, Effect.COURSE),
        ("training.bf16", True, Effect.COURSE),
        ("optimizer.lr", 0.2, Effect.COURSE),
        ("optimizer.mc_samples", 2, Effect.STATE),
        ("optimizer.name", "adamw", Effect.STATE),
        ("adapter.r", 16, Effect.STATE),
        ("data.max_length", 32, Effect.STATE),
        ("data.train", [{"path": "b.jsonl"}], Effect.STATE),
        ("data.eval_fraction", 0.1, Effect.STATE),
    ],
)
def test_every_change_has_a_meaning(key: str, value: object, effect: Effect) -> None:
    ((name, _, new, meaning),) = changed(key, value)
    assert (name, new, meaning) == (key, value, effect)


def test_equal_recipes_have_no_changes() -> None:
    assert recipe_changes(OLD, dict(OLD)) == []


def test_a_change_reads_as_a_sentence() -> None:
    lines = [str(change) for change in recipe_changes({"a": {"b": 1}, "c": [1] * 60}, {"a": {"b": 2, "d": "x"}})]
    assert lines[0] == "a.b: was 1, now 2"
    assert lines[1] == "a.d: was not given, now x"
    assert lines[2].startswith("c: was [1, 1,")
    assert lines[2].endswith("..., now not given")
