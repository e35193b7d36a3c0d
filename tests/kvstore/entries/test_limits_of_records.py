"""Each check of a record by itself: a head or a table that is wrong in one thing is refused for that thing.

Most of them are doubled further on, but there memory has been made for what the record says.
"""

import json
import struct
from typing import Any

import pytest
import torch
import xxhash

from kvstore.entries import record as records
from kvstore.entries.compression import Compression
from kvstore.entries.entry import EncodedTensor, Entry, TensorSpec
from kvstore.entries.record import FIXED_NBYTES, HEAD_MAX_NBYTES, pack, parse_head, tensor_of, unpack
from kvstore.entries.safetensors_header import HEADER_MAX_NBYTES, Slot, parse_header, tensor_rows
from kvstore.errors import RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

KEY = Key(b"a key")
LIMIT = 1000
GOOD: dict[str, Any] = {
    "magic": b"KVSR", "version": 1, "fixed": FIXED_NBYTES, "sum": None, "hash": records._key_hash(KEY), "created": 1.0,
    "expires": 2.0, "ttl": 1.0, "value": 1000, "json": 16, "compression": 0, "flags": 0, "key": len(KEY), "data": 1000,
    "stored": 1000, "data_sum": 0,
}  # fmt: skip


def head(json_nbytes: int = 16, **fields: Any) -> bytes:
    """A head whose checksum is right unless `sum` says otherwise, and its JSON."""
    values = {**GOOD, **fields}
    text = b" " * json_nbytes
    if values["sum"] is None:
        packed = records._FIXED.pack(*{**values, "sum": 0}.values()) + text
        values["sum"] = xxhash.xxh3_64_intdigest(packed[16 : FIXED_NBYTES + values["json"]])
    return records._FIXED.pack(*values.values()) + text


def test_a_good_head_is_read() -> None:
    read = parse_head(head(), KEY, limit_nbytes=LIMIT)
    assert (read.value_nbytes, read.data_nbytes, read.stored_nbytes, read.json_nbytes) == (1000, 1000, 1000, 16)
    assert read.compression is Compression.NONE
    assert parse_head(head(flags=31), KEY).lossy
    assert parse_head(head(compression=max(Compression)), KEY).compression is max(Compression)


@pytest.mark.parametrize("field", ["value", "data", "stored"])
def test_each_size_of_a_head_has_the_limit(field: str) -> None:
    """Twice the limit, which a small value's side data may reach, and not a byte more."""
    at_most: dict[str, int] = {"value": 2 * LIMIT} if field == "data" else {}
    parse_head(head(**{**at_most, field: 2 * LIMIT}), KEY, limit_nbytes=LIMIT)
    with pytest.raises(RecordCorrupt, match=f"data of {2 * LIMIT + 1} bytes, at most {2 * LIMIT}"):
        parse_head(head(**{**at_most, field: 2 * LIMIT + 1}), KEY, limit_nbytes=LIMIT)


def test_data_is_at_most_twice_the_value_and_a_mebibyte() -> None:
    most = 2 * 1000 + (1 << 20)
    parse_head(head(data=most), KEY)
    with pytest.raises(RecordCorrupt, match="for a value of 1000"):
        parse_head(head(data=most + 1), KEY)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"magic": b"KVSS"}, "not a record"),
        ({"version": 2}, "not a record"),
        ({"fixed": FIXED_NBYTES + 8}, "not a record"),
        ({"sum": 1}, "checksum of the header"),
        ({"hash": records._key_hash(b"another")}, "another key"),
        ({"key": len(KEY) + 1}, "another key"),
        ({"flags": 32}, "later version"),
        ({"compression": max(Compression) + 1}, "stored as kind"),
        ({"json": 17}, "17 bytes, 16 are there"),
        ({"json": HEADER_MAX_NBYTES + 9, "json_nbytes": HEADER_MAX_NBYTES + 9}, "header of"),
    ],
    ids=str,
)
def test_a_head_that_is_wrong_in_one_field_is_refused_for_it(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RecordCorrupt, match=why):
        parse_head(head(**fields), KEY)


def test_a_head_may_be_as_long_as_its_limit_and_no_shorter_than_its_fields() -> None:
    longest = head(json_nbytes=HEADER_MAX_NBYTES + 8, json=HEADER_MAX_NBYTES + 8)
    assert len(longest) == HEAD_MAX_NBYTES
    assert parse_head(longest, KEY).json_nbytes == HEADER_MAX_NBYTES + 8
    with pytest.raises(RecordCorrupt, match="shorter"):
        parse_head(head()[: FIXED_NBYTES - 1], KEY)
    assert parse_head(head(json_nbytes=0, json=0), KEY).json_nbytes == 0


def tables(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("offsets", [[0], [0, 4, 4], [False, 4], [0, 4.0], [-1, 3], "04", None, {"0": 0, "1": 4}, []])
def test_the_two_ends_of_a_tensor_are_two_sizes(offsets: object) -> None:
    table = {"a": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}
    with pytest.raises(RecordCorrupt, match="data_offsets"):
        parse_header(tables(table), 4)


@pytest.mark.parametrize("shape", [[4, 1, 1, 1, 1, 1, 1, 1, 1], [4.0], [True, 4], [-4], "4", None, {"0": 4}])
def test_a_shape_is_a_list_of_eight_sizes_at_most(shape: object) -> None:
    table = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}}
    with pytest.raises(RecordCorrupt, match="shape"):
        parse_header(tables(table), 4)
    parse_header(tables({"a": {"dtype": "U8", "shape": [4, *[1] * 7], "data_offsets": [0, 4]}}), 4)


def test_a_header_has_the_length_it_says_and_the_limit() -> None:
    good = tables({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}})
    parse_header(good, 4)
    for wrong in (good + b" ", good[:-1], struct.pack("<Q", 1) + b"{", b""):
        with pytest.raises(RecordCorrupt, match="header says"):
            parse_header(wrong, 4)
    for nbytes in (3, 5):
        with pytest.raises(RecordCorrupt, match=f"4 bytes of data, there are {nbytes}"):
            parse_header(good, nbytes)


ROW: dict[str, Any] = {"name": "k", "encoding": "e", "dtype": "uint8", "shape": [4], "parts": {"": ["k"]}}


def rows(**changes: object) -> list[Any]:
    return tensor_rows({"kvstored.tensors": json.dumps([{**ROW, **changes}])})


def test_a_good_row_is_read() -> None:
    assert rows()[0].spec == TensorSpec("uint8", (4,))
    assert rows(encoding="e" * 32, shape=[1] * 8, attrs={"a": [1, {"b": 2.0}]})[0].encoding == "e" * 32
    for number in (-(1 << 63), (1 << 63) - 1):
        assert rows(attrs={"a": number})[0].attrs == {"a": number}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": ""}, {"encoding": "e" * 33}, {"encoding": "\u00e9"}, {"encoding": "a\n"}, {"encoding": 5},
        {"encoding": None}, {"attrs": []}, {"attrs": None}, {"attrs": {"a": 1 << 63}}, {"attrs": {"a": -(1 << 63) - 1}},
        {"attrs": {"a": float("inf")}}, {"attrs": {"a": float("nan")}}, {"dtype": "float99"}, {"dtype": 5},
        {"shape": [1] * 9}, {"shape": "4"}, {"shape": [-1]}, {"shape": [True]}, {"shape": [1.0]},
        {"shape": [1 << 62, 4]}, {"shape": [1 << 41]}, {"parts": {"": []}}, {"parts": {"": ["k", "uint8"]}},
        {"parts": {"": ["k", "uint8", 4]}}, {"parts": []}, {"parts": {str(n): ["k"] for n in range(100)}}, {"name": ""},
        {"name": 5}, {"parts": {"": [5]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_is_wrong_in_one_thing_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordCorrupt, match="cannot be read"):
        rows(**changes)


def test_attributes_are_nested_only_so_deep() -> None:
    deep: object = 1
    for _ in range(50):
        deep = [deep]
    with pytest.raises(RecordCorrupt, match="nested"):
        rows(attrs={"a": deep})


@pytest.mark.parametrize("count", [0, 257])
def test_an_entry_has_1_to_256_tensors(count: int) -> None:
    with pytest.raises(RecordCorrupt, match="1 to 256 tensors"):
        tensor_rows({"kvstored.tensors": json.dumps([ROW] * count)})
    assert len(tensor_rows({"kvstored.tensors": json.dumps([ROW] * 256)})) == 256


def test_a_part_without_bytes_is_not_a_tensor_with_values() -> None:
    """It would be memory that nobody has written: whatever lay there before."""
    row = rows(dtype="complex64", shape=[3], parts={"": ["k", "complex64", [3]]})[0]
    with pytest.raises(RecordCorrupt, match="of 0 bytes is not"):
        tensor_of(row, {"k": Slot("U8", (0,), 0, 0)}, torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize(("begin", "why"), [(1, "not aligned"), (4, "not aligned"), (8, None)])
def test_a_part_lies_where_its_type_may(begin: int, why: str | None) -> None:
    row = rows(dtype="complex64", shape=[2], parts={"": ["k", "complex64", [2]]})[0]
    slots, data = {"k": Slot("U8", (16,), begin, begin + 16)}, torch.zeros(64, dtype=torch.uint8)
    if why is None:
        assert tensor_of(row, slots, data).parts[""].shape == (2,)
    else:
        with pytest.raises(RecordCorrupt, match=why):
            tensor_of(row, slots, data)
    with pytest.raises(RecordCorrupt, match="missing"):
        tensor_of(row, {}, data)


@pytest.mark.parametrize(
    "parts",
    [{"": ["k"], "more": ["m"]}, {"other": ["k"]}, {}, {"": ["m"]}],
    ids=["two", "another", "none", "wrong type"],
)
def test_a_raw_tensor_has_one_part_which_is_itself(parts: dict[str, Any]) -> None:
    slots = {"k": Slot("U8", (4,), 0, 4), "m": Slot("I8", (4,), 4, 8)}
    with pytest.raises(RecordCorrupt, match="is not"):
        tensor_of(rows(encoding="raw", parts=parts)[0], slots, torch.zeros(8, dtype=torch.uint8))


def test_a_part_that_is_called_like_a_tensor_gets_the_next_free_name() -> None:
    taken = {"k.absmax"}
    assert [records._free_name("k.absmax", taken) for _ in range(3)] == ["k.absmax~1", "k.absmax~2", "k.absmax~3"]
    assert records._free_name("k.codes", taken) == "k.codes"


def plain(nbytes: int = 4) -> Entry:
    x = torch.arange(nbytes, dtype=torch.uint8)
    return Entry(KEY, {"k": EncodedTensor(TensorSpec("uint8", (nbytes,)), "raw", {"": x})})


def test_a_record_is_as_long_as_its_head_says() -> None:
    record = pack(plain(), Meta(1.0, 2.0, 1.0, 4)).to_bytes()
    assert unpack(record, KEY).value_nbytes == 4
    for wrong in (record + b"\0", record[:-1]):
        with pytest.raises(RecordCorrupt, match="record has"):
            unpack(wrong, KEY)


@pytest.mark.parametrize("said", [3, 5])
def test_a_record_whose_head_says_another_size_than_its_tensors_have_is_refused(said: int) -> None:
    """Room was made for what the head says."""
    record = bytearray(pack(plain(), Meta(1.0, 2.0, 1.0, 4)).to_bytes())
    fields = list(records._FIXED.unpack_from(record))
    assert fields[8] == 4
    fields[8], rest = said, bytes(record[FIXED_NBYTES:])
    fields[3] = xxhash.xxh3_64_intdigest((records._FIXED.pack(*fields) + rest)[16 : FIXED_NBYTES + fields[9]])
    with pytest.raises(RecordCorrupt, match=f"tensors of 4 bytes, header says {said}"):
        unpack(records._FIXED.pack(*fields) + rest, KEY)
