"""Shared blocks of a segment: what is given back, and when."""

import random

import numpy as np
import pytest

from kvstore.disk.occupancy import ALIGN_NBYTES, BLOCK_NBYTES, SHARED_BELOW_NBYTES, Occupancy, align_of, place_nbytes


def laid_out(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Places of records of mixed sizes, one behind the other."""
    places, at = [], 0
    for _ in range(count):
        nbytes = rng.choice([400, 4800, 5000, 64 << 10, 100_000, rng.randrange(300, 200_000)])
        at += -at % align_of(nbytes)
        places.append((at, nbytes))
        at += place_nbytes(nbytes)
    return places


def touched(places: list[tuple[int, int]]) -> set[int]:
    return {
        block
        for offset, nbytes in places
        for block in range(offset // BLOCK_NBYTES, -(-(offset + nbytes) // BLOCK_NBYTES))
    }


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_blocks_that_nothing_touches_are_given_back(seed: int) -> None:
    rng = random.Random(seed)
    live = laid_out(rng, 60)
    blocks = Occupancy()
    for place in live:
        blocks.add(*place)
    held = touched(live)
    rng.shuffle(live)
    while live:
        leaving = live.pop()
        offset, nbytes = blocks.remove(*leaving)
        assert offset <= leaving[0] < leaving[0] + leaving[1] <= offset + nbytes
        assert not any(offset < start + n and start < offset + nbytes for start, n in live)
        given = set(range(-(-offset // BLOCK_NBYTES), (offset + nbytes) // BLOCK_NBYTES))
        assert given == held - touched(live)
        held -= given
        assert blocks.count == len(held)
        assert blocks.live_nbytes == sum(place_nbytes(nbytes) for _, nbytes in live)
    assert (blocks.count, blocks.slack_nbytes) == (0, 0)


def test_a_start_counts_what_the_process_before_it_counted() -> None:
    rng = random.Random(7)
    live = laid_out(rng, 80)[::2]
    counted = Occupancy()
    for place in live:
        counted.add(*place)
    found = Occupancy()
    gaps = found.recover(np.array(live, np.int64))
    assert (found.count, found.live_nbytes) == (counted.count, counted.live_nbytes)
    held = touched(live)
    free = {b for offset, nbytes in gaps for b in range(offset // BLOCK_NBYTES, (offset + nbytes) // BLOCK_NBYTES)}
    assert free == set(range(max(held) + 1)) - held
    for place in live:
        assert found.remove(*place) == counted.remove(*place)


def test_records_of_blocks_of_their_own_are_a_special_case() -> None:
    # As the first format laid them out: every one at a block, small ones too.
    blocks = Occupancy()
    blocks.recover(np.array([(0, 4800), (8192, 300), (12288, 100_000)], np.int64))
    assert blocks.remove(0, 4800) == (0, 8192)
    assert blocks.remove(8192, 300) == (8192, 4096)


def test_small_records_lose_little_and_large_ones_lose_a_block_at_most() -> None:
    assert place_nbytes(4800) == 4800
    assert place_nbytes(4801) - 4801 < ALIGN_NBYTES
    assert place_nbytes(SHARED_BELOW_NBYTES + 1) - SHARED_BELOW_NBYTES == BLOCK_NBYTES


def test_a_block_that_two_records_share_far_into_a_segment_is_kept_for_the_second() -> None:
    """The table of blocks grows with the segment, however far it has grown before."""
    blocks = Occupancy()
    for at in (0, 5000 * BLOCK_NBYTES, 20_000 * BLOCK_NBYTES):
        first, second = (at, 400), (at + place_nbytes(400), 400)
        blocks.add(*first)
        blocks.add(*second)
        before = blocks.count
        start, nbytes = blocks.remove(*first)
        assert start + nbytes <= second[0], "the second record's bytes would read as zeros"
        assert blocks.count == before
        assert blocks.remove(*second) == (at, BLOCK_NBYTES)
        assert blocks.count == before - 1
    assert blocks.live_nbytes == blocks.slack_nbytes == 0
