"""The receipt: a fraction of the content, measured on what is decoded; no infinities, no lost values called exact."""

import pytest
import torch

from kvstore.codecs import LOSSY_MIN_NUMEL, codec_for, codec_named, decode_entry, encode_entry, encode_measured
from kvstore.codecs import nf4_kv as module
from kvstore.codecs.adaptive import Adaptive, runs_of
from kvstore.codecs.choice import CodecChoice
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.nf4 import NF4, relative_error
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.codecs.receipt import rotary_of
from kvstore.config import MAX_RELATIVE_ERROR, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.kernels import cpu_kernel, reference_content
from kvstore.kernels.cpu import STILL, Rotary
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODECS = [NF4KV(), NF4(), Int8(), codec_for("auto"), codec_for("auto", MAX_RELATIVE_ERROR)]


def biased(bias, d=128, tokens=256, layers=1, *, near=False, dtype=torch.float32):
    """Content of sigma 1 and, on two pairs that turn within 64 tokens, a bias. Returns (keys, content)."""
    said = torch.randn(layers, tokens, 2, d, generator=torch.Generator().manual_seed(d))
    keys, t = said.clone(), torch.arange(tokens, dtype=torch.float64)
    for pair, turn in ((3, 0.71), (9, 0.23)):
        a, b = (2 * pair, 2 * pair + 1) if near else (pair, pair + d // 2)
        keys[..., a] += (bias * torch.cos(turn * t + pair)).float()[:, None]
        keys[..., b] += (bias * torch.sin(turn * t + pair)).float()[:, None]
    return keys.to(dtype), said


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(module, "kv_kernel", lambda _x: None)
        monkeypatch.setattr("kvstore.codecs.nf4_kv2.kv_kernel", lambda _x: None)
        monkeypatch.setattr("kvstore.codecs.receipt.kv_kernel", lambda _x: None)
    elif cpu_kernel(torch.empty(1)) is None:
        pytest.skip("the compiled kernel is not installed (make kernel)")
    return request.param


@pytest.mark.parametrize("near", [False, True], ids=["half apart", "neighbours"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("bias", [0, 10, 50, 150, 400])
def test_the_receipt_of_biased_keys_is_the_error_of_their_content(path, bias, d, near):
    """|K| is bias there: a fraction of |K| says 0.014 where 0.96 of what the keys say is lost."""
    keys, said = biased(bias, d, near=near)
    for codec in (NF4KV(), NF4KV2(), Int8()):
        encoded = encode_measured(codec, "k", keys, Hints(prefix_start=False))
        true = (codec.decode(encoded) - keys).square().sum(dim=(0, 1, 3)) / said.square().sum(dim=(0, 1, 3))
        assert encoded.relative_error == pytest.approx(float(true.max().sqrt()), rel=0.15)


@pytest.mark.parametrize("bias", [10, 50, 150, 400])
def test_a_bound_sends_biased_layers_to_a_better_encoding_and_no_others(bias):
    """With codecs whose means stand still: nf4-kv2 keeps the bound in every layer."""
    keys = torch.cat((biased(0)[0], biased(bias)[0], biased(0)[0], biased(0)[0]))
    assert encode_measured(Adaptive(0.1), "k", keys).encoding == "nf4-kv2"
    encoded = encode_measured(Adaptive(0.1, (NF4KV(), Int8())), "k", keys)
    assert encoded.relative_error <= 0.1
    kinds = {start: kind for start, _stop, kind, _attrs in encoded.attrs["runs"]}
    assert kinds == {0: "nf4-kv", 1: "int8" if bias == 10 else "raw", 2: "nf4-kv"}
    values = encode_measured(Adaptive(0.1), "v", keys)
    assert values.encoding == "nf4-kv2" or values.relative_error <= 0.1


def test_by_default_a_store_does_not_ruin_biased_keys():
    keys, said = biased(150, 64, layers=3)
    entry = encode_entry(raw_entry(Key(b"k"), {"k": keys}), CodecChoice(WarmConfig()).codec_of(""))
    error = (decode_entry(entry)["k"] - keys).norm() / said.norm()
    assert error <= MAX_RELATIVE_ERROR
    for codec, lost in (("auto", 0.0), ("nf4-kv", 0.7)):
        policy = CodecChoice(WarmConfig(codec=codec, max_relative_error=0))
        unbound = encode_entry(raw_entry(Key(b"k"), {"k": keys}), policy.codec_of(""))
        assert unbound.encoding == {"auto": "nf4-kv2"}.get(codec, codec)
        assert lost < unbound.receipt["k"] < lost + 0.5


def test_the_worst_head_counts_and_not_the_whole_tensor():
    """One head of 32 is lost: of the tensor that is little."""
    keys = torch.randn(8, 256, 4, 64, generator=torch.Generator().manual_seed(1))
    assert encode_measured(NF4KV(), "k", keys).relative_error < 0.12
    keys[2, :, 1] = biased(50, 64)[0][0, :, 0]
    encoded = encode_measured(NF4KV(), "k", keys)
    others = [head for head in range(4) if head != 1]
    assert relative_error(keys[:, :, others], NF4KV().decode(encoded)[:, :, others]) < 0.12
    assert encoded.relative_error > 0.4


@pytest.mark.parametrize("scale", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k", "v", "kv", "state"])
def test_no_finite_value_comes_back_as_an_infinity(path, dtype, scale, name):
    """Near the type's largest value, where rounding up or a scale beyond the block's largest leaves the type."""
    g = torch.Generator().manual_seed(2)
    most = torch.finfo(dtype).max * scale
    for x in (
        (torch.rand(1, 40, 2, 64, generator=g, dtype=torch.float64) * 2 - 1) * most,
        torch.randn(1, 40, 2, 64, generator=g, dtype=torch.float64).sign() * most,
        torch.full((1, 40, 2, 64), most, dtype=torch.float64),
    ):
        values = x.to(dtype)
        for codec in CODECS:
            entry = encode_entry(raw_entry(Key(b"k"), {name: values}), codec)
            assert torch.isfinite(decode_entry(entry)[name]).all(), codec.name
            assert entry.receipt[name] < float("inf")


class Overflowing:
    """A new codec whose author forgot that values may be large."""

    name, lossy = "new", True

    def encode(self, name, x, hints=NO_HINTS):
        del name, hints
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        return EncodedTensor(spec, "new", {"": x.clone()}, {"relative_error": 0.0})

    def decode(self, encoded, out=None):
        return encoded.parts[""] * 1.3


def test_a_codec_that_forgets_to_look_is_looked_after():
    x = torch.randn(2, 64, 2, 64, generator=torch.Generator().manual_seed(1)).half()
    found = encode_entry(raw_entry(Key(b"k"), {"k": x}), Overflowing()).tensors["k"]
    assert found.relative_error == pytest.approx(0.3, rel=0.05)
    assert encode_entry(raw_entry(Key(b"k"), {"k": x * 14000}), Overflowing()).encoding == "raw"


@pytest.mark.parametrize("scale", [1e-15, 1e-18, 1e-25, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k", "v", "state"])
def test_values_lost_whole_are_never_called_exact(path, dtype, scale, name):
    x = (torch.randn(1, 40, 2, 64, generator=torch.Generator().manual_seed(4)) * scale).to(dtype)
    for codec in CODECS:
        entry = encode_entry(raw_entry(Key(b"k"), {name: x}), codec)
        decoded, told = decode_entry(entry)[name], entry.receipt[name]
        assert (told == 0.0) == torch.equal(decoded, x)
        if not decoded.any():
            assert told >= 0.99
    assert encode_entry(raw_entry(Key(b"k"), {name: x}), CODECS[-1]).receipt[name] <= MAX_RELATIVE_ERROR


def test_a_lost_sign_of_zero_is_not_bit_for_bit():
    entry = encode_entry(raw_entry(Key(b"k"), {"v": torch.full((1, 64, 1, 64), -0.0)}), NF4KV())
    assert 0.0 < entry.receipt["v"] < 1e-300
    assert encode_entry(raw_entry(Key(b"k"), {"v": torch.zeros(1, 64, 1, 64)}), NF4KV()).receipt["v"] == 0.0


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 600), (torch.bfloat16, 100)], ids=str)
def test_rounding_to_the_tensor_s_type_is_in_the_receipt(dtype, mean):
    """Beside a large mean a 16-bit type has few values: rounding takes most of the codec's own error of 0.08 away."""
    keys = (torch.randn(1, 128, 2, 64, generator=torch.Generator().manual_seed(5)) + mean).to(dtype)
    encoded = encode_measured(NF4KV(), "k", keys)
    left = keys.double() - keys.double().mean(dim=1, keepdim=True)
    true = (NF4KV().decode(encoded).double() - keys.double()).norm() / left.norm()
    assert encoded.relative_error == pytest.approx(float(true), rel=0.25)
    assert true < 0.05


def test_what_was_lossy_before_keeps_its_error():
    entry = raw_entry(Key(b"k"), {"v": torch.randn(1, 64, 1, 64)}, lossy=True, receipt={"v": 0.25})
    assert encode_entry(entry, Int8()).receipt["v"] > 0.25


@pytest.mark.parametrize(
    "rotary", [Rotary(64, interleaved=False), Rotary(64, interleaved=True), Rotary(32, interleaved=False)]
)
def test_how_keys_turn_is_found_in_the_keys(rotary):
    x, t = torch.randn(3, 100, 2, 64, generator=torch.Generator().manual_seed(6)), torch.arange(100.0)
    half = rotary.channels // 2
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        x[..., a] += 12 * torch.cos(t * 0.8**pair)[:, None]
        x[..., b] += 12 * torch.sin(t * 0.8**pair)[:, None]
    assert rotary_of(x, None) == rotary
    left, whole = reference_content.energies(x, rotary).sum(dim=(0, 1)).tolist()
    assert left == pytest.approx(3 * 100 * 2 * 64, rel=0.15)
    assert whole > 4 * left or rotary.channels < 64
    assert reference_content.energies(x, STILL)[..., 0].sum() > 1.5 * left


def test_runs_of_layers_are_merged_upwards_until_they_are_few():
    ranks = [0, 1, 0, 2, 0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 2]
    runs = runs_of(ranks, 4)
    assert len(runs) <= 4
    assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])]
    given = [rank for start, stop, rank in runs for _ in range(start, stop)]
    assert all(rank >= due for rank, due in zip(given, ranks, strict=True))
    assert runs_of([1, 1, 0]) == [(0, 2, 1), (2, 3, 0)]


def test_every_codec_named_is_measured():
    x = torch.randn(2, LOSSY_MIN_NUMEL, 2, 64)
    for name in ("nf4", "nf4-kv", "nf4-kv2", "int8"):
        encoded = encode_measured(codec_named(name), "k", x)
        assert 0 < encoded.relative_error < 0.2
