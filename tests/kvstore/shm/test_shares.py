"""The arena among users: what one has left another one gets, in memory that the first one cannot read."""

from collections.abc import Iterator

import pytest

from kvstore.hit import TensorInfo
from kvstore.shm.arena import REFUSED_S, Arena, BlockTensors

MIB = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def arena(clock: Clock) -> Iterator[Arena]:
    arena = Arena(8 * MIB, segment_nbytes=2 * MIB, clock=clock)
    yield arena
    arena.close()


def block(arena: Arena, owner: int, nbytes: int = MIB + MIB // 2) -> BlockTensors | None:
    return arena.empty({"x": TensorInfo("uint8", (nbytes,))}, owner=owner)


def place(block: BlockTensors | None) -> tuple[int, int]:
    """(number of the segment, its owner)"""
    assert block is not None
    assert block.place is not None
    return block.place.segment.number, block.place.segment.owner


def test_a_segment_whose_contents_are_gone_makes_room_for_another_user(arena: Arena) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    segments = [one.place.segment for one in held if one is not None and one.place is not None]
    assert block(arena, 2002) is None, "the first user holds all of it"
    held.clear()
    made = block(arena, 2002)
    assert place(made) == (5, 2002), "a new one, under a number of its own"
    assert segments[0].closed
    assert arena.nbytes <= arena.limit_nbytes


def test_what_was_written_before_is_not_in_the_segment_that_is_made_anew(arena: Arena) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    for one in held:
        assert one is not None
        one["x"].fill_(7)
    del one
    held.clear()
    made = block(arena, 2002)
    assert made is not None
    assert not made["x"].any()


def test_segments_that_hold_something_stay_with_their_user(arena: Arena) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    assert block(arena, 2002) is None
    assert [place(one)[1] for one in held] == [2001] * 4


def test_who_has_more_than_its_share_gets_no_block_while_another_user_waits(arena: Arena) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    assert block(arena, 2002) is None
    held.pop()
    assert block(arena, 2001) is None, "its place runs empty"
    mine = block(arena, 2002)
    assert place(mine)[1] == 2002
    held.append(block(arena, 2001, 1000))
    assert held[-1] is not None, "nobody waits any more"


def test_a_user_that_asks_no_more_is_not_waited_for(arena: Arena, clock: Clock) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    assert block(arena, 2002) is None
    held.pop()
    assert block(arena, 2001) is None
    clock.now += REFUSED_S + 1
    assert block(arena, 2001) is not None


def test_one_user_alone_has_all_of_it_and_is_never_kept_waiting(arena: Arena) -> None:
    held = [block(arena, 2001) for _ in range(4)]
    assert block(arena, 2001) is None
    held.pop()
    assert block(arena, 2001) is not None


def test_users_that_take_turns_all_get_room_and_the_sum_stays_bounded(arena: Arena) -> None:
    held: dict[int, list[BlockTensors | None]] = {1: [], 2: [], 3: []}
    got = dict.fromkeys(held, 0)
    for turn in range(300):
        user = 1 if turn % 4 else 2 + turn // 4 % 2  # the first asks three times as often
        made = block(arena, user, MIB)
        if made is not None:
            got[user] += 1
            held[user].append(made)
        oldest = max(held.values(), key=len)
        if sum(map(len, held.values())) > 3 and oldest:
            oldest.pop(0)
        assert arena.nbytes <= arena.limit_nbytes
    assert min(got.values()) > 10
