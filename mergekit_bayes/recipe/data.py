"""The section `data`: what is learned from, and how rows become tokens.

data:
  train:
    - {path: chats.jsonl, format: messages, weight: 0.7}
    - {path: org/corpus, split: train, columns: {text: body}, weight: 0.3}
  eval_fraction: 0.05
  max_length: 1024
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Problem, did_you_mean, refusal, show
from mergekit_bayes.recipe.spec import Entries, Spec, checked

Format: TypeAlias = Literal["text", "prompt_completion", "messages", "labelled", "multiple_choice"]

FORMAT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "labelled": ("text", "text_pair", "label"),
    "multiple_choice": ("question", "choices", "answer"),
}
"""The standard columns of each format."""

COLUMNS = tuple(dict.fromkeys(name for names in FORMAT_COLUMNS.values() for name in names))

_format = field.choice(
    *FORMAT_COLUMNS,
    also={
        "labeled": "labelled",
        "classification": "labelled",
        "completion": "prompt_completion",
        "instruction": "prompt_completion",
        "alpaca": "prompt_completion",
        "prompt-completion": "prompt_completion",
        "chat": "messages",
        "chat_template": "messages",
        "conversational": "messages",
        "sharegpt": "messages",
        "chatml": "messages",
        "mcq": "multiple_choice",
        "multiple-choice": "multiple_choice",
        "multichoice": "multiple_choice",
        "raw": "text",
        "pretrain": "text",
    },
)
_long_rows = field.choice("truncate", "drop", "refuse", also={"cut": "truncate", "skip": "drop", "error": "refuse"})


def _column(value: object) -> str | tuple[str, ...]:
    return field.several(field.text)(value) if isinstance(value, list | tuple) else field.text(value)


def _columns(value: object) -> Entries[str | tuple[str, ...]]:
    found = field.entries(_column)(value)
    problems = [
        Problem((name,), f"no column of any format.{did_you_mean(name, COLUMNS) or _known_columns()}", at_key=True)
        for name in found
        if name not in COLUMNS
    ]
    problems += [
        Problem((name,), f"is one column; only `choices` may be a list of them, found {show(columns)}.")
        for name, columns in found.items()
        if name in COLUMNS and name != "choices" and not isinstance(columns, str)
    ]
    if problems:
        raise refusal(*problems)
    return found


def _known_columns() -> str:
    return f" Those are {', '.join(f'`{name}`' for name in COLUMNS)}; write `standard name: name in the file`."


def _separator(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise refusal(f"expected text, found {show(value)}.")
    return value


def _labels(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    labels = field.several(field.text)(value)
    problems = [
        Problem((index,), f"{show(label)} appears twice.")
        for index, label in enumerate(labels)
        if label in labels[:index]
    ]
    if len(labels) == 1:
        problems.append(Problem((), "expected at least two labels, found one."))
    if problems:
        raise refusal(*problems)
    return labels


def dataset_mappings(value: object) -> list[object]:
    """A list of mappings, also where one mapping or one path stands for it."""
    if isinstance(value, str | os.PathLike | Mapping | DatasetSpec):
        value = [value]
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise refusal(f"expected a path, or a list of data sets, each `- path: ...`, found {show(value)}.")
    return [{"path": entry} if isinstance(entry, str | os.PathLike) else entry for entry in value]


def _training_sets(value: object) -> object:
    found = dataset_mappings(value)
    if not found:
        raise refusal("found no data set; training needs at least one.")
    return found


class DatasetSpec(Spec):
    """One source of rows.

    Attributes:
        path: a local file (.jsonl, .json, .csv, .parquet, .txt), a folder of such files, or a hub id with
            `@revision` as wanted.
        name: configuration of a hub data set.
        split: which split of it.
        format: what its rows are; None to tell from the columns.
        columns: standard column name -> its name in the file, for those that differ; a list of names where each
            choice of a question has a column of its own.
        separator: between a question and each of its choices; None for a space.
        weight: share of the training mixture, relative to the other data sets'; None everywhere for every row once
            per epoch.
        max_rows: only the first so many rows.
    """

    path: Annotated[str, checked(field.text)]
    name: Annotated[str | None, checked(field.optional(field.text))] = None
    split: Annotated[str, checked(field.text)] = "train"
    format: Annotated[Format | None, checked(field.optional(_format))] = None
    columns: Annotated[Entries[str | tuple[str, ...]], checked(_columns)] = Entries()
    separator: Annotated[str | None, checked(_separator)] = None
    weight: Annotated[float | None, checked(field.optional(field.positive))] = None
    max_rows: Annotated[int | None, checked(field.optional(field.integer(1)))] = None


class DataSpec(Spec):
    """All data of a run.

    Attributes:
        train: what is learned from, in the order of the recipe; at least one.
        eval: held-out data sets.
        eval_fraction: share of the training rows that is held out instead; None for none.
        max_length: tokens per row, at most.
        long_rows: what happens to longer rows: cut at the end (questions at their start), left out, or an error.
        packing: fill rows of max_length with several short ones, which do not see each other; texts are concatenated
            and cut.
        completion_only_loss: learn completions and assistant turns only, not prompts; plain text has none.
        append_eos: end texts and completions with the end-of-sequence token.
        chat_template: path of a Jinja file that replaces the tokenizer's own template.
        labels: the label names in the order of the classes; None for those found in the training data, sorted.
    """

    train: Annotated[tuple[DatasetSpec, ...], BeforeValidator(_training_sets)]
    eval: Annotated[tuple[DatasetSpec, ...], BeforeValidator(dataset_mappings)] = ()
    eval_fraction: Annotated[float | None, checked(field.optional(field.between(0, 1, above=True, below=True)))] = None
    max_length: Annotated[int, checked(field.integer(2))] = 1024
    long_rows: Annotated[Literal["truncate", "drop", "refuse"], checked(_long_rows)] = "truncate"
    packing: Annotated[bool, checked(field.boolean)] = False
    completion_only_loss: Annotated[bool, checked(field.boolean)] = True
    append_eos: Annotated[bool, checked(field.boolean)] = True
    chat_template: Annotated[str | None, checked(field.optional(field.text))] = None
    labels: Annotated[tuple[str, ...] | None, checked(_labels)] = None

    def without_effect(self) -> frozenset[str]:
        """Neither plain text nor a question has completions, and packed text is cut into rows that fit."""
        if self.train and all(dataset.format == "multiple_choice" for dataset in self.train):
            return frozenset({"completion_only_loss", "append_eos"})
        if any(dataset.format != "text" for dataset in self.train):
            return frozenset()
        return frozenset({"completion_only_loss", "long_rows"} if self.packing else {"completion_only_loss"})


def data_mapping(value: object) -> object:
    """The section, refused where only a data set is written in its place."""
    if isinstance(value, str | list | tuple):
        raise refusal(f"expected a mapping of keys, found {show(value)}. Write `data: {{train: ...}}`.")
    return {} if value is None else value
