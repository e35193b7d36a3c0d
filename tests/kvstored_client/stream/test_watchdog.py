"""Who keeps silent is cut off, soon after its time, and nobody else."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.clock import ManualClock
from kvstored_client.stream import watchdog
from kvstored_client.stream.watchdog import Watchdog
from tests.conftest import wait_until


def test_a_silent_call_is_cancelled_and_one_that_moves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock(0.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=clock.now, sleep=lambda _: time.sleep(0.001)))
    dog = Watchdog()
    cancelled = threading.Event()
    moving = dog.watch(lambda: None, 0.3)
    silent = dog.watch(cancelled.set, 0.3)
    late: list[str] = []
    released: Any = dog.watch(lambda: late.append("released"), 0.3)
    del released
    for _ in range(2):
        assert not cancelled.is_set()
        clock.advance(0.2)
        moving.due = clock.now() + 0.3
    assert cancelled.wait(120)
    clock.advance(0.2)
    assert (silent.expired, moving.expired, late) == (True, False, [])


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
