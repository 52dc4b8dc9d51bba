"""How much a pass may sum up at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.estimate.folder import SidecarFolder

__all__ = ["agree_on_bytes"]

_SHARE = 0.4  # of what is free: gradients of the rows looked at together need the rest
_ITEM = "max_bytes"


def agree_on_bytes(asked: int | None, folder: SidecarFolder, accelerator: Accelerator) -> int:
    """Returns the bytes that sums may take; the same for all processes, and for a run that goes on.

    Args:
        asked: what the recipe says; None for two fifths of what is free once the model is loaded.
        folder: remembers it.
        accelerator: connects the processes.
    """
    from accelerate.utils import gather_object

    free: list[int] = gather_object([int(_SHARE * _free(accelerator.device))])
    if accelerator.is_main_process and folder.journal.get(_ITEM) is None:
        folder.journal.add(_ITEM, {"bytes": min(free) if asked is None else asked}, [])
    accelerator.wait_for_everyone()
    record = folder.journal.get(_ITEM)
    assert record is not None  # written just before
    return int(record["bytes"])


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    return int(psutil.virtual_memory().available)
