"""Cuts an entry into the frames of a Put. Checks everything that can be refused before anything is sent."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvstore import arrays
from kvstore.dtypes import TensorSpec
from kvstore.errors import InvalidEntry
from kvstore.hit import TensorInfo
from kvstore.options import PutOptions
from kvstore.packed import PackedTensor, arrays_in
from kvstore.shm.layout import layout
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import CHUNK_NBYTES, Gather, cut_frames, put_header
from kvstored_client.wire.messages import fidelity_number, priority_number, tensor_specs
from kvstored_client.wire.packed import coded_of, packed_tensor, parts_of

_known_options = lru_cache(maxsize=64, typed=True)(PutOptions)


def put_options(*how: Any) -> PutOptions:
    """PutOptions by position. Those of most calls are the same, and checked once."""
    try:
        return _known_options(*how)
    except TypeError:  # not hashable: it is of no kind that is right
        return PutOptions(*how)


@dataclass(frozen=True, slots=True)
class Description:
    """What entries of one shape that are kept alike have in common.

    nbytes: of the tensors. places: (start, nbytes) of each in a block, and block_nbytes as `shm.layout.layout`.
    serialized: a PutHeader without its keys.
    """

    nbytes: int
    places: tuple[tuple[int, int], ...]
    block_nbytes: int
    serialized: bytes


def _describe(specs: tuple[tuple[str, TensorSpec], ...], options: PutOptions, root: bool) -> Description:  # noqa: FBT001 - for a cache
    """Raises InvalidEntry, EntryTooLarge."""
    by_name = dict(specs)
    nbytes = arrays.check_specs(by_name)
    return _described(by_name, nbytes, by_name, [], options, root=root)


def _described(
    specs: Mapping[str, TensorSpec],
    nbytes: int,
    lying: Mapping[str, TensorSpec],
    packed: list[pb.PackedTensor],
    options: PutOptions,
    *,
    root: bool,
) -> Description:
    """lying: what is sent, `nbytes` of it: the tensors, or the parts of those that are packed."""
    places, block_nbytes = layout(lying)
    header = pb.PutHeader(
        tensors=tensor_specs(specs),
        nbytes=nbytes,
        ttl_s=options.ttl_s or 0.0,
        absolute_ttl=not options.sliding,
        pin=options.pin,
        fidelity=fidelity_number(options.fidelity),
        priority=priority_number(options.priority),
        root=root,
        namespace=options.namespace,
        packed=packed,
    )
    return Description(nbytes, tuple(places.values()), block_nbytes, header.SerializeToString())


_known = lru_cache(maxsize=256, typed=True)(_describe)
_PLAIN = {str}


def _describe_packed(tensors: Mapping[str, Any], options: PutOptions, root: bool) -> Description:  # noqa: FBT001 - as above
    """As `_describe`, of an entry with packed tensors. Raises InvalidEntry also for what no daemon could take."""
    if options.fidelity == "exact":
        raise InvalidEntry("fidelity exact is for values bit for bit as put, and packed ones have lost some")
    specs = {
        name: TensorInfo(x.spec.dtype, tuple(x.spec.shape)) if isinstance(x, PackedTensor) else arrays.describe(name, x)
        for name, x in tensors.items()
    }
    decoded_nbytes = arrays.check_specs(specs)
    packed = [packed_tensor(x, spec) for x, spec in zip(tensors.values(), specs.values(), strict=True)]
    coded = [coded_of(spec, message) for spec, message in zip(specs.values(), packed, strict=True)]
    nbytes = sum(tensor.nbytes for tensor in coded)
    if nbytes == decoded_nbytes:  # a daemon that knows nothing of packed ones would take the parts for the tensors
        raise InvalidEntry(f"packed to the {nbytes} bytes that the tensors have: put them as they are")
    return _described(specs, nbytes, parts_of(coded), packed, options, root=root)


@dataclass(slots=True)
class Outgoing:
    """One entry to send. Reads the caller's tensors while it sends, so they must not change meanwhile.

    parent: the key that it continues. tensors: of a packed entry its parts, numbered. described: a PutHeader without
    its keys, serialized. places, block_nbytes: as in its `Description`.
    """

    key: bytes
    parent: bytes | None
    tensors: Mapping[str, Any]
    described: bytes
    nbytes: int
    places: tuple[tuple[int, int], ...]
    block_nbytes: int

    def single_frame(self) -> bytes | None:
        """The whole entry as one frame; None if it needs more than one."""
        return next(self.frames()) if self.nbytes <= CHUNK_NBYTES else None

    def frames(self) -> Iterator[bytes]:
        """The entry's frames in order."""
        # Dense bytes only now, and of this entry only: a strided tensor is copied here, not for the whole batch.
        payload = Gather([arrays.as_bytes(x) for x in self.tensors.values()])
        return cut_frames(put_header(self.key, self.parent, self.described), payload)


def outgoing(
    entries: Sequence[tuple[bytes, Mapping[str, Any], bytes | None]], options: PutOptions, *, root: bool = False
) -> list[Outgoing]:
    """Entries to send: for each its key and the key that it continues, both checked, and its tensors.

    root: what continues nothing begins a chain. Raises InvalidEntry, EntryTooLarge.
    """
    made: list[Outgoing] = []
    for key, tensors, parent in entries:
        if not isinstance(tensors, Mapping):
            raise InvalidEntry(f"tensors are a mapping of names to tensors, got {type(tensors).__name__}")
        held: Mapping[str, Any] = dict(tensors)  # asked once: it may make its tensors, and others the second time
        first = root and parent is None
        if PackedTensor in map(type, held.values()):
            found = _describe_packed(held, options, first)
            held = {str(i): part for i, part in enumerate(arrays_in(held))}
        else:
            specs = arrays.describe_all(held)
            # A name that is no plain string may say that it equals another one: it is not looked up.
            found = (_known if set(map(type, held)) == _PLAIN else _describe)(specs, options, first)
        made.append(Outgoing(key, parent, held, found.serialized, found.nbytes, found.places, found.block_nbytes))
    return made
