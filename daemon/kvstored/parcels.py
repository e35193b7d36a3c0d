"""What is said and sent of an entry that travels as it is held. No state but what an entry keeps of its own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kvstore import arrays
from kvstore.entry import Entry
from kvstore.hit import TensorInfo
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.frames import Bytes
from kvstored_client.messages import relative_errors, tensor_specs


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """said: the fields of its GetHeader that never change. parts: what follows, in order; payload: their bytes.

    ends: where each tensor's bytes end: one that is there whole can be decoded.
    """

    said: bytes
    parts: Sequence[torch.Tensor]
    payload: Sequence[Bytes]
    nbytes: int
    ends: frozenset[int]


def parcel_of(entry: Entry) -> Parcel:
    """The parcel of an entry, which keeps it: give a packed one unpacked, that holds it for this call only."""
    if not isinstance(entry.card, Parcel):
        entry.keep_card(_new_parcel(entry))
    assert isinstance(entry.card, Parcel)
    return entry.card


def _new_parcel(entry: Entry) -> Parcel:
    tensors = entry.tensors
    specs = {name: TensorInfo(held.spec.dtype, held.spec.shape) for name, held in tensors.items()}
    header = pb.GetHeader(
        tensors=tensor_specs(specs),
        nbytes=entry.value_nbytes,
        encoding=entry.encoding,
        lossy=entry.lossy,
        relative_errors=relative_errors(entry.receipt, lossy=entry.lossy),
        packed=[
            pb.PackedTensor(
                encoding=held.encoding,
                parts=tensor_specs({suffix: arrays.describe(suffix, part) for suffix, part in held.parts.items()}),
                attrs=json.dumps(dict(held.attrs), allow_nan=False) if held.attrs else "",
            )
            for held in tensors.values()
        ],
    )
    parts = [part for held in tensors.values() for part in held.parts.values()]
    ends = list(accumulate(sum(part.nbytes for part in held.parts.values()) for held in tensors.values()))
    payload = [arrays.as_bytes(part) for part in parts]
    return Parcel(header.SerializeToString(), parts, payload, ends[-1] if ends else 0, frozenset(ends))
