"""Records: bit-exact both ways, readable by others, and never wrong without saying so."""

import json
import random
from math import inf
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvstore.dtypes import BY_NAME, TensorSpec
from kvstore.entries.compression import Compression, compress, decompress_into
from kvstore.entries.entry import Described, EncodedTensor, Entry
from kvstore.entries.record import FIXED_NBYTES, pack, parse_head, specs_of, unpack
from kvstore.entries.safetensors_header import HEADER_MAX_NBYTES, parse_header
from kvstore.errors import EntryTooLarge, RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

KEY = Key(b"a key")
META = Meta(created_at=1000.0, expires_at=4600.0, ttl_s=3600.0, value_nbytes=0)
GOLDEN = Path(__file__).parents[2] / "golden"


def raw(x: torch.Tensor) -> EncodedTensor:
    return EncodedTensor(TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape)), "raw", {"": x})


def entry_of(lossy: bool = False, /, **tensors: torch.Tensor) -> Entry:
    return Entry(KEY, {name: raw(x) for name, x in tensors.items()}, lossy=lossy)


def quantized(name: str = "nf4") -> EncodedTensor:
    parts = {
        "": torch.arange(50, dtype=torch.uint8),
        "absmax": torch.arange(2, dtype=torch.uint8),
        "nested_absmax": torch.tensor([0.5]),
    }
    return EncodedTensor(TensorSpec("float32", (10, 10)), name, parts, {"nested_offset": 0.1, "blocksize": 64})


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(a: Entry, b: Entry) -> None:
    assert (a.key, a.lossy, list(a.tensors)) == (b.key, b.lossy, list(b.tensors))
    for name, x in a.tensors.items():
        y = b.tensors[name]
        assert (x.spec, x.encoding, dict(x.attrs), set(x.parts)) == (y.spec, y.encoding, dict(y.attrs), set(y.parts))
        for suffix, part in x.parts.items():
            assert part.dtype == y.parts[suffix].dtype
            assert part.shape == y.parts[suffix].shape
            assert bits(part) == bits(y.parts[suffix])


@pytest.mark.parametrize("dtype", BY_NAME)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5), (1, 1, 1, 1, 1, 1, 1, 7)])
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec(dtype, shape)
    data = torch.from_numpy(
        np.random.default_rng(7).integers(0, 2 if dtype == "bool" else 256, spec.nbytes, dtype=np.uint8)
    )
    x = data.view(getattr(torch, dtype)).view(shape) if spec.nbytes else torch.empty(shape, dtype=getattr(torch, dtype))
    entry = entry_of(x=x, odd=torch.ones(3, dtype=torch.uint8))
    assert_equal(unpack(pack(entry, META).to_bytes(), KEY), entry)


def test_nan_payloads_survive() -> None:
    x = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert_equal(unpack(pack(entry_of(x=x), META).to_bytes(), KEY), entry_of(x=x))


def test_an_unpacked_entry_shares_no_memory_with_the_record() -> None:
    entry = entry_of(x=torch.arange(100, dtype=torch.float32))
    record = bytearray(pack(entry, META).to_bytes())
    back = unpack(memoryview(record), KEY)
    record[:] = bytes(len(record))
    assert_equal(back, entry)


def test_encoded_tensors_keep_parts_and_attributes() -> None:
    entry = Entry(KEY, {"k": quantized(), "ids": raw(torch.arange(4)), "v": quantized("other-kv")}, lossy=True)
    assert_equal(unpack(pack(entry, META).to_bytes(), KEY), entry)


def test_a_tensor_named_like_another_ones_part_is_not_mixed_up() -> None:
    tensors = {"k": quantized(), "k.absmax": raw(torch.ones(3)), "k.absmax~1": raw(torch.zeros(2)), "k.": quantized()}
    entry = Entry(KEY, tensors, lossy=True)
    assert_equal(unpack(pack(entry, META).to_bytes(), KEY), entry)


def test_any_safetensors_reader_reads_the_body() -> None:
    entry = Entry(KEY, {"k": quantized(), "v": raw(torch.randn(5, 3)), "c": raw(torch.ones(2, dtype=torch.complex64))})
    body = pack(entry, META, compression=Compression.NONE).to_bytes()[FIXED_NBYTES:]
    loaded = safetensors.torch.load(body)
    assert set(loaded) == {"k", "k.absmax", "k.nested_absmax", "v", "c"}
    assert torch.equal(loaded["v"], entry.tensors["v"].parts[""])
    assert torch.equal(loaded["k"], entry.tensors["k"].parts[""])
    assert loaded["c"].dtype == torch.uint8


def test_specs_are_read_without_the_data() -> None:
    entry = Entry(KEY, {"k": quantized(), "v": raw(torch.randn(5, 3))}, lossy=True)
    record = pack(entry, META)
    head = parse_head(record.head, KEY)
    assert specs_of(head, record.head) == {
        "k": Described(TensorSpec("float32", (10, 10)), "nf4", inf),
        "v": Described(TensorSpec("float32", (5, 3)), "raw", 0.0),
    }
    assert (head.lossy, head.expires_at, head.ttl_s) == (True, 4600.0, 3600.0)


@pytest.mark.parametrize("lie", ["0.1", True, -0.1, None, [0.1]], ids=str)
def test_a_receipt_that_is_no_error_counts_as_never_measured(lie: object) -> None:
    """Records come from disks and files: what is not a number of at least 0 promises nothing."""
    k = quantized()
    lying = EncodedTensor(k.spec, k.encoding, k.parts, {**k.attrs, "relative_error": lie})
    told = EncodedTensor(k.spec, k.encoding, k.parts, {**k.attrs, "relative_error": 0.25})
    entry = Entry(KEY, {"k": lying, "v": told}, lossy=True)
    assert unpack(pack(entry, META).to_bytes(), KEY).receipt == {"k": inf, "v": 0.25}


def test_256_tensors_with_the_longest_names_fit() -> None:
    entry = Entry(KEY, {f"{i:064d}": quantized() for i in range(256)})
    assert_equal(unpack(pack(entry, META).to_bytes(), KEY), entry)
    more = Entry(KEY, {f"{i}": quantized() for i in range(257)})
    with pytest.raises(EntryTooLarge, match="256 tensors, got 257"):
        pack(more, META)


def test_a_header_over_its_limit_is_refused() -> None:
    attrs = {"much": "x" * HEADER_MAX_NBYTES}
    entry = Entry(KEY, {"k": EncodedTensor(TensorSpec("float32", (2,)), "nf4", {"": torch.ones(1)}, attrs)})
    with pytest.raises(EntryTooLarge, match=str(HEADER_MAX_NBYTES)):
        pack(entry, META)


@given(seed=st.integers(0, 2**32))
def test_no_flipped_bit_passes(seed: int) -> None:
    rng = random.Random(seed)
    record = bytearray(pack(Entry(KEY, {"k": quantized(), "z": raw(torch.zeros(2000))}), META).to_bytes())
    record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
    with pytest.raises(RecordCorrupt):
        unpack(record, KEY)


@given(seed=st.integers(0, 2**32))
def test_no_truncation_extension_or_stranger_passes(seed: int) -> None:
    rng = random.Random(seed)
    record = pack(Entry(KEY, {"k": quantized()}), META).to_bytes()
    noise = rng.randbytes(rng.randrange(1, 200))
    for wrong in (record[: rng.randrange(len(record))], record + noise, noise, noise + record):
        with pytest.raises(RecordCorrupt):
            unpack(wrong, KEY)


def test_a_record_under_another_key_is_refused() -> None:
    record = pack(entry_of(x=torch.ones(4)), META).to_bytes()
    with pytest.raises(RecordCorrupt, match="another key"):
        unpack(record, Key(b"b key"))


def reseal(record: bytes | bytearray) -> bytes:
    """A record whose checksums agree again: what only a bug or an attacker could write."""
    changed = bytearray(record)
    json_nbytes = int.from_bytes(changed[64:68], "little")
    head_nbytes = FIXED_NBYTES + json_nbytes
    changed[88:96] = xxhash.xxh3_64_intdigest(changed[head_nbytes:]).to_bytes(8, "little")
    changed[8:16] = xxhash.xxh3_64_intdigest(changed[16:head_nbytes]).to_bytes(8, "little")
    return bytes(changed)


def test_resealing_a_whole_record_changes_nothing() -> None:
    record = pack(entry_of(x=torch.ones(4)), META).to_bytes()
    assert reseal(record) == record


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_version_is_a_miss_and_never_misread(version: int) -> None:
    record = bytearray(pack(entry_of(x=torch.ones(4)), META).to_bytes())
    record[4:6] = version.to_bytes(2, "little")
    with pytest.raises(RecordCorrupt, match=f"version {version}"):
        unpack(reseal(record), KEY)


def test_sizes_over_the_limit_are_refused_before_allocation() -> None:
    record = bytearray(pack(entry_of(x=torch.ones(4)), META).to_bytes())
    record[72:80] = (1 << 60).to_bytes(8, "little")
    with pytest.raises(RecordCorrupt, match="1152921504606846976 bytes"):
        unpack(reseal(record), KEY)


def test_a_zstd_frame_that_says_another_size_is_refused_before_decompressing() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1 << 24))
    with pytest.raises(RecordCorrupt, match="16777216 bytes"):
        decompress_into(np.empty(100, np.uint8), np.frombuffer(bomb, np.uint8), Compression.ZSTD)
    untold = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(RecordCorrupt):
        decompress_into(np.empty(100, np.uint8), np.frombuffer(untold, np.uint8), Compression.ZSTD)


@pytest.mark.parametrize("how", list(Compression))
@pytest.mark.parametrize("n", [0, 1, 7, 4099])
def test_each_compression_comes_back(how: Compression, n: int) -> None:
    data = np.random.default_rng(1).integers(0, 4, n, dtype=np.uint8)
    used, stored = compress([data[: n // 2], data[n // 2 :]], 4, how)
    joined = np.concatenate(stored)
    if used is Compression.NONE:
        assert joined.tobytes() == data.tobytes()
        return
    out = np.empty(n, np.uint8)
    decompress_into(out, joined, used)
    assert out.tobytes() == data.tobytes()


def test_zstd_only_where_a_sample_shows_that_it_pays() -> None:
    repeated = torch.arange(1000, dtype=torch.bfloat16).repeat(100)
    noise = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int64).to(torch.int32)
    assert pack(entry_of(x=repeated), META).compression is Compression.ZSTD_SHUFFLE_2
    assert pack(entry_of(x=noise), META).compression is Compression.NONE
    codes = EncodedTensor(TensorSpec("float32", (20_000,)), "nf4", {"": torch.zeros(10_000, dtype=torch.uint8)})
    assert pack(Entry(KEY, {"k": codes}), META).compression is Compression.NONE
    assert_equal(unpack(pack(entry_of(x=repeated), META).to_bytes(), KEY), entry_of(x=repeated))


GOOD = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [0, 0]}, "b": GOOD["a"]},
        {"a": {"dtype": "U8", "shape": [1] * 9 + [4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [True, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2**64]}},
        {"a": {"dtype": "U8", "shape": [4]}},
        {"a": dict(GOOD["a"], more=1)},
        {"a": [1]},
        {"a": GOOD["a"], "b": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        {"a": GOOD["a"], "__metadata__": {"x": 1}},
        {"a": GOOD["a"], "__metadata__": []},
    ],
)
def test_a_header_that_no_sane_writer_leaves_is_corrupt(table: dict[str, object]) -> None:
    text = json.dumps(table).encode()
    with pytest.raises(RecordCorrupt):
        parse_header(len(text).to_bytes(8, "little") + text, 4)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1}', b"[" * 200_000, b'{"a":' + b"[" * 200_000, b"[]", b"{" + b"9" * 100, b"\xff\xfe{}",
        b'{"a":' + b"9" * 5000 + b"}", b"{} {}", b"",
    ],
)  # fmt: skip
def test_hostile_json_is_corrupt(text: bytes) -> None:
    with pytest.raises(RecordCorrupt):
        parse_header(len(text).to_bytes(8, "little") + text, 4)


def test_a_header_over_the_cap_is_not_parsed() -> None:
    text = b'{"__metadata__":{"x":"' + b"y" * HEADER_MAX_NBYTES + b'"}}'
    with pytest.raises(RecordCorrupt):
        parse_header(len(text).to_bytes(8, "little") + text, 0)


def golden_entries() -> dict[str, tuple[Entry, Compression]]:
    floats = torch.arange(4096, dtype=torch.float32).to(torch.bfloat16)
    return {
        "record-v1-raw": (
            entry_of(k=torch.arange(6, dtype=torch.float32).view(2, 3), n=torch.tensor(7)),
            Compression.NONE,
        ),
        "record-v1-nf4": (Entry(KEY, {"k": quantized(), "v": quantized()}, lossy=True), Compression.NONE),
        "record-v1-zstd": (entry_of(k=floats), Compression.ZSTD_SHUFFLE_2),
    }


@pytest.mark.parametrize("name", golden_entries())
def test_golden_records_are_still_read(name: str) -> None:
    entry, how = golden_entries()[name]
    golden = (GOLDEN / name).read_bytes()
    assert_equal(unpack(golden, KEY), entry)
    if how is Compression.NONE:  # another zstd release may write another frame
        assert pack(entry, META, compression=how).to_bytes() == golden


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (rb"\"dtype\":\"float32\"", rb"\"dtype\":\"float99\""),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,1,1,1,9]"),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,1,10,-9]"),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,1,10,9.]"),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,1,1,1e1]"),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,1,1,9.5]"),
        (rb"\"shape\":[1,1,1,1,1,1,10,10]", rb"\"shape\":[1,1,1,1,1,true,99]"),
    ],
)
def test_a_tensor_of_an_unknown_type_or_an_impossible_shape_is_corrupt(good: bytes, bad: bytes) -> None:
    """The header is read before the data: what it says of an encoded tensor decides what is made of it."""
    spec = TensorSpec("float32", (1, 1, 1, 1, 1, 1, 10, 10))
    entry = Entry(KEY, {"k": EncodedTensor(spec, "other", {"": torch.zeros(50, dtype=torch.uint8)})}, lossy=True)
    record = pack(entry, META, compression=Compression.NONE).to_bytes()
    assert record.count(good) == 1
    with pytest.raises(RecordCorrupt):
        unpack(reseal(record.replace(good, bad)), KEY)
