"""The processes of an evaluation: who they are, and what each of them found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_bayes.errors import ModelError
from mergekit_bayes.model import check_launch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["gathered", "make_accelerator"]

T = TypeVar("T")


def make_accelerator() -> Accelerator:
    """Returns what knows devices and processes.

    Raises:
        ModelError: the launch asks for a sharded model.
        FinetuneError: processes that do not know of each other.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # a training of the same process may have wanted another precision; device and processes stay what they are
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ModelError(f"launch: {kind}: an evaluation keeps a whole model in every process; launch without it")
    check_launch()
    return accelerator


def gathered(accelerator: Accelerator, own: T) -> list[T]:
    """Returns what every process found, in their order; all of them call this at the same place."""
    if accelerator.num_processes == 1:
        return [own]
    from accelerate.utils import gather_object

    shares: list[Any] = gather_object([own])
    return shares
