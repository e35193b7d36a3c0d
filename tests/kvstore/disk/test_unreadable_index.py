"""The index while LMDB refuses every call, as it does after a meta page could not be written: misses, no exception.

A put that came while the disk failed met LMDB's refusal, and its caller an internal error.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

import kvstore.disk.rows
from kvstore.disk.rows import Rows
from kvstore.entries.entry import Entry
from kvstore.errors import OverQuota, TierUnavailable
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from tests.kvstore.disk.test_rows import KEY, row_of
from tests.kvstore.tiers.test_cold import MIB, Holder, filled, key, raw


class Refusing:
    """LMDB's environment whose next meta page cannot be written: it refuses every transaction from then on.

    met: called at each refusal; if given, that write has happened.
    """

    def __init__(self, env: lmdb.Environment, met: Callable[[], object] | None) -> None:
        self._env, self._met, self._fatal = env, met, met is not None

    def begin(self, *, db: Any, write: bool = False) -> Any:
        self._fatal |= write
        if not self._fatal:
            return self._env.begin(db=db)
        if self._met is not None:
            self._met()
        raise lmdb.PanicError("Update of meta page failed or environment had fatal error")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def refuse(rows: Rows, met: Callable[[], object] | None = None) -> None:
    assert rows._opened is not None
    env, db = rows._opened
    rows._opened = Refusing(env, met), db  # type: ignore[assignment]


@contextmanager
def unopenable() -> Iterator[None]:
    """The disk does not let the file be opened either."""

    def fails(*_: object, **__: object) -> lmdb.Environment:
        raise lmdb.DiskError("injected")

    real = kvstore.disk.rows.lmdb.open
    kvstore.disk.rows.lmdb.open = fails
    try:
        yield
    finally:
        kvstore.disk.rows.lmdb.open = real


def test_a_reader_that_comes_before_the_file_is_opened_again_waits_for_it(tmp_path: Path) -> None:
    rows = Rows(tmp_path, 1 << 20)
    rows.write({KEY: row_of(7)}, [])
    met = threading.Event()
    refuse(rows, met.set)
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(rows.get(KEY)))
    reader.start()
    assert met.wait(30)
    with pytest.raises(lmdb.PanicError):
        rows.write({}, [KEY])
    rows.reopen()
    reader.join(30)
    assert found == [row_of(7)]
    assert rows.get(KEY) == row_of(7)
    rows.close()


def test_a_file_that_cannot_be_opened_again_is_refused_and_opened_later(tmp_path: Path) -> None:
    rows = Rows(tmp_path, 1 << 20)
    rows.write({KEY: row_of(7)}, [])
    map_nbytes = rows.map_nbytes
    refuse(rows)
    with unopenable(), pytest.raises(lmdb.DiskError):
        rows.reopen()
    assert not rows.readable
    assert rows.check_readers() == 0
    for call in (lambda: rows.get(KEY), lambda: rows.write({}, [KEY]), rows.sync, lambda: rows.of_segment(2)):
        with pytest.raises(lmdb.Error, match="could not be opened again"):
            call()
    rows.reopen()
    assert rows.readable
    assert (rows.get(KEY), rows.map_nbytes) == (row_of(7), map_nbytes)
    rows.close()


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """Six records on disk, and a writer that tries again at once."""
    monkeypatch.setattr("kvstore.disk.writer.PAUSE_MIN_S", 0.001)
    monkeypatch.setattr("kvstore.disk.writer.PAUSE_MAX_S", 0.001)
    holder = Holder(tmp_path / "cold")
    for n in range(6):
        holder.put(key(n), n, nbytes=20_000)
    holder.cold.flush()
    yield holder
    holder.cold.close()


def unreadable(holder: Holder) -> None:
    """The next write fails, and opening the file again does."""
    refuse(holder.cold._records._rows)
    holder.put(key(100), 100)
    with holder.cold._changed:
        assert holder.cold._changed.wait_for(lambda: not holder.cold._records.readable, 30)


def true_sums(holder: Holder) -> None:
    """What is counted is what a restart finds."""
    holder.cold.flush()
    used, tenants = holder.cold.used_nbytes, holder.cold.tenants()
    holder.reopen()
    assert (holder.cold.used_nbytes, holder.cold.tenants()) == (used, tenants)


def test_verbs_while_the_index_cannot_be_read(held: Holder) -> None:
    cold = held.cold
    with unopenable():
        unreadable(held)
        # Misses, and nothing is taken for damage.
        assert cold.get(key(1)) is None
        assert cold.specs_of(key(1)) is None
        assert filled(cold.get(key(100))) == 100
        assert cold.stats().counters.corrupt_total == 0
        assert cold.stats().counters.read_errors == 2
        # A put in place of an older entry, and a deletion, are kept until they can be written.
        cold.put(entry_of(held, key(2), 22))
        assert filled(cold.get(key(2))) == 22
        ticket = cold.queue_removal(key(3))
        assert ticket is not None
        assert cold.get(key(3)) is None
        # A put of a new key that is taken back was never on the disk, but nobody knows that now.
        cold.put(entry_of(held, key(101), 1))
        assert cold.queue_removal(key(101)) is not None
        # Sizes are not known: what needs one says so and changes nothing.
        for verb in (
            lambda: cold.nbytes_of(key(1)), lambda: cold.pin(key(1)), lambda: cold.row_of(key(1)),
            lambda: cold.raw(key(1)), lambda: cold.let_go([key(1)]), lambda: cold.displace(entry_of(held, key(102), 1)),
        ):  # fmt: skip
            with pytest.raises(TierUnavailable, match="index cannot be read"):
                verb()
        cold.touch([key(1)])
        cold.maintain()
        held.dropped.clear()
        assert cold.resize(1, 1) == 0, "nothing is evicted for room that nobody can count"
        assert held.dropped == []
        cold.resize(64 * MIB, 32 * MIB)
    cold.wait(ticket)
    cold.flush()
    cold.flush_meta()
    found = {n: filled(cold.get(key(n))) for n in (0, 1, 2, 3, 4, 5, 100, 101)}
    assert found == {0: 0, 1: 1, 2: 22, 3: None, 4: 4, 5: 5, 100: 100, 101: None}
    true_sums(held)
    assert {n: filled(held.cold.get(key(n))) for n in found} == found


def test_a_file_that_was_refused_is_opened_again_also_where_the_writer_only_reads_it(held: Holder) -> None:
    """What left while the file was refused has no price: to ask for it came before each write, so none opened it again.

    Seen in a soak: puts in place of older values waited without end.
    """
    refuse(held.cold._records._rows, lambda: None)
    ticket = held.cold.queue_removal(key(3))
    assert ticket is not None
    held.cold.wait(ticket)
    held.put(key(102), 102)
    held.cold.flush()
    assert (held.cold.get(key(3)), filled(held.cold.get(key(102))), filled(held.cold.get(key(1)))) == (None, 102, 1)
    true_sums(held)


def entry_of(holder: Holder, name: Key, fill: int) -> Entry:
    """An entry whose Meta the store has, to be put."""
    now = holder.clock.now()
    holder.metas[name] = Meta(now, now + 3600.0, 3600.0, 20_000)
    return Entry(name, {"x": raw(torch.full((20_000,), fill, dtype=torch.uint8))})


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_cannot_be_read_now_and_then(held: Holder, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few reads fail: no lie, no loss of what was answered for, and the sums come out right."""
    rng = random.Random(seed)
    real = Rows.get

    def now_and_then(rows: Rows, name: Key) -> object:
        if rng.random() < 0.3:
            raise lmdb.PanicError("injected")
        return real(rows, name)

    cold = held.cold
    model = {n: n for n in range(6)}
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "get", now_and_then)
        for turn in range(200):
            n, verb = rng.randrange(8), rng.randrange(7)
            with suppress(TierUnavailable, OverQuota):
                if verb < 2:
                    cold.put(entry_of(held, key(n), turn))
                    model[n] = turn
                elif verb == 2:
                    cold.queue_removal(key(n))
                    held.metas.pop(key(n), None)
                    model.pop(n, None)
                elif verb == 3:
                    cold.pin(key(n))
                elif verb == 4:
                    cold.unpin(key(n))
                elif verb == 5:
                    cold.take_back(cold.let_go([key(n)]))
                else:
                    cold.flush()
            assert filled(cold.get(key(n))) in (None, model.get(n)), f"turn {turn}"
    cold.flush()
    for n in range(8):
        cold.unpin(key(n))
    assert {n: filled(cold.get(key(n))) for n in range(8)} == {n: model.get(n) for n in range(8)}
    assert cold.stats().counters.corrupt_total == 0
    true_sums(held)
