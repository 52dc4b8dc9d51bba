"""Rows as models read them: once for all models of one tokenizer and one order of labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.data import DatasetReport, Rows, Task
from mergekit_bayes.errors import DataError
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.predict.rows import read_rows, spread, target_bytes

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.recipe.evaluate import EvaluateRecipe

__all__ = ["Encoding", "Encodings", "tokenizer_identity"]


@dataclass(frozen=True, eq=False)
class Encoding:
    """The data of an evaluation as some of its models read them.

    Attributes:
        tokenizer: digest of the tokenizer.
        rows: to evaluate on; their parts are the data sets.
        validation: to choose a temperature on; None without.
        bytes: of the text that each row's targets stand for; None for other tasks.
        pad_token_id: fills up short rows.
        reports: what became of the rows of every data set.
        notes: what people should know about them.
    """

    tokenizer: str
    rows: Rows
    validation: Rows | None
    bytes: tuple[int, ...] | None
    pad_token_id: int
    reports: tuple[DatasetReport, ...]
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether row i of it is row i of the files but for empty ones, whatever the tokenizer."""
        return not self.rows.packed and all(report.rows == report.read - report.empty for report in self.reports)


@dataclass
class Encodings:
    """Reads the data for one model after another, and what was read for an equal tokenizer only once.

    Args:
        recipe: what was asked for.
        task: of the models.
        recipe_dir: where relative paths may start beside the current directory.
        tables: data sets in memory, by the path that stands for them in the recipe.
    """

    recipe: EvaluateRecipe
    task: Task
    recipe_dir: Path | None
    tables: Tables | None
    _known: dict[tuple[str, tuple[str, ...] | None], Encoding] = field(default_factory=dict)
    _by_title: dict[str, Encoding] = field(default_factory=dict)

    def of(self, candidate: Candidate) -> Encoding:
        """The data as a model reads them.

        Raises:
            DataError: they cannot be read, or have labels that the model does not know.
            ModelError: the model has no tokenizer.
        """
        if candidate.title not in self._by_title:
            tokenizer = candidate.tokenizer()
            key = (tokenizer_identity(tokenizer), candidate.labels)
            if key not in self._known:
                self._known[key] = self._read(key[0], tokenizer, candidate)
            self._by_title[candidate.title] = self._known[key]
        return self._by_title[candidate.title]

    def _read(self, identity: str, tokenizer: Any, candidate: Candidate) -> Encoding:
        options: dict[str, Any] = {"task": self.task, "recipe_dir": self.recipe_dir, "tables": self.tables}
        recipe, labels = self.recipe, candidate.labels
        assert recipe.data is not None  # rows are read where there are some
        try:
            data = read_rows(recipe.data, tokenizer, labels=labels, **options)
            other = recipe.validation
            validation = None if other is None else read_rows(other, tokenizer, labels=labels, **options).train
        except DataError as error:
            raise DataError(f"data for model {candidate.title}: {error}") from error
        rows = spread(data.train, recipe.max_rows)
        bytes_ = tuple(target_bytes(rows, tokenizer)) if self.task == "causal_lm" else None
        # what the reader says of training rows is said of every data set below, in the words of an evaluation
        notes = tuple(note for note in data.report.notes if not note.startswith("no training row"))
        notes += tuple(_classes(rows, labels)) if labels is not None else ()
        pad = tokenizer.pad_token_id
        return Encoding(identity, rows, validation, bytes_, pad, data.report.datasets, notes)


def _classes(rows: Rows, labels: Sequence[str]) -> list[str]:
    """Classes that a data set does not have: nothing is known about models there."""
    notes = []
    for part in rows.parts:
        seen = {row["labels"] for row in rows[part.start : part.stop]}
        absent = [name for index, name in enumerate(labels) if index not in seen]
        if len(seen) == 1 and absent:
            (only,) = (labels[index] for index in seen if isinstance(index, int))
            notes.append(f"{part.name}: every row has the label {only}; its scores say nothing of the others")
        elif absent:
            notes.append(f"{part.name}: no row has the label {', '.join(absent)}")
    return notes


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of what decides how a tokenizer reads: equal for tokenizers that make equal rows of any text.

    Args:
        tokenizer: of transformers.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content: Mapping[str, object] = {
        "model": json.loads(fast.to_str()) if fast is not None else sorted(tokenizer.get_vocab().items()),
        "class": "" if fast is not None else type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "limit": tokenizer.model_max_length,
        "template": getattr(tokenizer, "chat_template", None),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()
