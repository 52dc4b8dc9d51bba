"""Which weights these are: a short hash over names, types, shapes and sampled bytes.

Hashing a whole checkpoint would take longer than merging it. The fingerprint reads at most 4 KiB of each
tensor, at places that depend on the tensor's size alone. Any training step changes nearly every value of
the tensors it touches, so two different fine-tunes differ in it; a hand-made edit of a few values between
the samples does not show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit_bayes.checkpoint.files import open_regular, read_exactly
from mergekit_bayes.checkpoint.header import TensorInfo

_PREFIX = "blake2b-16:"
_SAMPLE_BYTES = 512
_SAMPLES = 8


def fingerprint(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns `blake2b-16:` and 32 hexadecimal digits that identify a set of tensors.

    The result does not depend on the order of the mapping, on how the tensors are spread over files, or on
    the names of those files; it does depend on names, dtypes, shapes and values.

    Args:
        tensors: from the headers of a checkpoint or adapter.

    Raises:
        CheckpointError: a file cannot be opened, or ends before a tensor does.
    """
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in tensors.values():
        by_file.setdefault(info.path, []).append(info)
    digests = {name: digest for path in sorted(by_file) for name, digest in _digests(path, by_file[path])}
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        whole.update(digests[name])
    return _PREFIX + whole.hexdigest()


def _digests(path: Path, tensors: list[TensorInfo]) -> Iterator[tuple[str, bytes]]:
    descriptor = open_regular(path)
    try:
        for info in sorted(tensors, key=lambda info: info.offset):
            yield info.name, _digest(descriptor, info)
    finally:
        os.close(descriptor)


def _digest(descriptor: int, info: TensorInfo) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([info.name, info.dtype, info.shape]).encode())
    for start, length in _sampled(info.nbytes):
        digest.update(read_exactly(info.path, descriptor, length, info.offset + start))
    return digest.digest()


def _sampled(nbytes: int) -> list[tuple[int, int]]:
    if nbytes <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, nbytes)]
    last = nbytes - _SAMPLE_BYTES
    return [(last * sample // (_SAMPLES - 1), _SAMPLE_BYTES) for sample in range(_SAMPLES)]
