"""Who keeps silent is cut off, soon after its time, and nobody else."""

import threading
import time

from kvstored_client.watchdog import Watchdog
from tests.conftest import wait_until


def test_a_silent_call_is_cancelled_and_one_that_moves_is_not() -> None:
    dog = Watchdog()
    cancelled = threading.Event()
    moving = dog.watch(lambda: None, 0.3)
    silent = dog.watch(cancelled.set, 0.3)
    released = dog.watch(lambda: None, 0.3)
    dog.release(released)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        moving.progress()
        time.sleep(0.01)
    assert cancelled.is_set()
    assert (silent.expired, moving.expired, released.expired) == (True, False, False)
    dog.release(moving)
    dog.release(silent)


def test_a_call_that_comes_while_the_thread_lingers_or_after_it_left_is_watched(monkeypatch) -> None:
    monkeypatch.setattr(Watchdog, "_LINGER_S", 0.3)
    dog = Watchdog()
    before = threading.active_count()
    for pause_s in (0.0, 0.15, 1.0):
        time.sleep(pause_s)
        cancelled = threading.Event()
        watch = dog.watch(cancelled.set, 0.05)
        assert cancelled.wait(30)
        assert watch.expired
    wait_until(lambda: threading.active_count() == before)
