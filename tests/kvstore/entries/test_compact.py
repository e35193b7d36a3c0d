"""Encoded tensors of one entry in one piece of memory: they are what was put there, however they are asked for."""

import torch

from kvstore.codecs import codec_for, encode_entry
from kvstore.entries.compact import PackedTensors, layout_of, packed
from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry


def encoded() -> Entry:
    g = torch.Generator().manual_seed(1)
    tensors = {
        "k": torch.randn(2, 64, 2, 32, generator=g),
        "ids": torch.arange(5),
        "v": torch.randn(2, 64, 2, 32, generator=g).to(torch.bfloat16),
        "none": torch.empty(0, 3),
        "state": torch.randn(7, 33, generator=g),
    }
    return encode_entry(raw_entry(Key(b"k"), tensors), codec_for("auto"))


def test_each_tensor_is_the_one_that_was_packed() -> None:
    entry = encoded()
    found = packed(entry)
    assert isinstance(found.tensors, PackedTensors)
    asked_for, at_once = {name: found.tensors[name] for name in found.tensors}, dict(found.tensors.items())
    assert list(asked_for) == list(at_once) == list(entry.tensors)
    for name, tensor in entry.tensors.items():
        for made in (asked_for[name], at_once[name]):
            assert (made.spec, made.encoding, made.attrs) == (tensor.spec, tensor.encoding, dict(tensor.attrs))
            assert made.parts.keys() == tensor.parts.keys()
            assert all(torch.equal(made.parts[suffix], part) for suffix, part in tensor.parts.items())
            assert all(made.parts[suffix].dtype == part.dtype for suffix, part in tensor.parts.items())


def test_what_an_entry_is_told_without_its_tensors_is_what_they_say() -> None:
    entry = encoded()
    found = packed(entry)
    assert dict(found.specs) == dict(entry.specs)
    assert list(found.encodings) == list(entry.encodings)
    assert found.receipt == entry.receipt
    assert found.value_nbytes == entry.value_nbytes
    assert layout_of(found) is layout_of(entry), "entries of one shape share one layout"
