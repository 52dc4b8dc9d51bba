"""A model to evaluate, known by its headers: one that lies on disk. What every kind of them can tell and do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.provenance import read_provenance
from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.data import ModelTask
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.model.trained import Trained, load_trained
from mergekit_bayes.recipe.evaluate import EvaluatedSpec, SamplesSpec
from mergekit_bayes.recipe.model import ModelSpec, TrainingDType

if TYPE_CHECKING:
    from mergekit_bayes.model import LoadedModel

__all__ = ["Candidate", "Stored", "task_in"]


@dataclass(frozen=True)
class Candidate(ABC):
    """A model to evaluate.

    Attributes:
        spec: as in the recipe.
        samples: of its posterior; None for its mean alone.
        sidecar: path of its precisions; None if there are none, or none are wanted.
        labels: of a classification, in the order of its outputs; None for language models.
    """

    spec: EvaluatedSpec
    samples: SamplesSpec | None
    sidecar: Path | None
    labels: tuple[str, ...] | None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.spec.title

    def with_labels(self, labels: tuple[str, ...] | None) -> Self:
        """The same model, knowing what its outputs are called."""
        return replace(self, labels=labels)

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What its numbers depend on: the weights, and the precisions where they are used."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the weights that were trained or merged."""

    @property
    @abstractmethod
    def reference(self) -> str:
        """Where it comes from, as the recipe has it."""

    @property
    @abstractmethod
    def base(self) -> str | None:
        """Reference of the model that it stands on; None for one that is complete."""

    @property
    @abstractmethod
    def task(self) -> ModelTask | None:
        """What it was trained to do, as far as its files tell."""

    @property
    @abstractmethod
    def known_labels(self) -> tuple[str, ...] | None:
        """What its files call its outputs; None where they only count them."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, object]:
        """Its config.json, or that of an adapter's base."""

    @property
    def has_own_head(self) -> bool:
        """Whether `config` counts its outputs; an adapter's may be others than those of its base."""
        return self.base is None

    @property
    @abstractmethod
    def places(self) -> Iterator[Path]:
        """Files and folders that are read, and that an output must not replace."""

    @property
    @abstractmethod
    def about(self) -> str:
        """What it is, in a few words."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Loads its tokenizer.

        Raises:
            ModelError: there is none.
        """

    @abstractmethod
    def load(self, task: ModelTask, *, dtype: TrainingDType | None, device: torch.device) -> LoadedModel:
        """Brings it into memory.

        Args:
            task: what it does.
            dtype: what it computes in; None for what it is stored as.
            device: where it goes.

        Raises:
            MergekitBayesError: it cannot be loaded, or lacks something the task needs.
        """


@dataclass(frozen=True)
class Stored(Candidate):
    """A checkpoint, or an adapter on a base.

    Attributes:
        home: reference of the model, or of the adapter's base.
        trained: its headers.
    """

    home: str
    trained: Trained

    @property
    def identity(self) -> Mapping[str, object]:
        """What its numbers depend on."""
        sidecar = None if self.sidecar is None else fingerprint(open_sidecar(self.sidecar).tensors)
        found = {"base": self.trained.identity.fingerprint, "model": self.fingerprint, "precision": sidecar}
        adapter = self.trained.adapter
        return found if adapter is None else {**found, "scalings": adapter.scalings}

    @property
    def fingerprint(self) -> str:
        """Of what was trained."""
        return self.trained.fingerprint

    @property
    def reference(self) -> str:
        """As the recipe has it."""
        return str(self.spec.model)

    @property
    def base(self) -> str | None:
        """Of an adapter."""
        return None if self.trained.adapter is None else self.home

    @property
    def task(self) -> ModelTask | None:
        """By the class that its files name."""
        adapter = self.trained.adapter
        if adapter is None:
            return task_in(self.config.get("architectures"))
        return task_in(adapter.config.get("task_type"), read_provenance(adapter.metadata).architecture)

    @property
    def known_labels(self) -> tuple[str, ...] | None:
        """By the header of an adapter, else by config.json."""
        return self.trained.labels

    @property
    def config(self) -> Mapping[str, object]:
        """Of the checkpoint."""
        return self.trained.checkpoint.config

    @property
    def places(self) -> Iterator[Path]:
        """Of the checkpoint, what was trained and its precisions."""
        yield self.trained.checkpoint.folder
        yield self.trained.folder
        if self.sidecar is not None:
            yield self.sidecar.parent

    @property
    def about(self) -> str:
        """Its size, and the base of an adapter."""
        weights = sum(info.numel for info in self.trained.checkpoint.tensors.values())
        return f"{weights:,} weights" if self.base is None else f"an adapter on {self.base}, {weights:,} weights"

    def tokenizer(self) -> Any:
        """That of the checkpoint."""
        return load_tokenizer(self.trained.checkpoint.folder, reference=self.home)

    def load(self, task: ModelTask, *, dtype: TrainingDType | None, device: torch.device) -> LoadedModel:
        """Reads it from disk."""
        spec = ModelSpec(path=self.home, task=task, dtype=dtype)
        return load_trained(self.trained, spec, labels=self.labels, device=device)


def task_in(*told: object) -> ModelTask | None:
    """The task that names of classes, or PEFT's name of a task, stand for; None where they stand for none."""
    text = " ".join(str(part) for part in told)
    if "SequenceClassification" in text or "SEQ_CLS" in text:
        return "sequence_classification"
    return "causal_lm" if any(word in text for word in ("CausalLM", "LMHead", "CAUSAL_LM")) else None
