"""What a signal does, where it is waited for and where it is not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from treering.errors import UpdateInterruptedError
from treering.stop import Stop, stop_on_signals


def test_it_only_asks_unless_told_to_end_at_once() -> None:
    stop = Stop()
    stop.ask()
    assert stop.is_set()
    with pytest.raises(UpdateInterruptedError, match="stopped as asked; run `treering update` again"):
        stop.check()


def test_it_ends_at_once_past_whoever_takes_any_error() -> None:
    stop, reached = Stop("nothing was changed"), False
    with pytest.raises(UpdateInterruptedError, match="stopped as asked; nothing was changed"), stop.at_once():  # noqa: PT012
        try:
            stop.ask()
        except Exception:
            reached = True
    assert not reached


def test_patience_within_and_again_without() -> None:
    stop = Stop()
    with stop.at_once():
        with stop.patient():
            stop.ask()
        assert stop.asked
        stop.ask()  # Who was asked already is left alone.
    other = Stop()
    with pytest.raises(UpdateInterruptedError), other.at_once():  # noqa: PT012
        with other.patient():
            pass
        other.ask()


def test_a_second_asking_leaves_the_cleaning_up_alone() -> None:
    stop, cleaned = Stop(), False
    with pytest.raises(UpdateInterruptedError), stop.at_once():  # noqa: PT012
        try:
            stop.ask()
        finally:
            stop.ask()
            cleaned = True
    assert cleaned


def test_signals_ask_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_there_are_no_signals() -> None:
    found: list[bool] = []

    def run() -> None:
        with stop_on_signals() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
