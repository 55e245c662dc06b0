"""Ctrl-C waits for a good place; a second one does not wait."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from everlong.interrupt import deferred_interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_told_and_not_raised() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        press()
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    def twice() -> None:
        with deferred_interrupt():
            press()
            press()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_never_interrupted() -> None:
    told: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as interrupted:
            told.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [False]
