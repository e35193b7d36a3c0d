"""The guard's promises: nothing raises, nothing outlasts its deadline, and a put is never lost silently."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, EntryTooLarge, InvalidEntry, PermissionDenied, RecordCorrupt
from kvstore.keys import Identity
from kvstore.prefix import Namespace
from kvstore.store import Store
from kvstored_client.breaker import Breaker
from kvstored_client.integrations.guard import Guard, guarded


class Scripted:
    """A cache that answers with what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def verb(*_: Any, **__: Any) -> Any:
            self.calls += 1
            return self.answer()

        return verb


def fail() -> None:
    raise RuntimeError("broken")


def verbs(guard: Guard) -> list[Any]:
    """Every verb once, in a list of what a miss looks like."""
    return [
        guard.get(b"k"),
        guard.get_many([b"a", b"b"]),
        guard.get_many([b"a", b"b"], leading=True),
        int(guard.match([b"a"])),
        guard.locate([b"a", b"b"]),
        guard.touch([b"a"]),
        guard.delete(b"a"),
        guard.put_many([(b"a", {})]),
    ]


MISSES = [None, [None, None], [], 0, [None, None], 0, 0, 0]


def test_what_a_cache_raises_is_a_miss() -> None:
    guard = Guard(Scripted(fail))
    assert verbs(guard) == MISSES
    assert guard.failures > 0


def test_no_verb_outlasts_its_deadline_and_after_three_the_cache_is_left_alone() -> None:
    release = threading.Event()
    cache = Scripted(release.wait)
    guard = Guard(cache, lookup_timeout_s=0.05, fetch_timeout_s=0.1)
    guard._breaker = Breaker(clock=lambda: 0.0)  # its pause must not end because the machine pauses
    start = time.monotonic()
    assert verbs(guard) == MISSES
    # Without a deadline they would wait for what comes after: the bound is for a busy machine.
    assert time.monotonic() - start < 20
    calls = cache.calls
    # Three calls are waited for; the breaker answers the others, and this one, without asking.
    assert guard.match([b"a"]) == 0
    assert cache.calls == calls
    release.set()


def test_a_late_answer_is_not_given_to_a_later_call() -> None:
    release = threading.Event()
    guard = Guard(Scripted(lambda: None), lookup_timeout_s=0.1)
    assert guard.call(lambda: release.wait(60) and "late", 0.05, "miss") == "miss"
    release.set()
    assert guard.call(lambda: "second", 60.0, "miss") == "second"


def test_a_put_is_done_later_and_flush_waits_for_it() -> None:
    with Store.open() as store:
        guard = guarded(store)
        assert guarded(guard) is guard
        assert guard.later(lambda: guard.cache.put(b"k", {"x": torch.ones(4)}), 16)
        assert guard.flush()
        hit = guard.get(b"k")
        assert hit is not None and hit.tensors["x"].eq(1).all()


def test_puts_over_the_limit_are_dropped_and_counted() -> None:
    release = threading.Event()
    guard = Guard(Scripted(lambda: None), waiting_max_nbytes=100)
    assert guard.later(release.wait, 60)
    assert not guard.later(lambda: None, 60)
    assert guard.dropped == 1
    assert not guard.flush(0.01)
    release.set()
    assert guard.flush()
    assert guard.later(lambda: None, 1000)  # larger than the limit, but alone
    assert guard.flush()


def test_a_put_that_raises_is_counted_and_the_next_one_is_done() -> None:
    guard = Guard(Scripted(lambda: None))
    done: list[int] = []
    guard.later(fail, 1)
    guard.later(lambda: done.append(1), 1)
    assert guard.flush()
    assert (guard.dropped, done) == (1, [1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    guard = Guard(Scripted(lambda: 7), lookup_timeout_s=10)
    assert guard.touch([b"a"]) == 7
    child = os.fork()
    if child == 0:
        os._exit(0 if guard.touch([b"a"]) == 7 and guard.later(lambda: None, 1) and guard.flush() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("error", [InvalidEntry, EntryTooLarge, ConfigError, PermissionDenied])
def test_a_caller_s_error_is_a_miss_and_never_opens_the_breaker_for_others(error: type[Exception]) -> None:
    def refuse() -> None:
        raise error("over a limit")

    cache = Scripted(refuse)
    guard = Guard(cache, lookup_timeout_s=20)
    for _ in range(10):
        assert guard.match([b"a"]) == 0
        assert guard.later(cache.put, 1)
    assert guard.flush()
    assert (guard.failures, guard.refused, guard.dropped) == (0, 20, 10)
    cache.answer = lambda: 1
    assert guard.match([b"a"]) == 1


def test_the_cache_s_own_errors_open_the_breaker_as_before() -> None:
    guard = Guard(cache := Scripted(fail), lookup_timeout_s=20)
    for _ in range(3):
        guard.match([b"a"])
    cache.answer = lambda: 1
    assert guard.match([b"a"]) == 0
    assert (guard.failures, guard.refused) == (3, 0)


@pytest.mark.parametrize("name", ["lookup_timeout_s", "fetch_timeout_s"])
def test_a_deadline_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Guard(Scripted(lambda: None), **{name: 0.0})


class Leasing:
    """A cache whose leases say when they began and ended, and in which thread. gate: opened, they begin."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ended = threading.Semaphore(0)
        self.said: list[str] = []
        self.end: Exception | None = None

    @contextmanager
    def lease_many(self, keys: list[bytes], **_: Any) -> Iterator[Iterator[str]]:
        self.gate.wait(60)
        self.said.append(f"began in {threading.current_thread().name}")
        try:
            yield iter([f"hit of {key.decode()}" for key in keys])
        finally:
            self.said.append(f"ended in {threading.current_thread().name}")
            self.ended.release()
        if self.end is not None:
            raise self.end

    def locate(self, keys: list[bytes]) -> list[None]:
        return [None] * len(keys)


def test_a_lease_begins_within_the_deadline_and_ends_where_it_is_read() -> None:
    cache = Leasing()
    cache.gate.set()
    guard = Guard(cache)
    with guard.lease_many([b"a", b"b"]) as hits:
        assert hits == ["hit of a", "hit of b"]
        assert cache.said == ["began in kvstored-guard"]
    assert cache.said[1:] == [f"ended in {threading.current_thread().name}"]


def test_a_lease_that_comes_too_late_is_a_miss_and_is_given_back() -> None:
    cache = Leasing()
    guard = Guard(cache, fetch_timeout_s=0.05)
    with guard.lease_many([b"a", b"b"]) as hits:
        assert hits == [None, None]
    with guard.lease_many([b"a"], leading=True) as hits:
        assert hits == []
    cache.gate.set()
    assert cache.ended.acquire(timeout=60)
    assert cache.ended.acquire(timeout=60)
    assert cache.said.count("ended in kvstored-guard") == 2


def test_who_reads_a_lease_hears_that_it_ended_too_early() -> None:
    cache = Leasing()
    cache.gate.set()
    cache.end = RecordCorrupt("used again")
    with pytest.raises(RecordCorrupt), Guard(cache).lease_many([b"a"]):
        pass


def test_a_prefix_is_filled_out_of_the_cache_s_own_memory() -> None:
    """No copy stands between: what is read lies where the store holds it."""
    fields = {"model": "m", "revision": "r", "dtype": "float32", "layers": 2, "kv_heads": 3, "head_dim": 4}
    store = Store.open(StoreConfig())
    guard = Guard(store, lookup_timeout_s=60, fetch_timeout_s=60)
    read: list[int] = []
    fill = guard.fill
    guard.fill = lambda pairs: (read.extend(x.data_ptr() for _, x in pairs), fill(pairs))[1]  # type: ignore[method-assign]
    space = Namespace(guard, Identity(**fields, layout="lthd", fidelity="exact"), 4)  # type: ignore[arg-type]
    k, v = torch.randn(2, 10, 3, 4), torch.randn(2, 10, 3, 4)
    space.put_prefix(list(range(10)), k, v)
    with store.lease(space.keys(list(range(10)))[0]) as hit:
        assert hit is not None
        held = hit.tensors["k"].data_ptr()
    wide = [torch.full((2, 3, 12, 4), -1.0) for _ in range(2)]
    assert space.fill_prefix([*range(10), 99], *(x.transpose(1, 2) for x in wide)) == 10
    assert held in read
    for x, due in zip(wide, (k, v), strict=True):
        assert torch.equal(x[:, :, :10].transpose(1, 2), due)
        assert (x[:, :, 10:] == -1).all()
    assert space.fill_prefix([5, 6, 7], *(x.transpose(1, 2) for x in wide)) == 0
    store.close()
