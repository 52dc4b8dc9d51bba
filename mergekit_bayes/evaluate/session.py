"""One run: every model in every way, a block of rows at a time, and nothing that is known already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_bayes.data import Task
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.encodings import Encodings
from mergekit_bayes.evaluate.harnessed import Answers, Harnessed
from mergekit_bayes.evaluate.measure import Measured
from mergekit_bayes.evaluate.open_model import OpenModel
from mergekit_bayes.evaluate.outcome import Outcome
from mergekit_bayes.evaluate.processes import gathered
from mergekit_bayes.evaluate.progress import Advance, follow
from mergekit_bayes.evaluate.store import Store, key_of
from mergekit_bayes.evaluate.variants import Variant, variants_of
from mergekit_bayes.recipe.evaluate import EvaluateRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Found", "Session"]


@dataclass(frozen=True)
class Found:
    """What a run found.

    Attributes:
        outcomes: on rows, in the order of tables.
        answers: of lm-eval-harness, by the title of the model.
    """

    outcomes: Sequence[Outcome]
    answers: Mapping[str, Answers]


@dataclass(frozen=True)
class Session:
    """Everything that is the same for all models.

    Attributes:
        recipe: what was asked for.
        task: of the models.
        encodings: the rows; None without.
        harness: tasks of lm-eval-harness.
        store: what is known.
        accelerator: device and processes.
    """

    recipe: EvaluateRecipe
    task: Task
    encodings: Encodings | None
    harness: Harnessed
    store: Store
    accelerator: Accelerator

    def run(self, candidates: Sequence[Candidate], *, show: bool) -> Found:
        """Evaluates all models, one after the other; every process takes its share of the work and knows the rest.

        Args:
            candidates: the models.
            show: whether to show progress.
        """
        outcomes: list[Outcome] = []
        answers: dict[str, Answers] = {}
        with follow(show=show, rows=sum(map(self._size, candidates))) as advance:
            for candidate in candidates:
                encoding = None if self.encodings is None else self.encodings.of(candidate)
                model = OpenModel(self.recipe, self.task, candidate, encoding, self.accelerator.device)
                outcomes += self._on_rows(model, advance) if encoding is not None else ()
                answers[candidate.title] = self.harness.answers(model, advance)
        return Found(outcomes, answers)

    def _size(self, candidate: Candidate) -> int:
        """Rows and documents of one model."""
        rows = 0 if self.encodings is None else len(self.encodings.of(candidate).rows)
        return rows * len(list(variants_of(self.recipe, candidate))) + self.harness.documents

    def _on_rows(self, model: OpenModel, advance: Advance) -> Iterator[Outcome]:
        for variant in variants_of(self.recipe, model.candidate):
            if variant.temperature is None:
                chosen = self._chosen(model, variant)
                yield self._variant(model, replace(variant, temperature=chosen["temperature"]), chosen, advance)
            else:
                yield self._variant(model, variant, None, advance)

    def _variant(
        self, model: OpenModel, variant: Variant, chosen: Mapping[str, Any] | None, advance: Advance
    ) -> Outcome:
        key = key_of(self._identity(model) | dict(variant.identity))
        found = self._own_share(model, variant, key, advance)
        measured = {row: numbers for share in gathered(self.accelerator, found) for row, numbers in share.items()}
        note = self._note(model, variant, key)
        assert model.encoding is not None  # only models with rows get here
        return Outcome(model.candidate, variant, model.encoding, key, measured, chosen, note)

    def _own_share(self, model: OpenModel, variant: Variant, key: str, advance: Advance) -> Measured:
        """The numbers of the blocks that fall to this process; those that are not known are computed and kept."""
        title = variant.title(model.candidate.title)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        blocks = dict(enumerate(model.feed.blocks(variant.blocks)))
        found: dict[int, Sequence[float]] = {}
        todo: dict[int, Sequence[Sequence[int]]] = {}
        for number, block in blocks.items():
            known = None
            if number % world == rank:
                known = self.store.known(key, number, [index for batch in block for index in batch])
                todo |= {} if known is not None else {number: block}
                found |= known or {}
            if number not in todo:
                advance(title, sum(map(len, block)))
        for number, part in model.measured(todo, variant):
            self.store.keep(key, number, part)
            found |= part
            advance(title, len(part))
        return found

    def _chosen(self, model: OpenModel, variant: Variant) -> dict[str, Any]:
        """The temperature that validation rows choose; every process looks for itself, and takes the first one's."""
        assert model.encoding is not None
        assert model.encoding.validation is not None  # the recipe was checked
        identity = self._identity(model) | {"validation": model.encoding.validation.fingerprint}
        item = f"{key_of(identity | dict(variant.identity))}:temperature"
        record = self.store.get(item)
        record = gathered(self.accelerator, model.choose(variant) if record is None else record)[0]
        if self.accelerator.is_main_process:
            self.store.put(item, record)
        return record

    def _note(self, model: OpenModel, variant: Variant, key: str) -> str | None:
        """What pruning did; every process finds the same."""
        if not variant.prune:
            return None
        record = self.store.get(f"{key}:note") or {"text": model.pruned(variant)}
        if self.accelerator.is_main_process:
            self.store.put(f"{key}:note", record)
        return str(record["text"])

    def _identity(self, model: OpenModel) -> dict[str, object]:
        return {
            **model.candidate.identity,
            "rows": model.feed.rows.fingerprint,
            "task": self.task,
            "labels": model.candidate.labels,
            "dtype": self.recipe.dtype,
            "batch_size": self.recipe.batch_size,
            "seed": self.recipe.seed,
        }
