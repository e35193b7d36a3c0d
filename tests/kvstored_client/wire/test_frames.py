"""Frames by hand are plain protobuf, and what is no frame is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import (
    BadFrame,
    Gather,
    Scatter,
    build_frame,
    build_miss,
    cut_frames,
    fixed64s,
    get_call,
    parse_frame,
    put_call,
)
from kvstored_client.wire.messages import GetOptions

maybe_bytes = st.none() | st.binary(max_size=300)


def as_array(data):
    return np.frombuffer(bytearray(data), dtype=np.uint8)


@given(st.sampled_from([0, 1, 127, 128, 20_000]), st.booleans(), st.booleans())
def test_what_is_built_reads_as_protobuf(nbytes, header, end):
    head = pb.GetHeader(index=3, encoding="raw", nbytes=nbytes)
    tail = pb.EntryEnd(xxh3=7)
    payload = bytes(nbytes)
    frame = build_frame(
        head.SerializeToString() if header else None, [memoryview(payload)], tail.SerializeToString() if end else None
    )
    read = pb.GetFrame.FromString(frame)
    assert read.HasField("header") == header
    assert read.HasField("end") == end
    assert read.chunk == payload
    assert not header or read.header == head
    assert not end or read.end == tail


@given(
    st.lists(st.binary(min_size=1, max_size=256), max_size=200),
    st.booleans(),
    st.lists(st.sampled_from(["nf4", "int8"])),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**64 - 1), max_size=200),
)
def test_a_call_written_by_hand_reads_as_protobuf(keys, leading, accept, from_nbytes, release):
    how = GetOptions(leading, tuple(accept), from_nbytes)
    written = fixed64s(1, release) + get_call(keys, how.rest)
    asked = pb.GetRequest(keys=keys, leading=leading, accept=accept, accept_from_nbytes=from_nbytes)
    assert pb.LeaseCall.FromString(written) == pb.LeaseCall(release=release, get=asked)
    assert how.request(keys) == asked


KEYS = st.binary(min_size=1, max_size=256)
PLACES = st.lists(st.tuples(st.none() | st.integers(0, 2**32 - 1), st.integers(0, 2**40)), max_size=5)


@given(
    st.lists(st.tuples(KEYS, st.none() | KEYS, PLACES, st.integers(0, 300)), max_size=20),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_a_put_written_by_hand_reads_as_protobuf(entries, segment, start, copy_later):
    """Headers of up to a few hundred bytes, whose length takes one byte or two; places of a segment and of the room."""
    expected = pb.LeasePut(copy_later=copy_later)
    written = []
    for key, parent, places, nbytes in entries:
        rest = pb.PutHeader(nbytes=nbytes, namespace="n" * nbytes)
        written.append((key, parent, rest.SerializeToString(), places))
        item = expected.entries.add(header=rest)
        item.header.MergeFrom(pb.PutHeader(key=key, parent=parent))
        for of, at in places:
            item.places.add(segment=segment if of is None else of, start=start + at if of is None else at)
    call = put_call(written, segment, start, copy_later=copy_later)
    assert pb.LeaseCall.FromString(call) == pb.LeaseCall(put=expected)


@given(st.booleans(), st.binary(max_size=300), st.booleans(), st.integers(0, 2**32 - 1))
def test_what_protobuf_builds_is_read(header, chunk, end, index):
    message = pb.GetFrame(chunk=chunk)
    if header:
        message.header.index = index
    if end:
        message.end.xxh3 = index
    frame = parse_frame(message.SerializeToString(), pb.GetFrame)
    assert (frame.header is not None) == header
    assert (frame.end is not None) == end
    assert bytes(frame.chunk) == chunk
    assert not header or pb.GetHeader.FromString(bytes(frame.header)).index == index


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused_and_never_disagree_with_protobuf(data):
    try:
        frame = parse_frame(data, pb.PutFrame)
    except BadFrame:
        return
    try:
        read = pb.PutFrame.FromString(data)
    except Exception:  # noqa: BLE001 - the submessages are checked when they are read, not here
        return
    assert bytes(frame.chunk) == read.chunk
    assert (frame.header is not None) == read.HasField("header")


def test_fields_of_a_later_version_are_skipped_and_order_does_not_matter():
    later = bytes((15 << 3 | 2, 3)) + b"new"
    end = pb.PutFrame(end=pb.EntryEnd(xxh3=1)).SerializeToString()
    chunk = pb.PutFrame(chunk=b"data").SerializeToString()
    for data in (later + end + chunk, end + chunk, end + later + chunk, chunk + end):
        frame = parse_frame(data, pb.PutFrame)
        assert bytes(frame.chunk) == b"data"
        assert frame.end is not None


def test_of_a_chunk_sent_twice_the_last_counts_as_in_protobuf():
    data = pb.PutFrame(chunk=b"one").SerializeToString() + pb.PutFrame(chunk=b"two").SerializeToString()
    assert bytes(parse_frame(data, pb.PutFrame).chunk) == pb.PutFrame.FromString(data).chunk == b"two"


@pytest.mark.parametrize(
    "data", [b"\x12", b"\x12\x05ab", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 20]
)
def test_bytes_that_are_no_frame_are_refused(data):
    with pytest.raises(BadFrame):
        parse_frame(data, pb.PutFrame)


def test_a_miss_is_a_frame():
    frame = parse_frame(build_miss(pb.GetMiss(index=9, boot_epoch=4)), pb.GetFrame)
    assert frame.miss is not None
    assert pb.GetMiss.FromString(bytes(frame.miss)).index == 9


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 40), st.lists(st.integers(0, 60), max_size=5))
def test_gather_then_scatter_is_identity_whatever_the_cuts(parts, chunk_nbytes, sizes):
    whole = b"".join(parts)
    chunks = [b"".join(pieces) for pieces in Gather([as_array(p) for p in parts]).chunks(chunk_nbytes)]
    assert b"".join(chunks) == whole
    assert all(len(chunk) == chunk_nbytes for chunk in chunks[:-1])
    cuts = [0, *sorted(min(size, len(whole)) for size in sizes), len(whole)]
    targets = [np.zeros(b - a, dtype=np.uint8) for a, b in itertools.pairwise(cuts)]
    scatter = Scatter(targets)
    for chunk in chunks:
        scatter.write(memoryview(chunk))
    assert b"".join(t.tobytes() for t in targets) == whole
    assert scatter.filled_nbytes == scatter.due_nbytes == len(whole)


def test_scatter_refuses_more_than_is_due():
    scatter = Scatter([np.zeros(4, dtype=np.uint8)])
    scatter.write(memoryview(b"abc"))
    with pytest.raises(BadFrame, match="5 of 4"):
        scatter.write(memoryview(b"de"))


@pytest.mark.parametrize(("nbytes", "frames"), [(0, 1), (5, 1), (2 << 20, 1), ((2 << 20) + 1, 2), (5 << 20, 3)])
def test_an_entry_has_one_frame_for_each_chunk(nbytes, frames):
    cut = list(cut_frames(b"", Gather([np.ones(nbytes, dtype=np.uint8)])))
    assert len(cut) == frames
    read = [pb.PutFrame.FromString(frame) for frame in cut]
    assert [frame.HasField("header") for frame in read] == [True] + [False] * (frames - 1)
    assert [frame.HasField("end") for frame in read] == [False] * (frames - 1) + [True]
    assert sum(len(frame.chunk) for frame in read) == nbytes


@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 7), (1000, (512 << 10) - 1001)])
def test_a_small_entry_in_one_frame_is_what_it_is_cut_to(sizes):
    arrays = [np.full(nbytes, i, dtype=np.uint8) for i, nbytes in enumerate(sizes)]
    ends = np.cumsum([0, *sizes]).tolist()
    whole = build_frame(b"head", [x.data for x in arrays if x.size], pb.EntryEnd(xxh3=7).SerializeToString())
    assert list(cut_frames(b"head", Gather(arrays, ends), 7)) == [whole]
