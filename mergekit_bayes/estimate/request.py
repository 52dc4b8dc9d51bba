"""What a run was asked for, with everything that was found before weights were loaded."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.model.trained import Trained
from mergekit_bayes.recipe import PrecisionRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.data.read import Tables

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        recipe: what was asked for.
        trained: what is described.
        folder: where the sidecar goes.
        accelerator: device and processes.
        recipe_dir: folder that relative paths are tried from after the current one.
        tables: data sets in memory, by the path that stands for them in the recipe.
        show: whether to show progress.
        began: when, on a clock of its own.
    """

    recipe: PrecisionRecipe
    trained: Trained
    folder: SidecarFolder
    accelerator: Accelerator
    recipe_dir: Path | None
    tables: Tables | None
    show: bool
    began: float = field(default_factory=monotonic)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def working_folder(self, data: str | None) -> SidecarFolder:
        """Returns the folder for this very job: what an interrupted run left for another one is thrown away.

        Args:
            data: fingerprint of the rows.
        """
        asked = {key: value for key, value in self.recipe.resolved().items() if key not in ("output", "max_memory")}
        identity = [asked, self.recipe.output.precision, self.trained.fingerprint, self.trained.base, data]
        text = json.dumps(identity, sort_keys=True, default=str)
        return self.folder.for_job(blake2b(text.encode(), digest_size=16).hexdigest())

    def entered(self, folder: SidecarFolder) -> AbstractContextManager[object]:
        """Returns the context of the work: the folder in the leading process, nothing in others."""
        return folder if self.leads else nullcontext()
