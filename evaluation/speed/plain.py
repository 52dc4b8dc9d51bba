"""The merge as one would write it down: every tensor whole, one expression, everything saved at the end.

    python -m evaluation.speed.plain FOLDER OUT SOURCES

Prints one JSON object with the seconds that reading, merging and writing took, without Python's own start-up.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evaluation.speed.checkpoints import PRIOR_PRECISION


def merge_plainly(folder: Path, out: Path, sources: int) -> None:
    """Gradient matching with weight 1 for every source, bfloat16 in and out, float32 between.

    Args:
        folder: holds `base`, `source1`, ... as `checkpoints.write_inputs` makes them.
        out: folder to write `model.safetensors` and `precision.safetensors` to.
        sources: how many.
    """
    merged, precisions = {}, {}
    with ExitStack() as stack:
        base = stack.enter_context(safe_open(folder / "base" / "model.safetensors", "pt"))
        names = [folder / f"source{index + 1}" for index in range(sources)]
        means = [stack.enter_context(safe_open(name / "model.safetensors", "pt")) for name in names]
        sidecars = [stack.enter_context(safe_open(name / "precision.safetensors", "pt")) for name in names]
        for name in base.keys():  # noqa: SIM118  not a dictionary
            origin = base.get_tensor(name).float()
            total, moved = torch.full_like(origin, PRIOR_PRECISION), torch.zeros_like(origin)
            for mean, sidecar in zip(means, sidecars, strict=True):
                precision = sidecar.get_tensor(name).float()
                total = total + (precision - PRIOR_PRECISION)
                moved = moved + precision * (mean.get_tensor(name).float() - origin)
            merged[name] = (origin + moved / total).to(torch.bfloat16)
            precisions[name] = total.to(torch.bfloat16)
    out.mkdir(parents=True)
    save_file(merged, out / "model.safetensors")
    save_file(precisions, out / "precision.safetensors")


if __name__ == "__main__":
    start = time.perf_counter()
    merge_plainly(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"seconds": time.perf_counter() - start}))
