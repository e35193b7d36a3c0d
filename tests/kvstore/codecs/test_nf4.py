"""NF4: what it promises about bits, sizes and malformed parts. bitsandbytes itself is the oracle."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.codecs import codec_named, nf4, parts
from kvstore.codecs.nf4 import NF4, bitsandbytes_tensors
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError

GOLDEN = Path(__file__).parents[2] / "golden" / "nf4.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 3, 63, 64, 65, 128, 4097, 64 * 1000, 64 * 256 * 5 + 33]


def _bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _values(kind: str, n: int) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    block = torch.arange(n) // 64
    match kind:
        case "gauss":
            return x
        case "denormal":
            return x * 1e-39
        case "huge":
            return x / x.abs().max() * 1e34
        case "zero blocks":
            return x * (block % 2)
        case _:
            return x * torch.exp(torch.sin(block.float()) * 4)


KINDS = ["gauss", "denormal", "huge", "zero blocks", "uneven"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype, kind: str) -> None:
    """Same packed bytes, same 8-bit scales, same nested scales, same offset, at every length."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    for n in SIZES:
        x = _values(kind, n).to(dtype)
        if not torch.isfinite(x).all():
            pytest.skip("the values do not fit float16")
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        mine = NF4().encode("k", x)
        assert torch.equal(mine.parts[""], packed.view(-1)), n
        assert torch.equal(mine.parts["absmax"], state.absmax), n
        assert torch.equal(mine.parts["nested_absmax"], state.state2.absmax), n
        assert mine.attrs["nested_offset"] == float(state.offset), n


@pytest.mark.parametrize("kind", ["gauss", "zero blocks", "uneven"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_bits_are_those_of_bitsandbytes(dtype: torch.dtype, kind: str) -> None:
    """Decoding gives bitsandbytes' bits. Even lengths only: its odd path compiles at run time."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    for n in [2, 64, 128, 64 * 1000, 64 * 256 * 5 + 32]:
        x = _values(kind, n).to(dtype)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        expected = bnb.dequantize_4bit(packed, state).view(-1)
        assert _bits(NF4().decode(NF4().encode("k", x))) == _bits(expected), n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_the_receipt_is_the_error(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured while encoding, in whole numbers: within 0.001 of what decoding shows."""
    if path == "reference":
        monkeypatch.setattr(nf4, "cpu_kernel", lambda _x: None)
    for n in (128, 200, 64 * 300 + 7):
        x = _values(kind, n)
        encoded = NF4().encode("x", x)
        error = (NF4().decode(encoded).double() - x.double()).norm() / x.double().norm()
        assert encoded.relative_error == pytest.approx(float(error), abs=0.001)


def test_an_export_is_read_back_by_bitsandbytes() -> None:
    """The exported tensors rebuild a QuantState that decodes to the very same tensor."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = _values("gauss", 4 * 96 * 64).view(4, 96, 64).to(torch.bfloat16)
    encoded = NF4().encode("k", x)
    exported = bitsandbytes_tensors("k", encoded)
    assert set(exported) == {
        "k", "k.absmax", "k.quant_map", "k.nested_absmax", "k.nested_quant_map", "k.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    side = {key: value for key, value in exported.items() if key != "k"}
    state = bnb.QuantState.from_dict(side, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(exported["k"], state), NF4().decode(encoded))


def test_every_threshold_splits_exactly_where_it_should() -> None:
    """One float below, at, and above each threshold: a tie takes the lower code."""
    from kvstore.kernels.reference import codes_of
    from kvstore.kernels.tables import table

    thresholds = table("thresholds", torch.device("cpu"))
    expected = torch.arange(15, dtype=torch.uint8)
    below = torch.nextafter(thresholds, torch.tensor(-2.0))
    above = torch.nextafter(thresholds, torch.tensor(2.0))
    assert torch.equal(codes_of(below), expected)
    assert torch.equal(codes_of(thresholds), expected)
    assert torch.equal(codes_of(above), expected + 1)


def test_decoding_fills_the_given_tensor() -> None:
    """`out` is returned itself, filled with the same bits as fresh memory."""
    encoded = NF4().encode("k", _values("gauss", 1000))
    out = torch.empty(1000)
    assert NF4().decode(encoded, out) is out
    assert torch.equal(out, NF4().decode(encoded))


def test_it_is_as_small_as_it_says() -> None:
    """4 bits a value, 8 bits a block of 64, 32 bits for 256 blocks, and nothing else."""
    n = 64 * 256 * 4
    parts = NF4().encode("k", torch.ones(n)).parts
    assert sum(p.untyped_storage().nbytes() for p in parts.values()) == n // 2 + n // 64 + 4 * 4


def test_golden_vectors_decode_to_the_same_bits_for_ever() -> None:
    """Records written by an older version decode to the bits they decoded to then."""
    for case in json.loads(GOLDEN.read_text()):
        parts = {
            "": torch.frombuffer(bytearray.fromhex(case["codes"]), dtype=torch.uint8),
            "absmax": torch.frombuffer(bytearray.fromhex(case["absmax"]), dtype=torch.uint8),
            "nested_absmax": torch.frombuffer(bytearray.fromhex(case["nested_absmax"]), dtype=torch.float32),
        }
        encoded = EncodedTensor(TensorSpec(case["dtype"], tuple(case["shape"])), "nf4", parts, case["attrs"])
        assert _bits(NF4().decode(encoded)).hex() == case["decoded"]
        if "input" in case:
            raw = torch.frombuffer(bytearray.fromhex(case["input"]), dtype=getattr(torch, case["dtype"]))
            again = NF4().encode("k", raw.view(case["shape"]))
            assert {name: _bits(p).hex() for name, p in again.parts.items()} == {
                name: _bits(p).hex() for name, p in parts.items()
            }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(bad: float) -> None:
    """One bad value anywhere, also in a short last block."""
    for at in (0, 100, 129):
        x = torch.ones(130)
        x[at] = bad
        with pytest.raises(CodecError):
            NF4().encode("k", x)


def test_values_that_would_decode_to_infinity_are_refused() -> None:
    """float16 at its limit: the 8-bit scale may round up beyond it."""
    x = torch.full((64 * 3,), 65504.0, dtype=torch.float16)
    x[:64] = 1.0
    try:
        decoded = NF4().decode(NF4().encode("k", x))
    except CodecError:
        return
    assert torch.isfinite(decoded).all()


def test_scales_whose_mean_overflows_are_refused() -> None:
    """Finite values near float32's limit have no finite mean: bitsandbytes writes NaN there."""
    with pytest.raises(CodecError):
        NF4().encode("k", torch.full((64 * 100,), 1e38))


def _valid() -> EncodedTensor:
    return NF4().encode("k", _values("gauss", 1000))


@pytest.mark.parametrize("suffix", ["", "absmax", "nested_absmax"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "type", "strided"])
def test_parts_that_do_not_belong_together_raise(suffix: str, damage: str) -> None:
    """Each part missing, shorter, longer, of another type, or not dense."""
    valid = _valid()
    part = valid.parts[suffix]
    parts = dict(valid.parts)
    match damage:
        case "missing":
            del parts[suffix]
        case "short":
            parts[suffix] = part[:-1]
        case "long":
            parts[suffix] = torch.cat((part, part[:1]))
        case "type":
            parts[suffix] = part.to(torch.int32)
        case _:
            parts[suffix] = torch.stack((part, part), dim=1)[:, 0]
            if part.numel() == 1:
                return
    with pytest.raises(CodecError):
        codec_named("nf4").decode(replace(valid, parts=parts))


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"blocksize": 128, "nested_blocksize": 256, "nested_offset": 1.0},
        {"blocksize": 64, "nested_blocksize": 256},
        {"blocksize": 64, "nested_blocksize": 256, "nested_offset": "1.0"},
        {"blocksize": 64, "nested_blocksize": 256, "nested_offset": True},
    ],
)
def test_attributes_that_do_not_belong_raise(attrs: dict[str, object]) -> None:
    """Missing, wrong or of another type."""
    with pytest.raises(CodecError):
        NF4().decode(replace(_valid(), attrs=attrs))


def test_an_out_that_does_not_fit_raises() -> None:
    """Wrong dtype, wrong shape, not contiguous."""
    for out in (torch.empty(1000, dtype=torch.float16), torch.empty(999), torch.empty(1000, 2)[:, 0]):
        with pytest.raises(CodecError):
            NF4().decode(_valid(), out)


def test_a_spec_of_another_dtype_raises() -> None:
    """An NF4 record that claims to hold integers was not written by us."""
    with pytest.raises(CodecError):
        NF4().decode(replace(_valid(), spec=TensorSpec("int32", (1000,))))


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_any_bytes_and_attributes_decode_or_raise(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuzz: parts of random bytes and random lengths, attributes of any JSON, never more than a CodecError."""
    if path == "reference":
        monkeypatch.setattr(nf4, "cpu_kernel", lambda _x: None)
    g = torch.Generator().manual_seed(5)

    def number(high: int) -> int:
        return int(torch.randint(high, (1,), generator=g))

    odd: list[object] = [64, 256, 0.5, -1, 1e308, float("nan"), float("inf"), None, True, "64", [], {}]
    decoded = 0
    for _ in range(300):
        n = 1 + number(700)
        b = (n + 63) // 64
        lengths = {"": (n + 1) // 2, "absmax": b, "nested_absmax": 4 * ((b + 255) // 256)}
        parts = {s: torch.randint(0, 256, (k,), generator=g, dtype=torch.uint8) for s, k in lengths.items()}
        random_scales = parts["nested_absmax"].view(torch.float32)
        parts["nested_absmax"] = 100 * torch.rand(random_scales.numel(), generator=g)
        attrs: dict[str, object] = {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.25}
        spoiled = number(5)
        if spoiled == 1:
            attrs[list(attrs)[number(3)]] = odd[number(len(odd))]
        elif spoiled == 2:
            suffix = list(parts)[number(3)]
            parts[suffix] = parts[suffix][: number(parts[suffix].numel() + 1)]
        elif spoiled == 4:
            parts["nested_absmax"] = random_scales
        spec = TensorSpec(("float32", "float16", "bfloat16", "int8")[number(3 + (spoiled == 3))], (n,))
        try:
            found = NF4().decode(EncodedTensor(spec, "nf4", parts, attrs))
            assert found.shape == (n,)
            assert found.isfinite().all()
            decoded += 1
        except CodecError:
            assert spoiled
    assert decoded > 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("length", [1, 5, 64, 1000, 4099])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(dtype: torch.dtype, lost: float, length: int) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert parts.finite(x)
    for at in {0, length // 3, length // 2, length - 1}:
        damaged = x.clone()
        damaged[at] = lost
        assert not parts.finite(damaged)


def test_no_values_are_finite_values() -> None:
    assert parts.finite(torch.empty(0))
