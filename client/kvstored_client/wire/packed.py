"""Encoded tensors on the wire, both ways: what is said of their parts, checked before anything is allocated."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

from kvstore import arrays
from kvstore.dtypes import BY_NAME
from kvstore.errors import InvalidEntry
from kvstore.hit import TensorInfo
from kvstore.packed import ENCODINGS, PackedTensor
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import read_specs, tensor_specs

PARTS_MAX = 16
"""Parts of one tensor; nf4-kv2 has at most 10."""
PACKED_MAX_RATIO = 256
"""Bytes decoded for a byte encoded: nf4 has 8, and no codec of KV has a hundred."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One tensor on the wire. parts: type and shape by suffix; sizes: their bytes."""

    spec: TensorInfo
    encoding: str
    parts: Mapping[str, TensorInfo]
    sizes: tuple[int, ...]
    nbytes: int


def coded_of(spec: TensorInfo, message: pb.PackedTensor) -> Coded:
    """What a message says of a tensor. Raises InvalidEntry, EntryTooLarge."""
    if message.encoding not in (*ENCODINGS, "raw"):
        raise InvalidEntry(f"packed as {message.encoding!r:.40}, which does not travel")
    parts = read_specs(message.parts)
    if not 1 <= len(parts) <= PARTS_MAX:
        raise InvalidEntry(f"a tensor in {len(parts)} parts, at most {PARTS_MAX}")
    # Tensor by tensor: 256 are the tensors of an entry, and 60 of them have 300 parts. The first part has no name.
    arrays.check_specs({str(i): part for i, part in enumerate(parts.values())})
    sizes = tuple(prod(part.shape) * BY_NAME[part.dtype].itemsize for part in parts.values())
    return Coded(spec, message.encoding, parts, sizes, sum(sizes))


def attrs_of(message: pb.PackedTensor) -> dict[str, object]:
    """The attributes in a message. Raises InvalidEntry for what is no short JSON object."""
    if len(message.attrs) > arrays.ATTRS_MAX_NBYTES:
        raise InvalidEntry(f"{len(message.attrs)} bytes of attributes, at most {arrays.ATTRS_MAX_NBYTES}")
    try:
        attrs = json.loads(message.attrs) if message.attrs else {}
    except (ValueError, RecursionError) as error:
        raise InvalidEntry(f"attributes: {error}") from None
    if not isinstance(attrs, dict):
        raise InvalidEntry("attributes are a JSON object")
    return attrs


def check_ratio(nbytes: int, coded: Sequence[Coded]) -> None:
    """Raise InvalidEntry where so many decoded bytes cannot be what these tensors hold."""
    packed_nbytes = sum(tensor.nbytes for tensor in coded)
    parts = sum(len(tensor.parts) for tensor in coded)
    if packed_nbytes > nbytes + 4096 * parts or nbytes > PACKED_MAX_RATIO * (packed_nbytes + 4096):
        raise InvalidEntry(f"{nbytes} bytes packed as {packed_nbytes}")


def parts_of(coded: Iterable[Coded]) -> dict[str, TensorInfo]:
    """The parts of all tensors of an entry, numbered: what lies or comes one behind the other."""
    return {str(i): part for i, part in enumerate(chain.from_iterable(tensor.parts.values() for tensor in coded))}


def packed_tensor(x: Any, spec: TensorInfo) -> pb.PackedTensor:
    """What is said of one tensor of a packed entry, itself packed or not. Raises InvalidEntry."""
    if not isinstance(x, PackedTensor):
        return pb.PackedTensor(encoding="raw", parts=tensor_specs({"": spec}))
    if x.encoding not in ENCODINGS:
        raise InvalidEntry(f"packed as {x.encoding!r:.40}; what travels is {', '.join(ENCODINGS)}")
    parts = dict(arrays.describe_all(x.parts))
    try:
        attrs = json.dumps(dict(x.attrs), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidEntry(f"packed: attributes: {error}") from None
    return pb.PackedTensor(encoding=x.encoding, parts=tensor_specs(parts), attrs=attrs)
