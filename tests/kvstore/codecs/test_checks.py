"""What decoding asks of parts and attributes, check by check: before memory is made, and before a value is believed."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstore import codecs
from kvstore.arrays import check_specs
from kvstore.codecs import check_entry, codec_named, decode_entry
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.layers import _runs
from kvstore.codecs.outside import OutsideCodec
from kvstore.codecs.parts import kept_indexes, planes_of, standing_apart, stored_role, stored_token_axis
from kvstore.entries.entry import EncodedTensor, Entry, TensorSpec
from kvstore.errors import CodecError, InvalidEntry
from kvstore.hit import TensorInfo
from kvstore.keys import Key


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ()), ("0", (0,)), ("0,1,2", (0, 1, 2)), ("1,9", (1, 9)), ("0,1,2,3,4,5,6,7,8", (*range(9),))],
)
def test_kept_tokens_are_read(text: str, kept: tuple[int, ...]) -> None:
    assert kept_indexes(text, 10) == kept


@pytest.mark.parametrize(
    "text", ["1,0", "0,0", "-1", "10", "0,10", "0,1,2,3,4,5,6,7,8,9", "a", "0,", "1.0", None, 0, ["0"]]
)
def test_kept_tokens_are_ascending_of_the_tensor_and_not_all(text: object) -> None:
    with pytest.raises(CodecError, match="kept tokens"):
        kept_indexes(text, 10)


@pytest.mark.parametrize("axis", [-1, 0, 3, True, "-3", -3.0, None])
def test_tokens_lie_before_the_last_axis(axis: object) -> None:
    with pytest.raises(CodecError, match="token_axis"):
        stored_token_axis(axis)
    assert stored_token_axis(-2) == -2
    with pytest.raises(CodecError, match="role"):
        stored_role("keys")


@pytest.mark.parametrize(
    "runs",
    [
        "text", "", [], 5, None, {"a": 1}, [[0, 4, "int8", {}]] * 2, [[0, 3, "int8", {}]], [[1, 4, "int8", {}]],
        [[0, 2, "int8", {}], [3, 4, "int8", {}]], [[0, 2, "int8", {}], [2, 2, "int8", {}], [2, 4, "int8", {}]],
        [[0, 4, "layers", {}]], [[0, 4, "int8"]], [[0, 4, 5, {}]], [[0, 5, "int8", {}]], [[0, "4", "int8", {}]],
    ],
    ids=str,
)  # fmt: skip
def test_runs_cover_every_layer_once(runs: object) -> None:
    with pytest.raises(CodecError, match="layers"):
        _runs(runs, TensorSpec("float16", (4, 8)))
    assert len(_runs([[0, 1, "int8", {}], [1, 4, "raw", {}]], TensorSpec("float16", (4, 8)))) == 2
    with pytest.raises(CodecError, match="layers"):
        _runs([[0, 1, "int8", {}]], TensorSpec("float16", ()))


def turning_keys() -> EncodedTensor:
    """Keys whose means turn, encoded by nf4-kv2."""
    g, tokens, d = torch.Generator().manual_seed(4), 128, 64
    angle = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(d // 2) / (d // 2))
    mean = 8 * torch.randn(2, 1, 2, d // 2, generator=g)
    turned = torch.cat((mean * angle.cos()[:, None], mean * angle.sin()[:, None]), dim=-1)
    return codec_named("nf4-kv2").encode("k", torch.randn(2, tokens, 2, d, generator=g) + turned)


@pytest.mark.parametrize(
    ("about", "value"),
    [
        ("token_axis", -3.0), ("token_axis", [-3]), ("token_axis", True), ("kept", 0), ("kept", ["0"]), ("kept", None),
        ("role", ["key"]), ("role", {"key": 1}), ("rotary", 64.0), ("rotary", [64]), ("interleaved", 0),
        ("interleaved", 0.0), ("interleaved", []), ("kept", "0," * 3000), ("kept", ",".join(map(str, range(127)))),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_only_equals_an_attribute_seen_before_is_refused(about: str, value: object) -> None:
    """What a tensor has to consist of is remembered by its attributes: one of another type is not the same."""
    encoded, codec = turning_keys(), codec_named("nf4-kv2")
    assert (encoded.attrs["rotary"], encoded.attrs["interleaved"], encoded.attrs["token_axis"]) == (64, False, -3)
    codec.check(encoded)
    wrong = replace(encoded, attrs={**encoded.attrs, about: value})
    for reads in (codec.check, codec.decode):
        with pytest.raises(CodecError):
            reads(wrong)
    codec.check(encoded)


@pytest.mark.parametrize("shape", [(-2, -16, 2, 64), (2, 16, -2, -64), (2, 16, 0, 64), (1 << 40, 1 << 40, 64), ()])
def test_a_shape_that_no_tensor_has_is_refused_before_memory_is_made(shape: tuple[int, ...]) -> None:
    """Two negative dimensions multiply to as many values as there are."""
    codec = codec_named("nf4-kv2")
    encoded = codec.encode("v", torch.randn(2, 16, 2, 64, generator=torch.Generator().manual_seed(4)))
    assert encoded.attrs["kept"] == ""
    wrong = replace(encoded, spec=TensorSpec("float32", shape))
    for reads in (codec.check, codec.decode):
        with pytest.raises(CodecError):
            reads(wrong)


class Wrong:
    """A codec that decodes to something else than was announced."""

    name = "wrong"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        raise NotImplementedError

    def __init__(self, made: torch.Tensor) -> None:
        self.made = made

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        del encoded, out
        return self.made

    def check(self, encoded: EncodedTensor) -> None:
        del encoded


@pytest.mark.parametrize("made", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, dtype=torch.float16)])
def test_a_decoded_tensor_has_the_shape_and_type_that_were_announced(
    monkeypatch: pytest.MonkeyPatch, made: torch.Tensor
) -> None:
    tensor = EncodedTensor(TensorSpec("float32", (4,)), "wrong", {"": torch.zeros(1)})
    entry = Entry(Key(b"k"), {"x": tensor}, lossy=True)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "codec_named", lambda name: OutsideCodec(Wrong(made)))
        with pytest.raises(CodecError, match="not TensorSpec"):
            decode_entry(entry)
        patch.setattr(codecs, "codec_named", lambda name: OutsideCodec(Wrong(torch.ones(4))))
        assert torch.equal(decode_entry(entry)["x"], torch.ones(4))
        check_entry(entry)
        with pytest.raises(CodecError, match="never lossy"):
            check_entry(Entry(Key(b"k"), {"x": tensor}))


@pytest.mark.parametrize("shape", [(10, 64), (10, 8), (10, 7), (3, 4), (13,), (1,), (129,)])
def test_int8_rows_are_those_of_every_version_before(shape: tuple[int, ...]) -> None:
    """Short rows are put together, as many values a scale as docs/codecs.md says."""
    n = torch.Size(shape).numel()
    x = (torch.arange(n, dtype=torch.float32).view(shape) - n / 3) * 0.37
    encoded = Int8().encode("x", x)
    digest = hashlib.sha256()
    for name in ("", "scale"):
        digest.update(encoded.parts[name].view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == INT8[shape]
    for part in encoded.parts:
        short = {**encoded.parts, part: encoded.parts[part][:-1]}
        wrong = EncodedTensor(encoded.spec, "int8", short, encoded.attrs)
        for reads in (Int8().decode, Int8().check):
            with pytest.raises(CodecError):
                reads(wrong)


INT8: dict[tuple[int, ...], str] = {
    (10, 64): "426c740c6496b9d9",
    (10, 8): "c8861d11974b5387",
    (10, 7): "c6838fe2fa5d5485",
    (3, 4): "611b8767e9568031",
    (13,): "8c0857a5042d6865",
    (1,): "d9f2431e2f526e9b",
    (129,): "d684a3f69c92a61f",
}


def test_which_tokens_stand_apart() -> None:
    rows = torch.randn(2, 128, 3, 16, generator=torch.Generator().manual_seed(1))
    unsure, start, inside = Hints(), Hints(prefix_start=True), Hints(prefix_start=False)
    assert standing_apart(rows, "plain", unsure) == ()
    assert standing_apart(rows, "key", unsure) == (0, 1)
    assert len(standing_apart(rows, "key", start)) >= len(standing_apart(rows, "key", unsure))
    assert standing_apart(rows[:, :2], "key", start) == (0,), "one token is coded at least"
    assert standing_apart(rows, "key", inside) == ()
    assert standing_apart(rows, "value", inside) == ()
    rows[:, 40] *= 30
    rows[:, 90] *= 20
    assert standing_apart(rows, "key", inside) == (40, 90)
    assert standing_apart(rows, "value", inside) == ()
    assert [part for _, part, _ in planes_of(rows, "plain", -3)] == ["plain"]
    assert [part for _, part, _ in planes_of(rows, "value", -3)] == ["value"]
    assert [part for _, part, _ in planes_of(rows, "packed", -3)] == ["key", "value"]


def test_a_receipt_of_nothing_is_bit_for_bit() -> None:
    """0.0 means that nothing was lost; what is lost below what squares can tell is more than that."""
    x = torch.full((64, 64), 1.0)
    for codec in ("int8", "nf4"):
        found = codecs.encode_measured(codec_named(codec), "x", x)
        assert found is not None
        same = torch.equal(codec_named(codec).decode(found), x)
        assert (found.relative_error == 0.0) == same
    tiny = torch.zeros(64, 64)
    tiny[0, 0] = 1e-31
    found = codecs.encode_measured(codec_named("int8"), "x", tiny)
    assert found is None or found.relative_error > 0


def names(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: TensorInfo("uint8", shape) for name, shape in shapes.items()}


def test_limits_on_what_is_put() -> None:
    assert check_specs(names(a=(1,) * 8)) == 1
    with pytest.raises(InvalidEntry, match="8 dimensions"):
        check_specs(names(a=(1,) * 9))
    for bad in ((-1,), (0, 1 << 62)):
        with pytest.raises(InvalidEntry, match="a dimension is"):
            check_specs(names(a=bad))
    assert check_specs(names(a=(10,), b=(10,)), 20) == 20
    with pytest.raises(Exception, match="at most 20 bytes"):
        check_specs(names(a=(10,), b=(11,)), 20)
    assert len({f"t{n}": 1 for n in range(256)}) == 256
    check_specs(names(**{f"t{n}": (1,) for n in range(256)}))
    with pytest.raises(Exception, match="at most 256 tensors"):
        check_specs(names(**{f"t{n}": (1,) for n in range(257)}))
    with pytest.raises(InvalidEntry, match="at least 1"):
        check_specs({})
    with pytest.raises(InvalidEntry, match="unknown dtype"):
        check_specs({"a": TensorInfo("float99", (1,))})


def test_what_is_encoded_already_stays_as_it_is() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    once = codecs.encode_measured(codec_named("int8"), "a", x)
    assert once is not None
    raw = EncodedTensor(TensorSpec("float32", (64, 64)), "raw", {"": x})
    found = codecs.encode_entry(Entry(Key(b"k"), {"a": once, "b": raw}, lossy=True), codec_named("int8"))
    assert found.tensors["a"] is once
    assert found.tensors["b"].encoding == "int8"


@pytest.mark.parametrize(("encoding", "suffix"), [("nf4-kv", "kept"), ("nf4-kv", "mean_scale"), ("nf4-kv2", "kept")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_part_of_values_that_are_no_numbers_is_refused(encoding: str, suffix: str, bad: float) -> None:
    codec = codec_named(encoding)
    encoded = codec.encode("k", torch.randn(2, 128, 2, 64), Hints(prefix_start=True))
    part = encoded.parts[suffix].clone()
    part.view(-1)[-1] = bad
    broken = replace(encoded, parts={**encoded.parts, suffix: part})
    for reads in (codec.decode, codec.check):
        with pytest.raises(CodecError, match="not finite"):
            reads(broken)
