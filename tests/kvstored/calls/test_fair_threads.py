"""Worker threads: a caller's work does not wait for all that another one has asked for."""

import threading
import time

import pytest

from kvstored.calls import fair_threads
from kvstored.calls.fair_threads import FairThreads

WAIT_S = 60


class Crowd:
    """Threads, and work of named callers that goes on until it is let go."""

    def __init__(self, threads):
        self.threads = FairThreads(threads, "test")
        self.gate = threading.Event()
        self.begun = []
        self._changed = threading.Condition()

    def ask(self, caller, name):
        return self.threads.submit(caller, self._work, name)

    def _work(self, name):
        with self._changed:
            self.begun.append(name)
            self._changed.notify_all()
        assert self.gate.wait(WAIT_S)
        return name

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, WAIT_S)
        return self.begun


@pytest.fixture
def crowd():
    found = Crowd(4)
    yield found
    found.gate.set()
    found.threads.shutdown()


def test_a_thread_is_left_for_another_caller_however_much_one_asks_for(crowd):
    for i in range(20):
        crowd.ask("a", f"a {i}")
    crowd.wait_for(2)
    crowd.ask("b", "b")
    assert "b" in crowd.wait_for(len(crowd.begun) + 1)
    assert len([name for name in crowd.begun if name[0] == "a"]) <= 3


def test_what_waits_has_its_turn_after_the_other_callers(monkeypatch):
    monkeypatch.setattr(fair_threads.os, "sched_getaffinity", lambda _: range(1))
    crowd = Crowd(1)
    first = crowd.ask("a", "a first")
    crowd.wait_for(1)
    rest = [crowd.ask("a", f"a {i}") for i in range(3)] + [crowd.ask("b", f"b {i}") for i in range(2)]
    crowd.gate.set()
    assert first.result(WAIT_S) == "a first"
    for future in rest:
        future.result(WAIT_S)
    assert crowd.begun == ["a first", "a 0", "b 0", "a 1", "b 1", "a 2"]
    crowd.threads.shutdown()


def test_a_caller_alone_has_more_threads_than_one_beside_others(monkeypatch):
    monkeypatch.setattr(fair_threads.os, "sched_getaffinity", lambda _: range(2))
    crowd = Crowd(8)
    crowd.ask("b", "b")
    crowd.wait_for(1)
    for i in range(20):
        crowd.ask("a", f"a {i}")
    assert len(crowd.wait_for(3)) == 3, "two beside another caller"
    crowd.threads._changed_at = time.monotonic() - 2 * fair_threads.ALONE_S
    for _ in range(8):
        crowd.ask("a", "a later")
    assert len(crowd.wait_for(8)) == 8, "all but one, without another caller"
    crowd.gate.set()
    crowd.threads.shutdown()


def test_errors_and_results_are_the_futures_and_nothing_is_taken_after_the_end():
    threads = FairThreads(2, "test")
    assert threads.submit("a", divmod, 7, 2).result(WAIT_S) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.submit("a", divmod, 7, 0).result(WAIT_S)
    threads.shutdown()
    assert threads.waiting == 0
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit("a", divmod, 7, 2)
