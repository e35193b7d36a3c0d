"""Packed tensors to and from entries: made for a caller, checked in full when they are put. Pure, any thread.

Nothing is encoded twice: what was packed is held, given out and decoded as it came. What no codec wrote is refused
before it is held: names, types, lengths and values of parts, attributes, and a receipt that can be one.
"""

import json
from collections.abc import Mapping
from math import inf
from typing import Any

import torch

from kvstore import arrays
from kvstore.boundary import Blaming
from kvstore.codecs import check_entry, codec_for, codec_named, encode_entry
from kvstore.codecs.hints import Hints
from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import packed as in_one_piece
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import CodecError, InvalidEntry
from kvstore.keys import Key
from kvstore.packed import ENCODINGS, PackedTensor

_NO_KEY = Key(b"")


@without_torch_modes
def encode(tensors: Mapping[str, Any], *, codec: str = "auto", prefix_start: bool | None = None) -> dict[str, Any]:
    """Named tensors as a store would hold them below hot, encoded where they are: on a GPU by its kernels.

    codec: an encoding that travels (`packed.ENCODINGS`), or "auto". prefix_start: whether a prompt begins with them.
    What a codec may not touch (integers, NaN, fewer than 64 values) stays as it is. Raises InvalidEntry, CodecError.
    """
    if codec not in ("auto", *ENCODINGS):
        raise CodecError(f"codec is auto or one of {', '.join(ENCODINGS)}, got {codec!r:.40}")
    raw = {}
    for name, x in tensors.items():
        spec = arrays.describe(arrays.check_name(name), x)
        dense = x.detach().contiguous() if arrays.is_torch(x) else arrays.from_bytes(spec, arrays.as_bytes(x), "torch")
        raw[name] = EncodedTensor(spec, "raw", {"": dense})
    hints = None if prefix_start is None else dict.fromkeys(raw, Hints(prefix_start=prefix_start))
    encoded = encode_entry(Entry(_NO_KEY, raw), codec_for(codec), hints)
    return {name: given_out(t) if t.encoding in ENCODINGS else tensors[name] for name, t in encoded.tensors.items()}


@without_torch_modes
def decode(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an entry with packed ones among them, decoded by torch, on the device of their parts.

    Raises CodecError for parts that do not belong together.
    """
    return {name: decoded(x) if isinstance(x, PackedTensor) else x for name, x in tensors.items()}


def decoded(x: PackedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """One packed tensor decoded, into `out` (dense, of its spec and device) where given. Raises CodecError."""
    with Blaming(CodecError, f"a tensor packed as {x.encoding!r:.40}"):
        return codec_named(x.encoding).decode(encoded_of(x), out)


def encoded_of(x: PackedTensor) -> EncodedTensor:
    """The tensor as codecs have it, over the same memory. Raises CodecError for an encoding that does not travel."""
    if x.encoding not in ENCODINGS:
        raise CodecError(f"packed as {x.encoding!r:.40}; what travels is {', '.join(ENCODINGS)}")
    parts = {suffix: _as_torch(suffix, part) for suffix, part in x.parts.items()}
    return EncodedTensor(TensorSpec(x.spec.dtype, tuple(x.spec.shape)), x.encoding, parts, x.attrs)


@without_torch_modes
def check_parts(tensors: Mapping[str, Any]) -> None:
    """Raise CodecError for packed tensors that could not be decoded."""
    for x in tensors.values():
        if isinstance(x, PackedTensor):
            with Blaming(CodecError, f"a tensor packed as {x.encoding!r:.40}"):
                codec_named(x.encoding).check(encoded_of(x))


def _as_torch(suffix: str, part: Any) -> torch.Tensor:
    if arrays.is_torch(part):
        return part  # type: ignore[no-any-return]
    return arrays.from_bytes(arrays.describe(suffix, part), arrays.as_bytes(part), "torch")  # type: ignore[no-any-return]


def given_out(tensor: EncodedTensor) -> PackedTensor:
    """An encoded tensor for a caller, over the same memory."""
    return PackedTensor(tensor.spec, tensor.encoding, tensor.parts, dict(tensor.attrs))


def copied_entry(key: Key, tensors: Mapping[str, Any]) -> Entry:
    """An entry of copies of tensors, packed and plain ones. Raises InvalidEntry as `checked_entry`."""
    held: dict[str, EncodedTensor] = {}
    with Blaming(InvalidEntry, "packed"):
        for name, x in tensors.items():
            if isinstance(x, PackedTensor):
                spec = TensorSpec(x.spec.dtype, tuple(map(int, x.spec.shape)))
                parts = {suffix: _copy(suffix, part) for suffix, part in x.parts.items()}
                held[name] = EncodedTensor(spec, x.encoding, parts, dict(x.attrs))
            else:
                held[name] = EncodedTensor(arrays.describe(name, x), "raw", {"": _copy(name, x)})
    return checked_entry(key, held)


def _copy(name: str, x: Any) -> torch.Tensor:
    return arrays.from_bytes(arrays.describe(name, x), arrays.as_bytes(x).copy(), "torch")  # type: ignore[no-any-return]


@without_torch_modes
def checked_entry(key: Key, tensors: Mapping[str, EncodedTensor], *, block: object = None) -> Entry:
    """An entry of tensors that somebody else encoded, checked in full. They are handed over: nobody else writes.

    block: where in shared memory they lie. Raises InvalidEntry for what no codec that travels wrote, and for one
    without a receipt.
    """
    arrays.check_specs({name: tensor.spec for name, tensor in tensors.items()})
    if all(tensor.encoding == "raw" for tensor in tensors.values()):
        raise InvalidEntry("a packed entry has a tensor that is packed: put the tensors as they are")
    for name, tensor in tensors.items():
        _check_told(name, tensor)
    lossy = any(codec_named(t.encoding).lossy for t in tensors.values())
    entry = Entry(key, tensors, lossy=lossy, block=block)
    try:
        check_entry(entry)
    except CodecError as error:
        raise InvalidEntry(f"packed: {error}") from None
    return in_one_piece(entry)


def _check_told(name: str, tensor: EncodedTensor) -> None:
    """Raise InvalidEntry for an encoding that does not travel, attributes that no record could hold, or no receipt."""
    if tensor.encoding not in (*ENCODINGS, "raw"):
        raise InvalidEntry(
            f"tensor {name!r}: packed as {tensor.encoding!r:.40}; what travels is {', '.join(ENCODINGS)}"
        )
    if tensor.encoding == "raw" and tensor.attrs:
        raise InvalidEntry(f"tensor {name!r}: one that is not packed has no attributes")
    for about, value in tensor.attrs.items():
        if not isinstance(value, str | int | float):
            raise InvalidEntry(f"tensor {name!r}: an attribute is a text or a number, got {about!r:.40}")
    try:
        text = json.dumps(dict(tensor.attrs), allow_nan=False)
    except ValueError as error:
        raise InvalidEntry(f"tensor {name!r}: attributes: {error}") from None
    if len(text) > arrays.ATTRS_MAX_NBYTES:
        raise InvalidEntry(f"tensor {name!r}: attributes of {len(text)} bytes, at most {arrays.ATTRS_MAX_NBYTES}")
    if tensor.encoding != "raw" and not tensor.relative_error < inf:
        raise InvalidEntry(f"tensor {name!r}: packed without a receipt: the attribute relative_error")
