"""Entries that a caller encodes or decodes himself are put, held and given out as they are, embedded and remote."""

import math

import numpy as np
import pytest
import torch

from kvstore import PackedTensor, decode, encode
from kvstore.errors import CodecError, InvalidEntry
from kvstore.packed import ENCODINGS, arrays_in

CODECS = ("auto", "nf4", "nf4-kv", "int8")


def values(seed: int = 3, dtype: torch.dtype = torch.bfloat16, tokens: int = 96) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "k": torch.randn(2, tokens, 2, 64, generator=generator).to(dtype),
        "v": torch.randn(2, tokens, 2, 64, generator=generator).to(dtype),
        "ids": torch.arange(7),
    }


def bits(x) -> bytes:
    return (x.contiguous().view(-1).view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else x).tobytes()


def the_same(one, other) -> bool:
    """Whether two entries are packed to the same bits, and say the same of them."""
    if list(one) != list(other):
        return False
    for x, y in zip(one.values(), other.values(), strict=True):
        if isinstance(x, PackedTensor) != isinstance(y, PackedTensor):
            return False
        if isinstance(x, PackedTensor) and (x.spec, x.encoding, dict(x.attrs), list(x.parts)) != (
            y.spec, y.encoding, dict(y.attrs), list(y.parts)
        ):  # fmt: skip
            return False
    return [bits(x) for x in arrays_in(one)] == [bits(x) for x in arrays_in(other)]


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_put_packed_is_given_out_packed_and_decoded_bit_for_bit(harness, codec):
    packed = encode(values(), codec=codec)
    assert any(isinstance(x, PackedTensor) for x in packed.values())
    assert harness.cache.put(b"packed", packed)
    due = decode(packed)
    hit = harness.cache.get(b"packed", packed=True)
    assert the_same(hit.tensors, packed)
    assert (hit.tier, hit.lossy, hit.encoding) == ("warm", True, packed["k"].encoding)
    assert hit.receipt == {"k": packed["k"].relative_error, "v": packed["v"].relative_error, "ids": 0.0}
    plain = harness.cache.get(b"packed")
    assert all(torch.equal(torch.as_tensor(plain.tensors[name]), x) for name, x in due.items())
    assert plain.receipt == hit.receipt


def test_nothing_is_encoded_twice_on_its_way_through_the_tiers(harness):
    packed = encode(values())
    harness.cache.put(b"packed", packed)
    for move in (harness.cache.promote, harness.cache.demote):
        move(b"packed")
        hit = harness.cache.get(b"packed", packed=True)
        assert hit.tier == "hot" or the_same(hit.tensors, packed)
        plain = {name: torch.as_tensor(x) for name, x in harness.cache.get(b"packed").tensors.items()}
        assert all(torch.equal(plain[name], x) for name, x in decode(packed).items())
    assert harness.cache.stats().values["encodes"] == 0


def test_what_goes_from_one_store_to_the_next_stays_the_same(harness):
    harness.cache.put(b"from", values())
    assert harness.cache.demote(b"from") == 1
    first = harness.cache.get(b"from", packed=True)
    assert harness.cache.put(b"to", first.tensors)
    second = harness.cache.get(b"to", packed=True)
    assert the_same(first.tensors, second.tensors)
    assert first.receipt == second.receipt


def test_what_is_held_as_put_comes_as_put(harness):
    x = values()
    harness.cache.put(b"hot", x)
    hit = harness.cache.get(b"hot", packed=True)
    assert (hit.encoding, hit.lossy) == ("raw", False)
    assert all(torch.equal(torch.as_tensor(hit.tensors[name]), each) for name, each in x.items())


def test_a_lease_and_a_batch_give_out_packed_ones_too(harness):
    entries = {b"0": encode(values(1)), b"1": values(2), b"2": encode(values(3))}
    assert harness.cache.put_many(list(entries.items())) == 3
    hits = harness.cache.get_many([*entries, b"missing"], packed=True)
    assert hits[3] is None
    assert [isinstance(hit.tensors["k"], PackedTensor) for hit in hits[:3]] == [True, False, True]
    assert the_same(hits[2].tensors, entries[b"2"])
    with harness.cache.lease(b"0", packed=True) as hit:
        assert the_same(hit.tensors, entries[b"0"])
        del hit
    with harness.cache.lease_many([b"0", b"2"], packed=True) as leased:
        for key, hit in zip((b"0", b"2"), leased, strict=True):
            assert the_same(hit.tensors, entries[key])
        del leased, hit


def test_a_packed_chunk_is_a_link_of_a_chain(harness):
    a, b, c = (encode(values(seed)) for seed in (1, 2, 3))
    assert harness.cache.put_many([(b"a", a), (b"b", b)], chain=True) == 2
    assert harness.cache.put(b"c", c, parent=b"b")
    assert not harness.cache.put(b"d", c, parent=b"nobody")
    assert harness.cache.match([b"a", b"b", b"c"]) == 3
    harness.cache.delete(b"b")
    assert harness.cache.match([b"a", b"b", b"c"]) == 1


def test_a_packed_value_replaces_what_was_there_and_is_replaced(harness):
    packed, raw = encode(values(1)), values(2)
    for one, other in ((raw, packed), (packed, raw)):
        harness.cache.put(b"key", one)
        harness.cache.put(b"key", other)
        hit = harness.cache.get(b"key", packed=True)
        assert isinstance(hit.tensors["k"], PackedTensor) == (other is packed)
        assert len(list(harness.cache.entries())) == 1


def test_packed_and_exact_or_out_do_not_go_together(harness):
    packed = encode(values())
    with pytest.raises(InvalidEntry, match="exact"):
        harness.cache.put(b"key", packed, fidelity="exact")
    harness.cache.put(b"key", packed)
    with pytest.raises(InvalidEntry, match="out"):
        harness.cache.get(b"key", out=values(), packed=True)


def changed(x: PackedTensor, **how) -> PackedTensor:
    return PackedTensor(**{name: how.get(name, getattr(x, name)) for name in ("spec", "encoding", "parts", "attrs")})


def _without(x, name):
    return {suffix: part for suffix, part in x.items() if suffix != name}


BAD = {
    "no receipt": lambda x: changed(x, attrs=_without(x.attrs, "relative_error")),
    "a receipt of nothing": lambda x: changed(x, attrs={**x.attrs, "relative_error": math.nan}),
    "a negative receipt": lambda x: changed(x, attrs={**x.attrs, "relative_error": -0.1}),
    "a receipt in words": lambda x: changed(x, attrs={**x.attrs, "relative_error": "small"}),
    "an attribute that is a list": lambda x: changed(x, attrs={**x.attrs, "more": [1]}),
    "attributes of 5 KiB": lambda x: changed(x, attrs={**x.attrs, "more": "x" * 5000}),
    "an unknown encoding": lambda x: changed(x, encoding="gzip"),
    "an encoding that does not travel": lambda x: changed(x, encoding="kv-learned"),
    "another encoding": lambda x: changed(x, encoding="nf4"),
    "another shape": lambda x: changed(x, spec=x.spec.__class__(x.spec.dtype, (2, 96, 2, 65))),
    "a shape of a terabyte": lambda x: changed(x, spec=x.spec.__class__(x.spec.dtype, (1 << 40,))),
    "a type that no codec has": lambda x: changed(x, spec=x.spec.__class__("int32", x.spec.shape)),
    "no codes": lambda x: changed(x, parts=_without(x.parts, "")),
    "codes that are too short": lambda x: changed(x, parts={**x.parts, "": x.parts[""][:-1]}),
    "codes of another type": lambda x: changed(x, parts={**x.parts, "": x.parts[""].to(torch.int16)}),
    "a part too many": lambda x: changed(x, parts={**x.parts, "more": x.parts[""]}),
    "seventeen parts": lambda x: changed(x, parts={**x.parts, **{str(i): x.parts[""] for i in range(17)}}),
    "no parts": lambda x: changed(x, parts={}),
}


@pytest.mark.parametrize("how", BAD)
def test_what_no_codec_wrote_is_refused_and_what_was_there_stays(harness, how):
    good = encode(values())
    harness.cache.put(b"key", good)
    with pytest.raises((InvalidEntry, CodecError)):
        harness.cache.put(b"key", {**good, "k": BAD[how](good["k"])})
    assert the_same(harness.cache.get(b"key", packed=True).tensors, good)


def test_scales_that_decode_to_no_number_are_refused(harness):
    x = encode(values(), codec="nf4")
    nested = x["k"].parts["nested_absmax"].clone()
    nested[0] = math.nan
    with pytest.raises(InvalidEntry):
        harness.cache.put(b"key", {**x, "k": changed(x["k"], parts={**x["k"].parts, "nested_absmax": nested})})


def test_parts_of_numpy_are_as_good_as_those_of_torch(harness):
    packed = encode(values(), codec="nf4")
    arrays = {
        name: x.numpy() if not isinstance(x, PackedTensor) else changed(
            x, parts={suffix: np.ascontiguousarray(part.numpy()) for suffix, part in x.parts.items()}
        )
        for name, x in packed.items()
    }  # fmt: skip
    harness.cache.put(b"key", arrays)
    assert the_same(harness.cache.get(b"key", packed=True).tensors, packed)


def test_what_is_given_out_is_the_caller_s_own(harness):
    packed = encode(values())
    harness.cache.put(b"key", packed)
    kept = {name: bits(x) for name, x in packed["k"].parts.items()}
    for part in packed["k"].parts.values():
        part.view(-1).view(torch.uint8).fill_(0)
    hit = harness.cache.get(b"key", packed=True)
    assert {name: bits(torch.as_tensor(x)) for name, x in hit.tensors["k"].parts.items()} == kept
    torch.as_tensor(hit.tensors["k"].parts[""]).fill_(0)
    hit = harness.cache.get(b"key", packed=True)
    assert {name: bits(torch.as_tensor(x)) for name, x in hit.tensors["k"].parts.items()} == kept


def test_a_quarter_of_the_bytes_travel():
    x = values(tokens=256)
    packed = encode({name: x[name] for name in ("k", "v")})
    assert sum(each.nbytes for each in packed.values()) < 0.29 * sum(each.nbytes for each in (x["k"], x["v"]))


def test_encode_leaves_what_no_codec_may_touch():
    x = {"k": torch.full((64, 64), math.inf), "few": torch.zeros(3), "n": torch.arange(100)}
    assert encode(x) == x
    with pytest.raises(CodecError):
        encode(values(), codec="kv-learned")
    assert set(ENCODINGS) >= {each.encoding for each in encode(values()).values() if isinstance(each, PackedTensor)}
