"""Segments that the daemon has closed: a client lets go of them, and of their pages."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from kvstore.hit import TensorInfo
from kvstore.shm.arena import Arena
from kvstored_client.shm.connection import Segments, UseStream
from kvstored_client.shm.mapping import MappedSegment
from tests.kvstored.inside import daemon_inside

MIB = 1 << 20


def mapped(segment):
    return MappedSegment(segment.fd, segment.nbytes, writable=False)


def block(arena, owner):
    return arena.empty({"x": TensorInfo("uint8", (MIB + MIB // 2,))}, owner=owner)


@pytest.fixture
def arena():
    arena = Arena(4 * MIB, segment_nbytes=2 * MIB)
    yield arena
    arena.close()


def test_a_client_lets_go_of_closed_segments_when_it_is_handed_a_new_one(arena, monkeypatch):
    """Users that took turns left each client all segments there ever were: two gigabytes in twelve minutes."""
    monkeypatch.setattr(MappedSegment, "populate", lambda self: None)  # its thread holds the mapping for a moment
    segments = Segments(1)
    gone = []
    for turn in range(12):
        held = block(arena, 2001 + turn % 3)
        segment = held.place.segment
        if segment.number not in segments:
            mapping = mapped(segment)
            segments.add(segment.number, mapping)
            segments.blocks[segment.number, 0, turn] = SimpleNamespace(mapping=mapping)
            gone.append(weakref.ref(mapping))
            del mapping
        del held, segment
    assert len(gone) > 6, "segments were made anew"
    assert len(segments._mappings) <= 4
    assert {key[0] for key in segments.blocks} == set(segments._mappings)
    gc.collect()
    assert sum(ref() is not None for ref in gone) == len(segments._mappings)


def test_a_closed_segment_is_kept_while_something_of_it_is_read(arena):
    segments = Segments(1)
    held = block(arena, 2001)
    held["x"].fill_(7)
    number = held.place.segment.number
    segments.add(number, mapped(held.place.segment))
    window = segments.get(number).window(held.place.start + 64, 100, None, writable=False)
    del held
    others = [block(arena, 2002), block(arena, 2002)]
    segments.add(others[1].place.segment.number, mapped(others[1].place.segment))
    with pytest.raises(UseStream):
        segments.get(number)
    assert bytes(window.array) == b"\7" * 100


def test_a_segment_in_use_is_not_let_go_of(arena):
    segments = Segments(1)
    held = [block(arena, 2001), block(arena, 2001)]
    for one in held:
        segments.add(one.place.segment.number, mapped(one.place.segment))
    assert len(segments._mappings) == 2


def test_what_a_smaller_budget_gives_back_a_client_lets_go_of_with_a_call(monkeypatch):
    """Without being handed another segment: else a worker would keep the pages of what is no longer there."""
    monkeypatch.setattr("kvstored_client.shm.segments.LET_GO_S", 0.0)
    with daemon_inside(segment_nbytes=2 * MIB) as inside:
        client = inside.client()
        value = np.arange(MIB // 4, dtype=np.float32)
        keys = [b"%d" % i for i in range(12)]
        for key in keys:
            assert client.put(key, {"x": value}, fidelity="exact")
            assert client.get(key) is not None
        known = client._pool.segments._mappings
        assert len(known) == inside.arena.nbytes // (2 * MIB) == 12
        for key in keys[:-1]:
            inside.store.delete(key)
        assert inside.store.gather(inside.arena) == 22 * MIB
        assert np.array_equal(client.get(keys[-1]).tensors["x"], value)
        assert len(known) == inside.arena.nbytes // (2 * MIB)
