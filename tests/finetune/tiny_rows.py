"""Rows of a few tokens, without tokenizer or files."""

from __future__ import annotations

import numpy as np

from mergekit_bayes.data.rows import Encoded, Rows
from tests.tiny_models import VOCABULARY


def text_rows(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 12) -> Rows:
    """Rows of random tokens of different lengths; some of their tokens are not predicted."""
    stream = np.random.Generator(np.random.PCG64(seed))
    encoded = []
    for _ in range(count):
        length = int(stream.integers(shortest, longest + 1))
        targets = stream.random(length) < 0.8
        targets[0], targets[-1] = False, True
        encoded.append(Encoded(stream.integers(0, VOCABULARY, length).astype(np.int32), targets))
    return Rows(encoded, task="causal_lm")


def labelled_rows(count: int, *, classes: int = 3, seed: int = 0) -> Rows:
    """Rows of random tokens with a class each."""
    stream = np.random.Generator(np.random.PCG64(seed))
    encoded = [
        Encoded(stream.integers(1, VOCABULARY, int(stream.integers(3, 9))).astype(np.int32), label=index % classes)
        for index in range(count)
    ]
    return Rows(encoded, task="sequence_classification")
