"""Codecs turn numbers into fewer numbers and back: encode and decode, pure, no state, any thread.

A `Codec` sees one tensor at a time. `encode_entry` and `decode_entry` apply one to a whole entry and
decide which tensors a lossy codec may touch. Each `EncodedTensor` names its encoding: names are
frozen, and a change of the bytes is a new name.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol

import torch

from kvstore.boundary import blamed
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.dtypes import LOSSY_ALLOWED
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import CodecError

if TYPE_CHECKING:
    from kvstore.codecs.receipt import Measured

LOSSY_MIN_NUMEL = 64
"""One NF4 block. For fewer values the scales take more bytes than the codes save."""


class Codec(Protocol):
    """One way to write a tensor. Implementations hold no mutable state."""

    name: str
    lossy: bool

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor. name: its name in the entry ("k", "v", ...); hints: its role and layout.

        x: dense, contiguous, any device. Returns parts on the same device that share no memory with x.
        """
        ...

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor of `encoded.spec`; into `out` (same dtype and shape, contiguous) when given.

        Raises CodecError when parts and spec do not belong together; never reads outside a part.
        """
        ...


class Stored(Codec, Protocol):
    """A codec whose name is written in records."""

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding: names, types and lengths of parts, attributes."""
        ...


@cache
def _own() -> dict[str, Stored]:
    from kvstore.codecs.int8 import Int8
    from kvstore.codecs.kv_learned import KVLearned
    from kvstore.codecs.layers import Layers
    from kvstore.codecs.nf4 import NF4
    from kvstore.codecs.nf4_kv import NF4KV
    from kvstore.codecs.nf4_kv2 import NF4KV2
    from kvstore.codecs.raw import Raw

    return {codec.name: codec for codec in (Raw(), NF4(), NF4KV(), NF4KV2(), Int8(), KVLearned(), Layers())}


@lru_cache(maxsize=64)
def codec_named(name: str) -> Stored:
    """The codec with this encoding name: one of kvstored's, registered, or offered by a package.

    A name is taken for good, so what was found is remembered. Raises UnknownEncoding for any other, or one that cannot
    be loaded: a record may have come from another host.
    """
    from kvstore.codecs.outside import outside_codec

    return _own().get(name) or outside_codec(name)


def codec_for(choice: str, max_relative_error: float | None = None) -> Codec:
    """The codec a setting asks for: "auto" (nf4-kv2 for keys and values, nf4 for the rest), or an encoding's name.

    max_relative_error: with "auto", the cheapest of nf4-kv2, int8 and raw that keeps this bound on the real tensor.
    """
    from kvstore.codecs.adaptive import Adaptive
    from kvstore.codecs.by_role import ByRole

    found = codec_named("raw" if choice == "auto" else choice)  # imports them all: later a process may be out of files
    if choice != "auto":
        return found
    return ByRole() if max_relative_error is None else Adaptive(max_relative_error)


def encodable(x: torch.Tensor) -> bool:
    """Whether a lossy codec may try this tensor: a KV dtype and at least one block.

    The codec itself refuses values that are not finite: while encoding the check costs nothing.
    """
    return str(x.dtype).removeprefix("torch.") in LOSSY_ALLOWED and x.numel() >= LOSSY_MIN_NUMEL


@without_torch_modes
def encode_entry(entry: Entry, codec: Codec, hints: Mapping[str, Hints] | None = None) -> Entry:
    """Encode each raw tensor the codec may touch; the others stay raw. `entry` itself if none may.

    hints: by tensor name, if more is known than the name tells.
    """
    tensors: dict[str, EncodedTensor] = {}
    changed = False
    for name, tensor in entry.tensors.items():
        x = tensor.parts[""] if tensor.encoding == "raw" else None
        told = NO_HINTS if hints is None else hints.get(name, NO_HINTS)
        told = replace(told, decoded=True) if tensor.relative_error else told
        encoded = encode_measured(codec, name, x, told) if x is not None and encodable(x) else None
        changed = changed or encoded is not None
        # A decoded copy has an error already: both together are no larger than their sum.
        tensors[name] = tensor if encoded is None else encoded.after(tensor.relative_error)
    if not changed:
        return entry
    # A codec of somebody else's may lose something without saying so: its receipt says so.
    lossy = entry.lossy or codec.lossy or any(tensor.relative_error for tensor in tensors.values())
    return Entry(entry.key, tensors, lossy=lossy)


def encode_measured(codec: Codec, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> "Measured | None":
    """The encoded tensor with its receipt (`codecs.receipt`), whatever codec wrote it.

    None if the codec finds while encoding that it cannot hold these values, if decoded values would not be finite, or
    if an adaptive codec finds that only the raw tensor keeps its bound.
    """
    from kvstore.codecs.receipt import sealed

    try:
        encoded = codec.encode(name, x, hints)
        return None if encoded.encoding == "raw" else sealed(codec, name, x, encoded, hints)
    except CodecError:
        return None


def decode_all(entry: Entry, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """All tensors of an entry, decoded into fresh memory, or into `out[name]` where given; `out` itself is returned.

    For a caller outside all torch modes. Raises CodecError, and no other error, whatever the parts and attributes are:
    they may come from an attacker.
    """
    made = {} if out is None else out
    for name, tensor in entry.tensors.items():
        try:  # the boundary: no codec can foresee every attribute
            made[name] = codec_named(tensor.encoding).decode(tensor, made.get(name))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is named
            raise blamed(error, CodecError, f"tensor {name!r:.80}") from None
    return made


decode_entry = without_torch_modes(decode_all)
"""`decode_all` for any caller."""


@without_torch_modes
def check_entry(entry: Entry) -> None:
    """Check an entry that is sent encoded, not decoded here. Raises CodecError if `decode_entry` would."""
    for name, tensor in entry.tensors.items():
        try:  # the boundary, as above
            codec = codec_named(tensor.encoding)
            codec.check(tensor)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is named
            raise blamed(error, CodecError, f"tensor {name!r:.80}") from None
        if codec.lossy and not entry.lossy:
            raise CodecError(f"tensor {name!r:.80} is {tensor.encoding}, its entry says it was never lossy")
