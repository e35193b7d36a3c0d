"""A put over the stream counts its bytes, and frames until no more come; whatever happens, nothing stays counted."""

import pytest

from kvstore.errors import EntryTooLarge
from kvstored.calls.budget import Budget, Busy
from kvstored.calls.puts import PutStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, parse_frame
from tests.raw import entry_frames

MIB = 1 << 20
LIMIT_NBYTES = 64 * MIB
FRAMES_NBYTES = LIMIT_NBYTES // 64


@pytest.fixture
def budget():
    return Budget(LIMIT_NBYTES)


@pytest.fixture
def stream(budget):
    return PutStream(LIMIT_NBYTES, budget, lambda _specs: None)


def take(stream, key, nbytes, frames=None):
    """Take the first frames of an entry, by default all."""
    for frame in list(entry_frames(key, bytes(nbytes)))[:frames]:
        stream.take(parse_frame(frame.SerializeToString(), pb.PutFrame))


def test_frames_are_counted_from_before_the_first_until_no_more_come(budget, stream):
    assert budget.used_nbytes == FRAMES_NBYTES
    take(stream, b"a", 2 * MIB, frames=1)
    assert budget.used_nbytes == 2 * MIB + FRAMES_NBYTES
    take_rest = list(entry_frames(b"a", bytes(2 * MIB)))[1:]
    for frame in take_rest:
        stream.take(parse_frame(frame.SerializeToString(), pb.PutFrame))
    take(stream, b"b", 1000)
    assert budget.used_nbytes == 2 * MIB + 2 * 1000, "the frames of a small entry are no larger than it is"
    assert stream.ready_nbytes == 2 * MIB + 1000
    stream.end()
    assert budget.used_nbytes == 2 * MIB + 1000
    stream.release()
    assert (budget.used_nbytes, stream.ready) == (0, [])


def test_an_entry_as_large_as_the_limit_passes_alone_and_no_larger_one(budget, stream):
    with pytest.raises(EntryTooLarge, match=f"an entry of {LIMIT_NBYTES + 1} bytes is over the limit"):
        budget.take(budget.with_frames(LIMIT_NBYTES + 1), instead_of=FRAMES_NBYTES)
    take(stream, b"a", LIMIT_NBYTES, frames=1)
    assert budget.used_nbytes == LIMIT_NBYTES


@pytest.mark.parametrize("how", ["refused", "cut off", "bad frame", "handed over in part"])
def test_what_a_call_counted_is_given_back_however_it_ends(budget, stream, how):
    take(stream, b"a", 2 * MIB)
    if how == "refused":
        budget.take(LIMIT_NBYTES - 4 * MIB)
        before = budget.used_nbytes
        with pytest.raises(Busy):
            take(stream, b"b", 3 * MIB, frames=1)
        assert budget.used_nbytes == before, "what was refused is not counted"
        budget.give_back(LIMIT_NBYTES - 4 * MIB)
    elif how == "cut off":
        take(stream, b"b", 2 * MIB, frames=2)
        with pytest.raises(BadFrame, match="an entry without its end"):
            stream.end()
    elif how == "bad frame":
        with pytest.raises(BadFrame, match="before a header"):
            stream.take(parse_frame(pb.PutFrame(chunk=b"x").SerializeToString(), pb.PutFrame))
    else:
        stream.release()
        take(stream, b"b", 2 * MIB)
    stream.close()
    assert budget.used_nbytes == 0
