"""What the sources were trained to do, as far as a configuration tells it: class, labels, padding.

An adapter is read by what the header of its file says, for its configuration has no place for labels; a full model by
its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.checkpoint.provenance import Provenance, read_provenance
from mergekit_bayes.errors import CheckpointError, MergekitBayesError
from mergekit_bayes.merge.inputs import Input

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What all sources that tell agree on; None where they differ or nobody tells.

    Attributes:
        architecture: class of the model, such as `BertForSequenceClassification`.
        labels: names of a classification head's outputs, in their order.
        problem_type: how the head's outputs are read, as transformers calls it.
        pad_token_id: of the padding that a classification head looks past.
    """

    architecture: str | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None

    @property
    def label_settings(self) -> dict[str, object]:
        """The labels as config.json has them."""
        if self.labels is None:
            return {}
        names = dict(enumerate(self.labels))
        return {
            "id2label": {str(index): label for index, label in names.items()},
            "label2id": {label: index for index, label in names.items()},
        }

    @property
    def settings(self) -> dict[str, object]:
        """Everything that makes the configuration of another model one of this task."""
        known: dict[str, object] = {
            "architectures": None if self.architecture is None else [self.architecture],
            "pad_token_id": self.pad_token_id,
            "problem_type": self.problem_type,
            **self.label_settings,
        }
        return {key: value for key, value in known.items() if value is not None}

    @property
    def provenance(self) -> Provenance:
        """The same for the header of an adapter."""
        return Provenance(architecture=self.architecture, labels=self.labels, pad_token_id=self.pad_token_id)


def agreed_task(sources: Sequence[Input], problems: list[MergekitBayesError]) -> Task:
    """Find what the sources have in common; different labels are a problem.

    Args:
        sources: the sources.
        problems: gets the refusal of heads whose outputs mean different things.
    """
    tasks = {source.label: task_of(source) for source in sources}
    labels = {label: task.labels for label, task in tasks.items() if task.labels is not None}
    if len(set(labels.values())) > 1:
        seen = "; ".join(f"{label}: {listed(names)}" for label, names in labels.items())
        problems.append(
            CheckpointError(
                f"the labels of the sources differ ({seen}), so an output of one head means something else in another; "
                "expected the same labels in the same order; train with one data.labels"
            )
        )
    found = list(tasks.values())
    return Task(
        architecture=_common([task.architecture for task in found]),
        labels=_common([task.labels for task in found]),
        problem_type=_common([task.problem_type for task in found]),
        pad_token_id=_common([task.pad_token_id for task in found]),
    )


def task_of(source: Input) -> Task:
    """What one source tells about its task."""
    config: Mapping[str, object] = source.checkpoint.config if source.checkpoint is not None else {}
    if source.adapter is not None:
        told = read_provenance(source.adapter.metadata)
        kind = None if told.labels is None else "single_label_classification"  # the only one with labels in a header
        labels = told.labels or _labels(config.get("id2label"))
        return Task(told.architecture, labels, kind, told.pad_token_id)
    pad, problem = config.get("pad_token_id"), config.get("problem_type")
    return Task(
        architecture=architecture_of(config),
        labels=_labels(config.get("id2label")),
        problem_type=problem if isinstance(problem, str) else None,
        pad_token_id=pad if type(pad) is int else None,
    )


def architecture_of(config: Mapping[str, object]) -> str | None:
    """The class that a configuration names, if it is one."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and len(names) == 1 else None


def _labels(id2label: object) -> tuple[str, ...] | None:
    """The names of labels in their order; None for generic ones, which say nothing."""
    if not isinstance(id2label, dict) or not id2label:
        return None
    names = tuple(id2label.get(str(index)) for index in range(len(id2label)))
    if not all(isinstance(name, str) for name in names):
        return None
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if generic else tuple(str(name) for name in names)


def _common(values: Sequence[T | None]) -> T | None:
    known = [value for value in values if value is not None]
    return known[0] if known and all(value == known[0] for value in known) else None
