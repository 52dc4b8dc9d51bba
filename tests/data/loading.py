"""Loading data in tests, from plain rows or from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_bayes.data import TrainingData, load_training_data
from mergekit_bayes.recipe.data import DataSpec

Plain = Sequence[Mapping[str, object]]


def load(train: object, tokenizer: Any, *, task: str = "causal_lm", **options: Any) -> TrainingData:
    """`load([{"text": ...}], tokenizer, eval=[...], max_length=8)`; lists of rows stand for data sets in memory.

    A data set is a list of rows, a path, or a mapping of a recipe, in which `rows` may stand for `path`.
    """
    tables: dict[str, Plain] = {}

    def entry(value: object) -> object:
        if isinstance(value, Mapping):
            rows = value.get("rows")
            if rows is None:
                return value
            name = value.get("path", f"memory{len(tables)}")
            tables[name] = rows
            return {"path": name, **{key: found for key, found in value.items() if key != "rows"}}
        if isinstance(value, list):
            name = f"memory{len(tables)}"
            tables[name] = value
            return {"path": name}
        return {"path": str(value)}

    def entries(value: object) -> list[object]:
        return [entry(item) for item in value] if isinstance(value, tuple) else [entry(value)]

    given = {name: options.pop(name) for name in ("recipe_dir", "on_progress") if name in options}
    sections = {"train": entries(train)}
    if "eval" in options:
        sections["eval"] = entries(options.pop("eval"))
    spec = DataSpec(**sections, **options)
    return load_training_data(spec, tokenizer, task=task, tables=tables, **given)  # type: ignore[arg-type]


def texts(*values: object) -> list[dict[str, object]]:
    return [{"text": value} for value in values]


def pairs(*values: tuple[str, str]) -> list[dict[str, object]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in values]


def labelled(*values: tuple[str, object]) -> list[dict[str, object]]:
    return [{"text": text, "label": label} for text, label in values]
