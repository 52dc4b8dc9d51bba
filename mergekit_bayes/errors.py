"""The exception tree: everything this library raises on purpose.

    MergekitBayesError
    |-- RecipeError                  what the user asked for cannot be read or makes no sense
    |-- CheckpointError              what lies on disk cannot be read, trusted or written
    |   |-- MissingTensorError         a tensor that is needed is not there, or one is there that nothing accounts for
    |   |-- ShapeMismatchError         two tensors that should agree in shape or dtype do not
    |   |-- SidecarMismatchError       a precision sidecar that does not belong to its checkpoint or base
    |   `-- OutputError                the output folder cannot be created, locked, filled or published
    |-- MethodError                  a merge method cannot be applied to what it was given
    |   |-- UnknownMethodError         no method has this name
    |   `-- MissingInputError          the method needs a base, a precision or a prior that is not there
    |-- NumericalError               numbers that no posterior can have
    |   |-- NonFiniteError             NaN or infinity
    |   `-- NonPositivePrecisionError  a precision that is zero or negative
    |-- DataError                    rows to learn from that cannot be read or do not fit the model
    |-- ModelError                   a model cannot be loaded, adapted or quantised as asked
    |-- FinetuneError              training, or its optimizer, was asked for something that makes no sense
    |-- EvaluateError              a prediction or its score was asked for something that makes no sense
    |-- PeerError                    another process of the same work failed
    `-- PlanError                    several of the above, found together before any work started

Messages say what failed, on what, what was seen and what was expected, and what to do. The command turns every one of
them into exit code 2 without a traceback; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class MergekitBayesError(Exception):
    """Root of every error this library raises on purpose."""


class RecipeError(MergekitBayesError):
    """One or several problems in a recipe, each already carrying `file:line:column` and the path of its key.

    Args:
        problems: one message per problem, in the order of the file; a single string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(MergekitBayesError):
    """A file or folder of tensors that cannot be read, trusted or written; the message names the file."""


class MissingTensorError(CheckpointError):
    """A tensor that is needed is absent, or one is present that no rule accounts for."""


class ShapeMismatchError(CheckpointError):
    """Tensors that must agree in shape or dtype do not; the message shows both."""


class SidecarMismatchError(CheckpointError):
    """A precision sidecar that describes another checkpoint or another base; the message shows both values."""


class OutputError(CheckpointError):
    """The output folder cannot be created, locked, filled or published; nothing that existed was touched."""


class MethodError(MergekitBayesError):
    """A merge method that cannot be applied to the inputs or parameters it was given."""


class UnknownMethodError(MethodError):
    """No merge method is registered under this name; the message offers the nearest one."""


class MissingInputError(MethodError):
    """The method needs a base, a precision or a prior precision that the recipe does not provide."""


class NumericalError(MergekitBayesError):
    """Numbers that no posterior can have; the message names the tensor and, where known, the file."""


class NonFiniteError(NumericalError):
    """NaN or infinity in an input or a result."""


class NonPositivePrecisionError(NumericalError):
    """A precision that is zero or negative; the message gives the share of entries."""


class DataError(MergekitBayesError):
    """Training or evaluation data that cannot be read or does not fit the model; the message names file and line."""


class ModelError(MergekitBayesError):
    """A model that cannot be loaded into memory, quantised or adapted as asked."""


class FinetuneError(MergekitBayesError):
    """Training, or its optimizer, was asked for something that makes no sense."""


class EvaluateError(MergekitBayesError):
    """A prediction, or a score of it, was asked for something that makes no sense."""


class PeerError(MergekitBayesError):
    """Another process of the same work failed; the message repeats what it said."""


class PlanError(MergekitBayesError):
    """Every reason, found in one pass over recipe and headers, why a plan cannot be carried out.

    Args:
        problems: the individual errors, in a fixed order.
    """

    def __init__(self, problems: Sequence[MergekitBayesError]) -> None:
        self.problems: tuple[MergekitBayesError, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
