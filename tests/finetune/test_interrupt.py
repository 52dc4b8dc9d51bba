"""Signals during training: the first is a wish, the second is obeyed at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mergekit_bayes.finetune.interrupt import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_wait() -> None:
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_stay_what_they_are() -> None:
    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with stop_on_signals() as stop:
            seen.extend([signal.getsignal(signal.SIGINT) == before, bool(stop)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, False]
