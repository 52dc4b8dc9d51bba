"""Global random numbers of training (dropout, above all) as a function of seed, step and process.

Seeding them anew at every step makes a resumed run draw what the uninterrupted one drew, with no generator state to be
saved, and whatever evaluation in between has drawn.
"""

from __future__ import annotations

import random
import struct
from hashlib import blake2b

__all__ = ["seed_step"]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch, on CPU and accelerators, for one optimizer step of one process."""
    import numpy as np
    import torch

    digest = blake2b(struct.pack("<3q", seed, step, rank), digest_size=8).digest()
    key = int.from_bytes(digest, "little") >> 1
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.manual_seed(key)
