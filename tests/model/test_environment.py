"""What the machine is good at."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.model import environment
from mergekit_bayes.model.environment import slow_dtype

CPU = torch.device("cpu")


def test_what_is_emulated_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.bfloat16: 8.7, torch.float16: 1.4}
    monkeypatch.setattr(environment, "_times_as_long", times.__getitem__)
    expected = "this processor takes 9 times as long for products in bfloat16 as in float32"
    assert slow_dtype(torch.bfloat16, CPU) == expected
    assert slow_dtype(torch.float16, CPU) is None
    assert slow_dtype(torch.float32, CPU) is None
    assert slow_dtype(torch.bfloat16, torch.device("cuda")) is None


def test_how_slow_is_found_out_by_trying() -> None:
    environment._times_as_long.cache_clear()
    assert environment._times_as_long(torch.bfloat16) > 0
    assert environment._times_as_long.cache_info().currsize == 1
