"""Requests: what a call may name is parsed, and what it may not is refused before anything is made of it."""

import time

import pytest
from google.protobuf.message import DecodeError

from kvstore.errors import InvalidEntry
from kvstore.keys import KEY_MAX_NBYTES, KEYS_PER_CALL_MAX
from kvstored_client.wire import requests
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, parse_frame
from kvstored_client.wire.requests import KEYS_MAX_NBYTES, SMALL_MAX_NBYTES, read_request

KEYED = (pb.GetRequest, pb.MatchRequest, pb.TouchRequest, pb.DeleteRequest, pb.PinRequest, pb.EvictRequest)
EMPTY_KEY, EMPTY_ACCEPT, GROUP = b"\x0a\x00", b"\x1a\x00", b"\x53"


def packed(keys: list[bytes], **rest: object) -> bytes:
    return pb.GetRequest(keys=keys, leading=True, accept=["nf4", "nf4-kv", "int8"], **rest).SerializeToString()


@pytest.mark.parametrize("nbytes", [1, 32, 127, 128, KEY_MAX_NBYTES])
@pytest.mark.parametrize("fill", [b"\x0a", b"\x00", b"\xff"])
def test_as_many_keys_as_a_call_may_name_are_read_whatever_is_in_them(nbytes: int, fill: bytes) -> None:
    keys = [fill * nbytes] * KEYS_PER_CALL_MAX
    assert list(read_request(pb.GetRequest, packed(keys)).keys) == keys
    assert read_request(pb.GetRequest, packed(keys[:3])).accept == ["nf4", "nf4-kv", "int8"]


def test_keys_of_many_lengths_are_read() -> None:
    keys = [bytes([n % 256]) * (1 + n % KEY_MAX_NBYTES) for n in range(KEYS_PER_CALL_MAX)]
    assert list(read_request(pb.MatchRequest, pb.MatchRequest(keys=keys).SerializeToString()).keys) == keys


@pytest.mark.parametrize("kind", KEYED)
@pytest.mark.parametrize("field", [EMPTY_KEY, EMPTY_ACCEPT, b"\x0a\x01k", b"\x78\x01", GROUP + b"\x54"])
def test_fields_beyond_any_call_are_refused_before_they_are_parsed(
    kind: type[pb.GetRequest], field: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parsed:
        DESCRIPTOR = kind.DESCRIPTOR

        @staticmethod
        def FromString(_: bytes) -> None:  # noqa: N802 - protobuf's name
            raise AssertionError("parsed")

    monkeypatch.setattr(requests, "MAX_NBYTES", {Parsed: KEYS_MAX_NBYTES})
    data = field * (KEYS_MAX_NBYTES // len(field))
    with pytest.raises(InvalidEntry, match="at most 4096 keys"):
        read_request(Parsed, data)  # type: ignore[type-var]
    with pytest.raises(InvalidEntry, match=f"at most {KEYS_MAX_NBYTES} bytes, got"):
        read_request(Parsed, field * (2 << 20))  # type: ignore[type-var]


def test_refusing_looks_at_a_few_thousand_fields_of_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    varint = requests._varint

    def counted(data: bytes, at: int) -> tuple[int, int]:
        nonlocal looked
        looked += 1
        return varint(data, at)

    monkeypatch.setattr(requests, "_varint", counted)
    with pytest.raises(InvalidEntry):
        read_request(pb.GetRequest, EMPTY_KEY * 500_000)
    assert looked <= 2 * requests.FIELDS_MAX
    looked = 0
    read_request(pb.GetRequest, packed([bytes(32)] * KEYS_PER_CALL_MAX))
    assert looked == 0, "hashes are told at a glance"


def test_what_names_no_keys_is_small() -> None:
    for kind in (pb.StatsRequest, pb.ReportRequest, pb.InspectRequest, pb.ListRequest):
        with pytest.raises(InvalidEntry, match=f"at most {SMALL_MAX_NBYTES} bytes"):
            read_request(kind, bytes(SMALL_MAX_NBYTES + 1))
    longest = pb.ListRequest(key_prefix=bytes(256), tenant="t" * 255, namespace="n" * 96)
    assert read_request(pb.ListRequest, longest.SerializeToString()) == longest


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05ab", b"\xff" * 20_000, EMPTY_KEY * 2000 + b"\x0a\x7f"])
def test_junk_stays_junk(data: bytes) -> None:
    with pytest.raises((DecodeError, InvalidEntry)):
        read_request(pb.GetRequest, data)


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x1a\x00", b"\x40\x01", b"\x0a\x02\x12\x00"])
def test_a_frame_of_a_million_fields_is_refused_at_once(field: bytes) -> None:
    began = time.thread_time()
    with pytest.raises(BadFrame, match="at most 64 fields"):
        parse_frame(field * ((4 << 20) // len(field)), pb.PutFrame)
    assert time.thread_time() - began < 0.05, "parsing it took half a second"


def test_a_frame_with_one_huge_header_twice_is_refused() -> None:
    header = b"\x12\x00" * 100_000
    twice = (
        b"\x0a" + bytes([len(header) & 0x7F | 0x80, len(header) >> 7 & 0x7F | 0x80, len(header) >> 14]) + header
    ) * 2
    with pytest.raises(BadFrame, match="headers of 65536 bytes"):
        parse_frame(twice, pb.PutFrame)
