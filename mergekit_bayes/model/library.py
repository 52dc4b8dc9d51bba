"""transformers as this library uses it: without noise, and without a trace in the random numbers of others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import ModelError

FAILURES = (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError)
"""What transformers and PEFT raise about a folder or an option they cannot use; there is no tree of their own."""


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars and reports: what they say is checked and raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_NOISE = (
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    ("bitsandbytes.autograd._functions", "inputs will be cast from"),
)


class _Without(logging.Filter):
    """Drops the messages that begin with, or hold, a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def hush_bitsandbytes() -> None:
    """Keeps bitsandbytes, which PEFT imports, from two messages that concern nobody here.

    At import it tells that a kernel it would have from the hub is not there; and in int8, at every layer of every
    step, that products are formed from float16.
    """
    for name, text in _NOISE:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(text))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from torch's global generators inside depend on `seed` alone, and leave no trace outside.

    Args:
        seed: the same for all processes of a run.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def failure(what: str, error: BaseException) -> ModelError:
    """The error that says what could not be done and, in a line of its own words, why.

    Args:
        what: as a message begins: object and action.
        error: what the library raised.
    """
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{what}: it comes with code of its own, which this library never runs; expected an architecture that "
            "transformers knows"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ModelError(f"{what}: {' '.join(shown(line) for line in lines[:2])}")
