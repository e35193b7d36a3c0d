"""What every adapter promises its engine: exact bytes, a miss for what is gone, no exception, no missed deadline."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.conftest import DaemonProcess
from tests.e2e.adapters.conftest import PAGE, Handle, Pages
from tests.e2e.faults import FAULTS, Faulty

Make = Callable[..., Handle]
PATIENT = {"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0}


def pages(count: int = 3) -> Pages:
    generator = torch.Generator().manual_seed(count)
    return {f"page {i}": torch.randint(0, 256, (PAGE,), dtype=torch.uint8, generator=generator) for i in range(count)}


def test_what_was_kept_comes_back_bit_for_bit(make: Make, store: Store) -> None:
    handle, given = make(store, **PATIENT), pages()
    names = list(given)
    assert handle.held(names) == [False] * 3
    assert make(store, **PATIENT).restore(names) == [None] * 3
    first = make(store, **PATIENT)
    assert first.keep(given)
    second = make(store, **PATIENT)
    assert second.held([*names, "another"]) == [True, True, True, False]
    for page, got in zip(given.values(), second.restore(names), strict=True):
        assert got is not None and torch.equal(got, page)


def test_what_is_gone_is_a_miss_and_the_others_are_not(make: Make, store: Store) -> None:
    given = pages()
    assert make(store, **PATIENT).keep(given)
    gone = next(iter(store.entries())).key
    store.evict(gone)
    found = make(store, **PATIENT).restore(list(given))
    assert sum(page is None for page in found) == 1
    for name, page in zip(given, found, strict=True):
        assert page is None or torch.equal(page, given[name])


ONE_COPY = ("SGLang", "SGLangV1", "SGLangV2", "LMCacheL2", "VLLMTier")
"""Adapters of engines that keep their own pages in host memory: each byte is copied once a way."""


def test_pages_lie_in_the_memory_shared_with_the_daemon_from_their_only_copy_on(
    make: Make, daemon: DaemonProcess
) -> None:
    """What a client copies itself, into shared memory or out of it, would be a second copy."""
    client = daemon.client()
    handle, given = make(client, **PATIENT), pages()
    if type(handle).__name__ not in ONE_COPY:
        pytest.skip("puts what it has gathered elsewhere")
    assert client._pool is not None
    copied: list[int] = []
    copy = client._pool.copier.copy

    def counting(target: Any, source: Any) -> None:
        copied.append(source.size)
        copy(target, source)

    client._pool.copier.copy = counting  # type: ignore[method-assign]
    assert handle.keep(given)
    for page, got in zip(given.values(), handle.restore(list(given)), strict=True):
        assert got is not None and torch.equal(got, page)
    assert sum(n >= PAGE for n in copied) == 0
    client.close()


def test_keeping_twice_changes_nothing(make: Make, store: Store) -> None:
    given = pages()
    handle = make(store, **PATIENT)
    assert handle.keep(given)
    count = len(list(store.entries()))
    assert handle.keep(given)
    assert len(list(store.entries())) == count


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_miss_and_waits_for_nobody(make: Make, store: Store, fault: str) -> None:
    """A slow cache takes half a minute for each answer: a call that waited for one would take as long."""
    given = pages()
    names = list(given)
    assert make(store, **PATIENT).keep(given)
    faulty = Faulty(store, fault, slow_s=30)
    handle = make(faulty, fetch_timeout_s=0.2)
    start = time.monotonic()
    handle.held(names)
    assert handle.restore(names) == [None] * 3
    handle.keep({"other": given["page 0"]})
    assert time.monotonic() - start < 15
    faulty.gate.set()


def test_the_deadline_of_a_lookup_is_50_ms_where_nothing_else_is_said(make: Make, store: Store) -> None:
    handle = make(store)
    assert (handle.guard.lookup_timeout_s, handle.guard.fetch_timeout_s) == (0.05, 2.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_killed_or_stopped_after_the_lookup_is_a_miss(
    make: Make, daemon: DaemonProcess, number: signal.Signals
) -> None:
    given = pages()
    names = list(given)
    assert make(daemon.client(on_error="miss"), **PATIENT).keep(given)
    handle = make(daemon.client(on_error="miss"), lookup_timeout_s=20.0, fetch_timeout_s=0.2)
    assert handle.held(names) == [True] * 3
    daemon.signal(number)
    if number == signal.SIGKILL:
        assert daemon.process is not None
        daemon.process.wait(20)
    handle.guard.lookup_timeout_s = 0.05
    try:
        assert handle.restore(names) == [None] * 3
        assert not any(handle.held(["another", *names]))
        handle.keep({"other": given["page 0"]})
    finally:
        if number == signal.SIGSTOP:
            daemon.signal(signal.SIGCONT)


def test_a_put_given_up_does_not_keep_what_the_engine_wrote_afterwards(make: Make, store: Store) -> None:
    given = pages(1)
    slow = Faulty(store, "slow", slow_s=60)
    handle = make(slow, fetch_timeout_s=0.1)
    handle.keep(given)
    reused: Any = getattr(handle, "memory", None)
    if isinstance(reused, bytearray):
        reused[:] = bytes(len(reused))
    elif reused is not None:
        reused.zero_()
    pool = getattr(handle, "pool", None)
    if pool is not None:
        pool.memory.zero_()
    slow.gate.set()
    for _ in range(slow.calls):
        assert slow.answered.acquire(timeout=60)
    (found,) = make(store, **PATIENT).restore(list(given))
    assert found is None or torch.equal(found, given["page 0"])
