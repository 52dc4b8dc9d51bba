"""One model of an evaluation, brought into memory when something has to be computed, and not before."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.data import Rows, Task, model_task
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.encodings import Encoding
from mergekit_bayes.evaluate.measure import Measured, measure_block, predictor
from mergekit_bayes.evaluate.variants import Variant
from mergekit_bayes.predict.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.predict.prior import with_prior
from mergekit_bayes.predict.pruning import Pruning
from mergekit_bayes.predict.rows import Feed, check_rows
from mergekit_bayes.predict.temperature import choose_temperature

if TYPE_CHECKING:
    from mergekit_bayes.model import LoadedModel
    from mergekit_bayes.predict.harness import HarnessTask, TaskResult
    from mergekit_bayes.recipe.evaluate import EvaluateRecipe

__all__ = ["OpenModel"]


@dataclass(frozen=True)
class OpenModel:
    """A model with its rows, if there are some.

    Attributes:
        recipe: what was asked for.
        task: what it is looked at for.
        candidate: its headers.
        encoding: the rows as it reads them; None without.
        device: where it goes.
    """

    recipe: EvaluateRecipe
    task: Task
    candidate: Candidate
    encoding: Encoding | None
    device: torch.device

    @property
    def feed(self) -> Feed:
        """The rows in batches."""
        return self._feed(self._read.rows)

    def measured(
        self, blocks: Mapping[int, Sequence[Sequence[int]]], variant: Variant
    ) -> Iterator[tuple[int, Measured]]:
        """Evaluates blocks one after the other.

        Args:
            blocks: of batches of row indices, by number.
            variant: the way the model is looked at.

        Yields:
            The number of each block with its numbers by row.

        Raises:
            MergekitBayesError: the model cannot be loaded, has no place for the rows, or computes NaN.
        """
        if not blocks:
            return
        used = self._sampled if variant.samples else self._posterior if variant.prune else None
        draws = {"samples": variant.samples, "temperature": variant.temperature, "seed": self.recipe.seed}
        with variant.applied(self._loaded.model, used):
            for number, block in blocks.items():
                sampled = used if variant.samples else None
                yield number, measure_block(self._loaded.model, self.feed, block, sampled, **draws)

    def choose(self, variant: Variant) -> dict[str, Any]:
        """Chooses the temperature of samples by the validation rows; returns a `ChosenTemperature` as plain data."""
        assert self._read.validation is not None  # the recipe was checked
        assert self._sampled is not None  # candidates without precisions were refused
        feed = self._feed(self._read.validation)
        found = choose_temperature(
            self._loaded.model,
            [feed.batch(indices) for indices in feed.batches],
            self._sampled,
            predict=predictor(feed.rows),
            samples=variant.samples,
            seed=self.recipe.seed,
        )
        return asdict(found)

    def harnessed(self, task: HarnessTask) -> TaskResult:
        """What a task of lm-eval-harness says of its mean.

        Raises:
            MergekitBayesError: the model cannot be loaded, or the harness failed.
        """
        loaded, title = self._loaded, self.candidate.title
        return task.run(loaded.model, loaded.tokenizer, batch_size=self.recipe.batch_size, title=title)

    def pruned(self, variant: Variant) -> str:
        """What pruning takes, in a sentence."""
        with variant.applied(self._loaded.model, self._posterior) as pruning:
            assert isinstance(pruning, Pruning)
            return str(pruning)

    def _feed(self, rows: Rows) -> Feed:
        return Feed(rows, self.recipe.batch_size, self._read.pad_token_id)

    @property
    def _read(self) -> Encoding:
        assert self.encoding is not None  # what is asked about rows is asked where there are some
        return self.encoding

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        found = self.candidate.load(model_task(self.task), dtype=self.recipe.dtype, device=self.device)
        encoding = self.encoding
        for rows in () if encoding is None else filter(None, (encoding.rows, encoding.validation)):
            check_rows(rows, found, self.candidate.title)
        return found

    @functools.cached_property
    def _posterior(self) -> AttachedPosterior | None:
        sidecar = self.candidate.sidecar
        return None if sidecar is None else attach_posterior(self._loaded.model, sidecar)

    @functools.cached_property
    def _sampled(self) -> AttachedPosterior | None:
        """The posterior under the prior that samples are asked for with."""
        asked = self.candidate.samples
        if self._posterior is None or asked is None or asked.prior is None:
            return self._posterior
        return with_prior(self._posterior, asked.prior)
