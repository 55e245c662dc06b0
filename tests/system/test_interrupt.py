import os
import signal
import threading

import pytest

from everlong.system.interrupt import Interrupted, deferred_interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_one_press_sets_the_flag_and_raises_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as pressed:
        assert not pressed()
        press()
        assert pressed()
        assert pressed()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_press_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as pressed:  # noqa: PT012
        press()
        press()
        raise AssertionError(pressed)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped"), deferred_interrupt():
        raise Interrupted("stopped")
    assert signal.getsignal(signal.SIGINT) is before
    # and Ctrl-C is Ctrl-C again
    with pytest.raises(KeyboardInterrupt):
        press()


def test_blocks_may_be_nested() -> None:
    with deferred_interrupt() as outer:
        with deferred_interrupt() as inner:
            press()
            assert inner()
        assert not outer()
        press()
        assert outer()


def test_another_thread_installs_no_handler() -> None:
    found: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as pressed:
            found.append(pressed())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_is_no_value_error_os_error_or_keyboard_interrupt() -> None:
    assert not issubclass(Interrupted, ValueError | OSError | KeyboardInterrupt)
