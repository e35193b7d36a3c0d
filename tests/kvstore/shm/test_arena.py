"""The arena: blocks live as long as their tensors, and nobody else can write to or cut off a segment."""

import gc
import mmap
import os

import pytest
import torch

from kvstore.arrays import describe
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.hit import TensorInfo
from kvstore.shm.arena import Arena
from kvstore.shm.layout import HEADER_NBYTES, layout
from kvstore.store import Store

MIB = 1 << 20
SPECS = {"k": TensorInfo("float32", (1000,)), "v": TensorInfo("bfloat16", (3, 5)), "none": TensorInfo("int8", (0, 2))}


@pytest.fixture
def arena():
    arena = Arena(8 * MIB, segment_nbytes=2 * MIB)
    yield arena
    arena.close()


def place_of(arena, tensors, owner):
    return arena.place_in(tensors, *layout({name: describe(name, x) for name, x in tensors.items()}), owner)


def used(arena):
    return arena.gauges()["arena_used_nbytes"]


def test_a_block_lives_as_long_as_any_tensor_over_it(arena):
    tensors = arena.empty(SPECS)
    assert used(arena) > 4000
    part = tensors["k"][10:20].view(torch.int32)
    del tensors
    gc.collect()
    assert used(arena) > 4000
    as_numpy = part.numpy()
    del part
    assert used(arena) > 4000
    del as_numpy
    assert used(arena) == 0


def test_the_place_of_an_entry_is_found_and_only_for_its_owner(arena):
    tensors = arena.empty(SPECS)
    place = place_of(arena, tensors, os.geteuid())
    assert place is not None
    assert place.segment.bytes[place.start + HEADER_NBYTES :].ctypes.data == tensors["k"].data_ptr()
    assert place_of(arena, tensors, os.geteuid() + 1) is None
    assert place_of(arena, {"k": torch.zeros(1000)}, os.geteuid()) is None
    assert place_of(arena, {"v": tensors["v"]}, os.geteuid()) is None
    assert place_of(arena, {"none": tensors["none"]}, os.geteuid()) is None


def test_users_share_no_segment(arena):
    one, two = arena.empty(SPECS, owner=1), arena.empty(SPECS, owner=2)
    assert place_of(arena, one, 1).segment is not place_of(arena, two, 2).segment


def test_the_generation_changes_before_room_is_used_again(arena):
    tensors = arena.empty(SPECS)
    place = place_of(arena, tensors, os.geteuid())
    header = place.segment.bytes[place.start : place.start + 8]
    del tensors
    assert bytes(header) == place.generation.to_bytes(8, "little")
    arena.gauges()
    assert bytes(header) == bytes(8)
    again = place_of(arena, arena.empty(SPECS), os.geteuid())
    assert again is None or again.generation > place.generation


def test_a_full_arena_says_so(arena):
    held = [arena.empty({"x": TensorInfo("uint8", (MIB,))}) for _ in range(20)]
    assert None in held
    assert arena.nbytes <= arena.limit_nbytes
    del held
    assert arena.empty({"x": TensorInfo("uint8", (MIB,))}) is not None


def test_an_entry_larger_than_a_segment_gets_one_of_its_own(arena):
    assert arena.empty({"x": TensorInfo("uint8", (5 * MIB,))}) is not None


def test_a_descriptor_holder_can_neither_write_nor_truncate_nor_map_writable(arena):
    tensors = arena.empty(SPECS)
    fd = os.dup(place_of(arena, tensors, os.geteuid()).segment.fd)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
        os.close(again)
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ).close()
    finally:
        os.close(fd)
    tensors["k"].fill_(3)  # the daemon's own mapping still writes


def test_random_churn_keeps_fragmentation_bounded():
    arena = Arena(64 * MIB, segment_nbytes=16 * MIB)
    generator = torch.Generator().manual_seed(1)
    held = []
    for _ in range(2000):
        size = int(torch.randint(64 << 10, MIB, (), generator=generator))
        while sum(x["x"].nbytes for x in held) + size > 40 * MIB:
            held.pop(int(torch.randint(0, len(held), (), generator=generator)))
        room = arena.empty({"x": TensorInfo("uint8", (size,))})
        assert room is not None, "40 of 64 MiB are live"
        held.append(room)
    assert arena.gauges()["arena_fragmentation"] < 0.8
    arena.close()


def test_a_promoted_entry_lies_in_the_arena(arena):
    config = StoreConfig(hot=HotConfig(4 * MIB), warm=WarmConfig(4 * MIB))
    with Store.open(config, background=False, room=arena.empty) as store:
        store.put(b"k", {"x": torch.randn(1000)})
        assert store.demote(b"k") == 1
        assert store.promote(b"k") == 1
        with store.lease(b"k") as hit:
            assert hit.tier == "hot"
            assert place_of(arena, hit.tensors, os.geteuid()) is not None
            del hit
