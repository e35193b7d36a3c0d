"""What every adapter promises its engine: exact bytes, a miss for what is gone, no exception, no missed deadline."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters.conftest import PAGE, Handle, Pages
from tests.e2e.faults import FAULTS, SLOW_S, Faulty

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


def test_keeping_twice_changes_nothing(make: Make, store: Store) -> None:
    given = pages()
    handle = make(store, **PATIENT)
    assert handle.keep(given)
    count = len(list(store.entries()))
    assert handle.keep(given)
    assert len(list(store.entries())) == count


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_miss_within_the_deadlines(make: Make, store: Store, fault: str) -> None:
    given = pages()
    names = list(given)
    assert make(store, **PATIENT).keep(given)
    handle = make(Faulty(store, fault), fetch_timeout_s=0.2)
    start = time.monotonic()
    handle.held(names)
    assert time.monotonic() - start < SLOW_S / 2
    start = time.monotonic()
    found = handle.restore(names)
    assert time.monotonic() - start < SLOW_S / 2
    assert found == [None] * 3
    start = time.monotonic()
    handle.keep({"other": given["page 0"]})
    assert time.monotonic() - start < SLOW_S / 2


def test_a_put_given_up_does_not_keep_what_the_engine_wrote_afterwards(make: Make, store: Store) -> None:
    given = pages(1)
    handle = make(Faulty(store, "slow", slow_s=0.6), fetch_timeout_s=0.1)
    handle.keep(given)
    reused: Any = getattr(handle, "memory", None)
    if isinstance(reused, bytearray):
        reused[:] = bytes(len(reused))
    pool = getattr(handle, "pool", None)
    if pool is not None:
        pool.memory.zero_()
    time.sleep(0.8)  # the slow cache's own time
    (found,) = make(store, **PATIENT).restore(list(given))
    assert found is None or torch.equal(found, given["page 0"])
