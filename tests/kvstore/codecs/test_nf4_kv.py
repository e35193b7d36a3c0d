"""nf4-kv: its bytes, its bits a value, what it keeps, its receipt, and what it refuses."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.codecs import codec_named, decode_entry, encode_entry
from kvstore.codecs import nf4_kv as module
from kvstore.codecs.adaptive import Adaptive
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.nf4 import NF4, relative_error
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.receipt import errors_by_head
from kvstore.dtypes import TensorSpec
from kvstore.entries import record
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.errors import CodecError, ConfigError
from kvstore.kernels import kv_kernel, reference_kv
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.transcode import raw_entry

PATHS = {"kernel": kv_kernel, "reference": lambda _device: None}
"""Ways to the same bytes; the first is the second where no kernel is installed."""
if os.environ.get("TRITON_INTERPRET") == "1":  # as tests/kvstore/kernels/test_triton.py runs this file
    from kvstore.kernels import cuda_kv

    cuda_kv.TILE = 1 << 14  # the interpreter takes as long for a large tile as for a small one
    PATHS["triton"] = lambda _x: cuda_kv

GOLDEN = Path(__file__).parents[2] / "golden" / "nf4-kv.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 256, 3, 64),
    (1, 70, 2, 80),
    (3, 40, 2, 128),
    (2, 17, 1, 96),
    (1, 1, 1, 64),
    (5, 130, 33),
    (64, 64),
    (70,),
]


def keys(shape, dtype=torch.float32, seed=0):
    """Random keys with what keys have: channels far from zero, and a first token unlike the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) + 5 * torch.randn(shape[-1], generator=g)
    if len(shape) > 2:
        x[..., 0, :, :] *= -3
    return x.to(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def parts_of(encoded):
    return {name: (str(part.dtype), tuple(part.shape), bits(part)) for name, part in encoded.parts.items()}


def measured(encoded, x):
    return relative_error(x, NF4KV().decode(encoded))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(module, "kv_kernel", PATHS[request.param])
    return request.param


@pytest.mark.parametrize("name", ["k", "v", "kv", "state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_type_comes_back_close(path, dtype, shape, name):
    x = keys(shape, dtype)
    encoded = NF4KV().encode(name, x)
    decoded = NF4KV().decode(encoded)
    assert decoded.dtype == x.dtype
    assert decoded.shape == x.shape
    assert relative_error(x, decoded) < 0.12
    out = torch.empty_like(x)
    assert NF4KV().decode(encoded, out) is out
    assert bits(out) == bits(decoded)


@pytest.mark.parametrize("start", [None, True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fast_path", [name for name in PATHS if name != "reference"])
def test_the_kernel_writes_the_bytes_of_the_reference(fast_path, dtype, shape, start, monkeypatch):
    kernel = PATHS[fast_path]
    if kernel(torch.device("cpu")) is None:
        pytest.skip("the compiled kernel is not installed (make kernel)")
    monkeypatch.setattr(module, "kv_kernel", kernel)
    for name in ("k", "v", "kv"):
        x = keys(shape, dtype, seed=3)
        hints = Hints(prefix_start=start)
        fast = NF4KV().encode(name, x, hints)
        decoded = NF4KV().decode(fast)
        with monkeypatch.context() as patch:
            patch.setattr(module, "kv_kernel", PATHS["reference"])
            slow = NF4KV().encode(name, x, hints)
            assert parts_of(fast) == parts_of(slow)
            assert {**fast.attrs, "relative_error": 0} == {**slow.attrs, "relative_error": 0}
            assert fast.relative_error == pytest.approx(slow.relative_error, rel=1e-3)
            assert bits(decoded) == bits(NF4KV().decode(slow))


def test_a_chunk_of_256_tokens_takes_at_most_4_4_bits_a_value():
    """Everything counted: keys and values together, side data, and what holding the parts costs."""
    shape = (30, 256, 3, 64)
    entry = raw_entry(Key(b"chunk"), {"k": keys(shape), "v": torch.randn(shape)})
    encoded = encode_entry(entry, NF4KV())
    assert encoded.encoding == "nf4-kv"
    assert encoded.nbytes * 8 / (entry.value_nbytes / 4) <= 4.4


def test_16_mib_of_float32_takes_at_most_2_2_mib():
    shape = (8, 256, 8, 128)
    entry = raw_entry(Key(b"large"), {"k": keys(shape), "v": torch.randn(shape)})
    assert entry.value_nbytes == 16 << 20
    encoded = encode_entry(entry, NF4KV())
    allocated = sum(p.untyped_storage().nbytes() for t in encoded.tensors.values() for p in t.parts.values())
    assert allocated <= encoded.nbytes <= 2.2 * (1 << 20)


def test_the_first_tokens_of_a_prefix_are_kept_exactly_in_16_bits(path):
    x = keys((2, 256, 3, 64), torch.bfloat16)
    x[:, :4] *= 40
    decoded = NF4KV().decode(NF4KV().encode("k", x, Hints(prefix_start=True)))
    assert torch.equal(decoded[:, :4], x[:, :4])


def test_an_outlying_token_elsewhere_is_found_and_spoils_nothing(path):
    x = keys((2, 256, 3, 64))
    x[:, 0] = x[:, 1]
    clean = NF4KV().encode("k", x, Hints(prefix_start=False))
    x[:, 77] += 60
    spoilt = NF4KV().encode("k", x, Hints(prefix_start=False))
    assert clean.attrs["kept"] == ""
    assert spoilt.attrs["kept"] == "77"
    others = torch.arange(256) != 77
    error = relative_error(x[:, others], NF4KV().decode(spoilt)[:, others])
    assert error < 1.05 * measured(clean, x.index_copy(1, torch.tensor([77]), x[:, 1:2]))


def test_centring_and_rotation_beat_plain_nf4_on_keys():
    x = keys((4, 256, 4, 64))
    plain = relative_error(x, NF4().decode(NF4().encode("k", x)))
    assert measured(NF4KV().encode("k", x), x) < plain / 3


def test_the_receipt_is_the_error(path):
    for name in ("k", "v", "kv", "other"):
        x = keys((3, 200, 2, 64))
        encoded = NF4KV().encode(name, x)
        by_head = errors_by_head(NF4KV(), name, x, encoded, NO_HINTS)
        assert encoded.relative_error == pytest.approx(max(float(e.max()) for e in by_head), rel=0.01)
        assert encoded.relative_error >= 0.99 * measured(encoded, x)


def test_the_receipt_and_the_bytes_survive_a_record():
    key = Key(b"a" * 32)
    meta = Meta(created_at=1000.0, expires_at=4600.0, ttl_s=3600.0, value_nbytes=0)
    entry = encode_entry(raw_entry(key, {"k": keys((2, 100, 3, 64)), "kv": keys((2, 40, 2, 128))}), NF4KV())
    again = record.unpack(record.pack(entry, meta).to_bytes(), key)
    for name, tensor in entry.tensors.items():
        assert parts_of(again.tensors[name]) == parts_of(tensor)
        assert dict(again.tensors[name].attrs) == dict(tensor.attrs)
    assert {n: bits(x) for n, x in decode_entry(again).items()} == {n: bits(x) for n, x in decode_entry(entry).items()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_raw(path, bad):
    for token in (0, 3, 100):
        x = keys((2, 128, 2, 64))
        x[1, token, 1, 5] = bad
        for codec in (NF4KV(), NF4(), Int8()):
            with pytest.raises(CodecError):
                codec.encode("k", x)
            assert encode_entry(raw_entry(Key(b"k"), {"k": x}), codec).encoding == "raw"


def test_integers_and_scraps_stay_raw():
    tensors = {"ids": torch.arange(1000), "flags": torch.ones(100, dtype=torch.bool), "few": torch.randn(10)}
    assert encode_entry(raw_entry(Key(b"k"), tensors), NF4KV()).encoding == "raw"


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-20, 1e-12, 1e12, 1e15])
def test_tiny_and_huge_values_decode_to_finite_ones(path, scale):
    x = keys((1, 64, 1, 64)) * scale
    decoded = NF4KV().decode(NF4KV().encode("k", x))
    assert torch.isfinite(decoded).all()
    if scale >= 1e-12:
        assert relative_error(x, decoded) < 0.12


def test_values_whose_squares_overflow_are_refused(path):
    with pytest.raises(CodecError):
        NF4KV().encode("v", torch.full((1, 64, 1, 64), 1e30))


def _damaged(encoded):
    for suffix, part in encoded.parts.items():
        others = {k: v for k, v in encoded.parts.items() if k != suffix}
        yield f"{suffix} missing", replace(encoded, parts=others)
        for what, new in (
            ("short", part.reshape(-1)[:-1]),
            ("long", torch.cat((part.reshape(-1), part.reshape(-1)[:1]))),
            ("of another type", part.to(torch.float64)),
        ):
            yield f"{suffix} {what}", replace(encoded, parts={**others, suffix: new})
    for key in ("role", "token_axis", "kept"):
        for value in (None, "x", -1, 3.5, "0,0", "9,1", "-1", "100000", True, ",".join(map(str, range(100)))):
            yield f"{key}={value}", replace(encoded, attrs={**encoded.attrs, key: value})
    yield "top", replace(encoded, parts={**encoded.parts, "scale_top": torch.full_like(encoded.parts["scale_top"], -5)})
    yield "spec", replace(encoded, spec=TensorSpec("int64", encoded.spec.shape))
    yield "empty", replace(encoded, spec=TensorSpec("float32", (0, 1)))
    yield "larger", replace(encoded, spec=TensorSpec("float32", (200, *encoded.spec.shape[1:])))


def test_malformed_parts_and_attributes_raise(path):
    for name in ("k", "v", "kv"):
        for what, broken in _damaged(NF4KV().encode(name, keys((2, 100, 3, 64)))):
            try:
                NF4KV().decode(broken)
            except CodecError:
                continue
            pytest.fail(f"{name}: {what} was accepted")


def test_any_bytes_in_the_right_places_decode_without_a_crash(path):
    """Codes and scales are not validated one by one: whatever they are, decoding stays inside its buffers."""
    encoded = NF4KV().encode("k", keys((2, 100, 3, 64)))
    g = torch.Generator().manual_seed(1)
    parts = dict(encoded.parts)
    for suffix in ("", "scale", "mean"):
        noise = torch.randint(-128, 128, parts[suffix].shape, generator=g)
        parts[suffix] = noise.to(torch.int16).view(torch.uint8)[..., ::2].contiguous().view(parts[suffix].dtype)
    decoded = NF4KV().decode(replace(encoded, parts=parts))
    assert decoded.shape == encoded.spec.shape


def test_golden_vectors_are_written_and_read_the_same_for_ever(path):
    for case in json.loads(GOLDEN.read_text()):
        x = torch.frombuffer(bytearray.fromhex(case["input"]), dtype=getattr(torch, case["dtype"])).view(case["shape"])
        parts = {
            name: torch.frombuffer(bytearray.fromhex(data), dtype=getattr(torch, dtype)).view(shape)
            for name, (dtype, shape, data) in case["parts"].items()
        }
        stored = EncodedTensor(TensorSpec(case["dtype"], tuple(case["shape"])), "nf4-kv", parts, case["attrs"])
        assert bits(codec_named("nf4-kv").decode(stored)).hex() == case["decoded"]
        assert parts_of(NF4KV().encode(case["name"], x)) == parts_of(stored)


def test_the_search_tables_have_at_most_two_thresholds_a_bucket():
    """What the AVX2 search looks up: 16 runs of 16 integers, two thresholds each."""
    from kvstore.kernels.tables import table

    for clip in reference_kv.CLIPS:
        below = torch.floor(table("thresholds", torch.device("cpu")).double() * (127 * clip))
        counts = torch.bincount(((below + 128) // 16).long(), minlength=16)
        assert counts.max() <= 2


@pytest.mark.parametrize(("bound", "chosen"), [(0.2, "nf4-kv2"), (0.02, "int8"), (0.0, "raw")])
def test_adaptive_picks_the_cheapest_encoding_that_keeps_its_bound(bound, chosen):
    x = torch.randn(2, 128, 3, 64, generator=torch.Generator().manual_seed(5))
    encoded = Adaptive(bound).encode("k", x)
    assert encoded.encoding == chosen
    assert encoded.relative_error <= bound
    assert relative_error(x, Adaptive(bound).decode(encoded)) <= encoded.relative_error


def test_adaptive_chooses_for_each_tensor_of_an_entry():
    smooth, rough = torch.ones(2, 128, 2, 64), torch.randn(2, 128, 2, 64)
    entry = encode_entry(raw_entry(Key(b"k"), {"k": smooth, "v": rough}), Adaptive(0.05))
    assert [t.encoding for t in entry.tensors.values()] == ["nf4-kv2", "int8"]


def test_an_entry_that_only_raw_keeps_within_the_bound_is_not_lossy():
    entry = encode_entry(raw_entry(Key(b"k"), {"k": torch.randn(2, 128, 2, 64)}), Adaptive(0.0))
    assert isinstance(entry, Entry)
    assert entry.encoding == "raw"
    assert not entry.lossy


@pytest.mark.parametrize("bound", [-0.1, 1.0, float("nan")])
def test_a_bound_that_is_no_fraction_is_refused(bound):
    with pytest.raises(ConfigError):
        Adaptive(bound)


@pytest.mark.parametrize("shape", [(2, 10, 3, 64), (65,), (7, 5), (1, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_keeps_every_value_within_one_step(dtype, shape):
    x = keys(shape, dtype)
    encoded = Int8().encode("k", x)
    assert encoded.relative_error < 0.01
    assert relative_error(x, Int8().decode(encoded)) < 0.012
    for suffix in ("", "scale"):
        with pytest.raises(CodecError):
            Int8().decode(replace(encoded, parts={**encoded.parts, suffix: encoded.parts[suffix][:-1]}))
