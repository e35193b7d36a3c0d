"""Room in a segment: blocks never overlap, and what is given back becomes whole again."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.hit import TensorInfo
from kvstore.shm.freelist import FreeList
from kvstore.shm.layout import ALIGN, HEADER_NBYTES, layout

SIZE = 1 << 16


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 10)), max_size=60))
def test_blocks_never_overlap_and_free_room_joins_again(steps):
    free = FreeList(SIZE)
    held = {}
    for nbytes, drop in steps:
        start = free.take(nbytes)
        if start is not None:
            assert start % ALIGN == 0
            assert start + nbytes <= SIZE
            assert all(start + max(nbytes, 1) <= s or s + max(n, 1) <= start for s, n in held.items())
            assert free.holds(start)
            held[start] = nbytes
        if drop < 4 and held:
            victim = sorted(held)[drop % len(held)]
            del held[victim]
            free.give(victim)
    for start in held:
        free.give(start)
    assert free.used_nbytes == 0
    assert free.largest_nbytes == SIZE


def test_the_smallest_hole_that_fits_is_taken():
    free = FreeList(SIZE)
    starts = [free.take(n) for n in (1024, 64, 512, 64, 2048, 64)]
    for i in (0, 2, 4):
        free.give(starts[i])
    assert free.take(500) == starts[2]
    assert free.take(1000) == starts[0]
    assert free.take(SIZE) is None


def test_tensors_lie_behind_the_header_each_on_a_cache_line():
    places, nbytes = layout(
        {"a": TensorInfo("uint8", (65,)), "b": TensorInfo("float32", ()), "c": TensorInfo("int8", (0,))}
    )
    assert places == {"a": (HEADER_NBYTES, 65), "b": (HEADER_NBYTES + 128, 4), "c": (HEADER_NBYTES + 192, 0)}
    assert nbytes == HEADER_NBYTES + 192
