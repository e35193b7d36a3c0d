"""What an entry costs the cold tier's budget before it is written: what its record will take, not what memory holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import codec_for, encode_entry
from kvstore.disk.writer import ROW_NBYTES, cost_of
from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import packed
from kvstore.entries.compression import Compression, compress
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.record import pack, record_nbytes
from kvstore.entries.sealing import Key as SealKey
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.transcode import raw_entry
from kvstore.tiers.cold import Cold
from tests.kvstore.tiers.test_cold import Holder, key

META = Meta(1.0, 2.0, 1.0, 0)
SHAPES = [(2, 16, 2, 64), (1, 3, 1, 128), (4, 64), (7,), (), (0, 3), (2, 256, 4, 64)]
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=15)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Raw or in any codec, packed or not, 1 to 16 tensors, names that JSON must escape, small and over a block."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu]
    tensors = {}
    for name in draw(st.lists(names, min_size=1, max_size=16, unique=True)):
        x = torch.randn(draw(st.sampled_from(SHAPES)), generator=generator)
        dtype = draw(st.sampled_from(dtypes))
        tensors[name] = x.mul(50).to(torch.uint8).view(dtype) if dtype.itemsize == 1 else x.to(dtype)
    raw = raw_entry(Key(draw(st.binary(min_size=1, max_size=256))), tensors, lossy=draw(st.booleans()))
    codec = draw(st.sampled_from(["raw", "nf4", "nf4-kv2", "nf4-kv", "int8", "auto"]))
    encoded = raw if codec == "raw" else encode_entry(raw, codec_for(codec))
    return packed(encoded) if draw(st.booleans()) else encoded


@settings(max_examples=60, deadline=None)
@given(entry=entries(), sealed=st.booleans())
def test_the_price_is_the_records_size_to_the_byte_where_nothing_is_compressed(entry: Entry, sealed: bool) -> None:
    """A waiting record of 768 bytes was counted as 1,792, a small nf4-kv of 4,480 as 3,776."""
    seal = SealKey(b"x" * 32) if sealed else None
    assert record_nbytes(entry, sealed=sealed) == pack(entry, META, compression=Compression.NONE, seal=seal).nbytes
    assert record_nbytes(entry, sealed=sealed) >= pack(entry, META, seal=seal).nbytes


@pytest.mark.parametrize("attrs", [{"a": 'quote " and \\ and é'}, {"n": [1, 2.5, None], "relative_error": 1e-300}, {}])
def test_the_price_holds_whatever_a_codec_notes(attrs: dict[str, object]) -> None:
    part = torch.arange(5, dtype=torch.uint8)
    tensors = {name: EncodedTensor(TensorSpec("float32", (2,)), "odd", {"": part, "s": part}, attrs) for name in "ab"}
    entry = Entry(Key(b"k"), tensors)
    for form in (entry, packed(entry)):
        assert record_nbytes(form) == pack(form, META).nbytes


def test_what_samples_promise_and_the_rest_does_not_keep_is_stored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a record could be larger than its price."""
    monkeypatch.setattr("kvstore.entries.compression.GAIN_MIN", -1.0)
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
    assert compress([noise], 2) == (Compression.NONE, [noise])
    assert compress([noise], 2, Compression.ZSTD)[0] is Compression.ZSTD, "who asks for a way gets it"
    assert compress([noise // 16], 2)[0] is Compression.ZSTD_SHUFFLE_2


def waiting(cold: Cold, held: Holder, entry: Entry) -> tuple[int, int]:
    """What an entry costs while it waits, and once it is written."""
    with cold._changed:  # the writer waits
        before = cold.used_nbytes
        held.metas[entry.key] = replace(META, expires_at=1e12)
        cold.displace(entry)
        cold.put(entry)
        estimate = cold.used_nbytes - before
    cold.flush()
    return estimate, cold.used_nbytes - before


@pytest.mark.parametrize("nbytes", [1, 100, 4000, 64 << 10, 300_000])
@pytest.mark.parametrize("codec", ["raw", "nf4", "nf4-kv2", "nf4-kv", "int8"])
def test_a_waiting_record_costs_what_it_costs_on_the_disk(tmp_path: Path, nbytes: int, codec: str) -> None:
    holder = Holder(tmp_path)
    x = torch.randint(0, 256, (nbytes // 128 * 128 or nbytes,), dtype=torch.uint8)
    if codec != "raw":
        x = torch.randn(1, max(1, nbytes // 128), 1, 128, generator=torch.Generator().manual_seed(1))
    entry = raw_entry(key(1), {"k": x, "v": x})
    below = entry if codec == "raw" else packed(encode_entry(entry, codec_for(codec)))
    estimate, real = waiting(holder.cold, holder, below)
    assert estimate == real
    assert estimate >= cost_of(sum(len(part) for part in _parts(below))) > ROW_NBYTES
    holder.cold.close()


def _parts(entry: Entry) -> list[bytes]:
    return [
        part.reshape(-1).view(torch.uint8).numpy().tobytes()
        for t in entry.tensors.values()
        for part in t.parts.values()
    ]


def test_nothing_is_evicted_while_what_waits_will_fit(tmp_path: Path) -> None:
    """2,500 records of 768 bytes each in 4 MiB: while the writer was behind, 160 and more of them were evicted."""
    holder = Holder(tmp_path, capacity_nbytes=4 << 20, free_min_fraction=0.0)
    with holder.cold._changed:  # the writer waits
        for n in range(2500):
            holder.put(key(n), n % 256, nbytes=100)
        waiting_nbytes = holder.cold.used_nbytes
    holder.cold.flush()
    assert holder.dropped == []
    assert len(holder.cold) == 2500
    assert holder.cold.used_nbytes == waiting_nbytes
    holder.cold.close()


def test_a_sealed_record_is_priced_with_its_seal(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("11" * 32 + "\n")
    keys.chmod(0o600)
    holder = Holder(tmp_path / "cold", key_files={"*": str(keys)})
    for nbytes in range(40, 104, 8):  # over every place in a unit of 64 bytes
        estimate, real = waiting(
            holder.cold, holder, raw_entry(key(nbytes), {"x": torch.zeros(nbytes, dtype=torch.uint8)})
        )
        assert estimate == real
    holder.cold.close()
