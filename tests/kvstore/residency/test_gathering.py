"""What a smaller budget leaves in shared memory is moved together, and the segments that run empty are given back."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.arrays import CheckedSpecs
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import ArrivingTensors, Entry
from kvstore.keys import Key
from kvstore.options import PutOptions
from kvstore.residency import gathering
from kvstore.residency.placing import place_of
from kvstore.residency.transcode import made_entry
from kvstore.shm.arena import Arena, Place, Segment
from kvstore.store import Store
from tests.conftest import wait_until

MIB = 1 << 20
ENTRIES = 24


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Segments in which three entries of 1 MiB fit."""
    arena = Arena(48 * MIB, segment_nbytes=4 * MIB)
    yield arena
    arena.close()


@pytest.fixture
def store(arena: Arena) -> Iterator[Store]:
    config = StoreConfig(hot=HotConfig(40 * MIB), warm=WarmConfig(0))
    with Store.open(config, background=False, framework="numpy", room=arena.empty) as made:
        yield made


def value(i: int) -> Any:
    return np.full(MIB // 4, i, dtype=np.float32)


def put(store: Store, arena: Arena, i: int) -> None:
    """As a door does: in a block of the arena."""
    spec = TensorSpec("float32", (MIB // 4,))
    room = arena.empty({"x": spec})
    assert room is not None
    room["x"].fill_(i)
    assert store.put_entries([made_entry(key(i), CheckedSpecs({"x": spec}), room)], PutOptions())


def key(i: int) -> Key:
    return Key(b"%d" % i)


def fill(store: Store, arena: Arena) -> None:
    """Used last is one of each three that lie together: they are what stays."""
    for i in range(ENTRIES):
        put(store, arena, i)
    store.touch([key(i) for i in range(0, ENTRIES, 3)])


def held(store: Store) -> list[int]:
    found = {i: store.get(key(i)) for i in range(ENTRIES)}
    for i, hit in found.items():
        assert hit is None or np.array_equal(hit.tensors["x"], value(i))
    return [i for i, hit in found.items() if hit is not None]


def segment_of(store: Store, i: int) -> Segment:
    entry = store._r.hot.get(key(i))
    assert entry is not None
    place = place_of(entry)
    assert place is not None
    return place.segment


def test_a_smaller_budget_gives_its_shared_memory_back(store: Store, arena: Arena) -> None:
    fill(store, arena)
    assert arena.nbytes == 32 * MIB
    store.set_hot_capacity(9 * MIB)
    assert arena.nbytes == 32 * MIB, "an entry is left in each segment"
    shared = resident_kib()
    assert store.gather(arena) == 20 * MIB
    assert arena.nbytes == 12 * MIB
    assert shared - resident_kib() > 0.9 * 20 * 1024
    assert held(store) == list(range(0, ENTRIES, 3))
    assert store.gather(arena) == 0
    put(store, arena, 1)
    assert held(store) == [1, *range(3, ENTRIES, 3)], "there is room for puts"


def resident_kib() -> int:
    found = re.search(r"RssShmem:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def test_what_is_leased_stays_where_it_is_with_its_segment(store: Store, arena: Arena) -> None:
    fill(store, arena)
    with store.lease(key(1)) as hit:
        assert hit is not None
        view = hit.tensors["x"]
        segment = segment_of(store, 1)
        store.touch([key(i) for i in range(0, ENTRIES, 3)])
        store.set_hot_capacity(9 * MIB)
        assert store.get(key(1)) is None
        store.delete(key(0))
        store.gather(arena)
        assert not segment.closed, "nothing else lies in it"
        assert np.array_equal(view, value(1))
        del view, hit
    store.gather(arena)
    assert segment.closed
    assert held(store) == list(range(3, ENTRIES, 3))


@pytest.mark.parametrize("what", ["put", "delete"])
def test_what_changes_while_bytes_are_copied_is_not_undone(
    store: Store, arena: Arena, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fill(store, arena)
    store.set_hot_capacity(9 * MIB)
    copy = gathering._beside

    def and_then(entry: Any, to: Arena) -> Any:
        made = copy(entry, to)
        if entry.key == key(3) and what == "put":
            store.put(key(3), {"x": value(77)})
        elif entry.key == key(3):
            store.delete(key(3))
        return made

    monkeypatch.setattr(gathering, "_beside", and_then)
    store.gather(arena)
    hit = store.get(key(3))
    assert hit is None if what == "delete" else hit is not None and np.array_equal(hit.tensors["x"], value(77))


def test_nothing_is_put_into_a_segment_that_is_leaving(store: Store, arena: Arena) -> None:
    fill(store, arena)
    store.set_hot_capacity(9 * MIB)
    with arena.thinning() as leaving:
        assert leaving
        made = [arena.empty({"x": TensorSpec("uint8", (MIB,))}) for _ in range(8)]
        assert all(one is None or (one.place is not None and one.place.segment not in leaving) for one in made)
        assert arena.empty({"x": TensorSpec("uint8", (3 * MIB,))}, grow=False) is None


def test_what_fits_no_hole_stays(arena: Arena) -> None:
    """By bytes there is room in the rest, but in no hole for the whole."""
    spec = {"x": TensorSpec("uint8", (MIB * 3 // 2,))}
    config = StoreConfig(hot=HotConfig(40 * MIB), warm=WarmConfig(0))
    with Store.open(config, background=False, framework="numpy", room=arena.empty) as store:
        kept = [arena.empty(spec) for _ in range(6)]
        assert all(kept)
        before = arena.nbytes
        del kept[0]
        assert store.gather(arena) == 0
        assert arena.nbytes == before


def test_each_user_s_segments_are_its_own(arena: Arena) -> None:
    """What one has left is no room for another one's blocks."""
    small = {"x": TensorSpec("uint8", (MIB,))}
    first, second = ([arena.empty(small, owner) for _ in range(4)] for owner in (1, 2))
    with arena.thinning() as leaving:
        assert not leaving, "three of four fill a segment"
    del first[0]
    with arena.thinning() as leaving:
        assert [segment.owner for segment in leaving] == [1]
    assert all(second)


def test_torch_sees_the_moved_copy_alike(store: Store, arena: Arena) -> None:
    fill(store, arena)
    before = {i: store._r.hot.get(key(i)) for i in range(0, ENTRIES, 3)}
    store.set_hot_capacity(9 * MIB)
    store.gather(arena)
    moved = 0
    for i, old in before.items():
        new = store._r.hot.get(key(i))
        assert old is not None
        assert new is not None
        moved += new is not old
        assert (new.nbytes, new.encoding, new.specs) == (old.nbytes, old.encoding, old.specs)
        assert torch.equal(new.tensors["x"].parts[""], old.tensors["x"].parts[""])
    assert moved == 5


def test_what_was_written_to_the_disk_is_kept_in_memory_no_longer(arena: Arena, tmp_path: Path) -> None:
    """The thread that writes held the last batch until there was another one: up to 32 MiB, for a minute and more."""
    config = StoreConfig(hot=HotConfig(40 * MIB), warm=WarmConfig(0), cold=ColdConfig(path=str(tmp_path)))
    with Store.open(config, background=False, framework="numpy", room=arena.empty) as store:
        for i in range(6):
            put(store, arena, i)
        store.set_hot_capacity(2 * MIB)
        store.drain()
        wait_until(lambda: arena.used_nbytes < 2 * MIB)
        assert held(store) == list(range(6))


def test_what_moves_to_shared_memory_is_not_undone_either(store: Store, arena: Arena) -> None:
    """As above, for what warm holds: put anew while it is copied."""
    store.set_warm_capacity(8 * MIB)
    x = {"x": np.random.default_rng(0).standard_normal(2 * MIB, dtype=np.float32)}
    store.put(key(0), x)
    store.demote(key(0))
    entry = store._r.warm.get(key(0))
    assert entry is not None
    store.delete(key(0))
    moved = store.move_encoded(entry, arena, 2001)
    assert moved is not None
    assert store.get(key(0)) is None
    assert isinstance(moved.block, Place)
    assert moved.block.segment.owner == 2001
    assert moved.nbytes == entry.nbytes


def test_bytes_that_are_still_on_their_way_are_not_waited_for_under_the_lock(store: Store, arena: Arena) -> None:
    spec = CheckedSpecs({"x": TensorSpec("float32", (MIB // 4,))})

    def copy() -> dict[str, torch.Tensor]:
        pytest.fail("the copy was made for somebody who only looks")

    fill(store, arena)
    store.put_entries([Entry(key(99), ArrivingTensors(spec, copy))], PutOptions())
    store.delete(key(0), key(3), key(6), key(9))
    assert store.gather(arena) > 0
