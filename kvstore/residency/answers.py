"""What a caller gets of what was found: decoded, copied or as it is held. Any thread, without the store's lock."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kvstore import arrays
from kvstore.boundary import Blaming
from kvstore.codecs import check_entry
from kvstore.dtypes import BY_NAME, TensorSpec
from kvstore.entries.entry import Entry
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import CodecError, InvalidEntry, UnknownEncoding
from kvstore.hit import Hit
from kvstore.keys import Key
from kvstore.metadata.tombstones import GoneCause
from kvstore.packed import ENCODINGS, PackedTensor
from kvstore.printable import printable
from kvstore.residency.read_path import Found, Plan
from kvstore.residency.state import Residency
from kvstore.residency.transcode import TensorTranscoder
from kvstore.shm.arena import BlockTensors, Place, Room

log = logging.getLogger(__name__)

_TOLD_MAX = 64
"""Encodings that the log names: once each, not at each get. A record may name any."""
_KEPT = "a miss, nothing is deleted; further ones in this encoding are only counted"


class Answers:
    """Turns what was found into hits. forget: removes keys for a cause, with the store's lock not held."""

    def __init__(
        self,
        residency: Residency,
        transcoder: TensorTranscoder,
        framework: str,
        device: torch.device,
        forget: Callable[[Sequence[Key], GoneCause], int],
    ) -> None:
        self._r = residency
        self._transcoder = transcoder
        self._framework = framework
        self._device = device
        self._forget = forget
        self._told: set[str] = set()

    def hits(
        self,
        found: Iterable[Found | None],
        *,
        leading: bool,
        copy: bool = True,
        packed: bool = False,
    ) -> Iterator[Hit | None]:
        """Hits in the order they were found; `leading`: up to the first miss. packed: as for `hit`."""
        for place in found:
            hit = None if place is None else self.hit(place, copy=copy, packed=packed)
            if hit is None and leading:
                return
            yield hit

    def of_plan(self, plan: Plan, found: Iterable[Found | None], room: Room | None) -> Iterator[Hit | Found | None]:
        """As `hits`, not copied; what its plan says may stay encoded, or where it lies, is given out as it is held."""
        for place in found:
            hit: Hit | Found | None = None
            if place is not None and plan.stays_in_place(place.entry):
                hit = place
            elif place is not None:
                stays = place.entry.encoding != "raw" and plan.stays_encoded(place.entry)
                hit = self._as_held(place) if stays else self.hit(place, copy=False, room=room)
            if hit is None and plan.leading:
                return
            yield hit

    @without_torch_modes
    def hit(
        self,
        found: Found,
        *,
        out: Mapping[str, Any] | None = None,
        copy: bool = True,
        room: Room | None = None,
        packed: bool = False,
    ) -> Hit | None:
        """A hit of what was found; None where it cannot be decoded, which also removes it if it is damaged.

        packed: what is held in an encoding that travels is given out in it.
        """
        try:
            if packed and found.entry.is_encoded_in(ENCODINGS):
                return self._hit_packed(found, copy=copy)
            return self._hit_or_raise(found, out=out, copy=copy, room=room)
        except CodecError as error:
            self._undecodable(found, error)
            return None

    def _hit_packed(self, found: Found, *, copy: bool) -> Hit:
        _check(found)
        tensors: dict[str, Any] = {}
        numpy = arrays.resolve_framework(self._framework) == "numpy"
        for name, held in found.entry.tensors.items():
            parts: dict[str, Any] = {s: part.clone() if copy else part for s, part in held.parts.items()}
            if numpy and copy:
                parts = {suffix: to_numpy(part) for suffix, part in parts.items()}
            raw = held.encoding == "raw"
            tensors[name] = parts[""] if raw else PackedTensor(held.spec, held.encoding, parts, dict(held.attrs))
        entry = found.entry
        return Hit(found.key, tensors, found.tier, entry.encoding, entry.lossy, found.age_s, entry.receipt)

    def _as_held(self, found: Found) -> Found | None:
        """What is given out as it is held. From a disk, checked first: who decodes it could not have it dropped."""
        try:
            _check(found)
        except CodecError as error:
            self._undecodable(found, error)
            return None
        return found

    def lent(self) -> AbstractContextManager[None]:
        """Around what is given out without a copy: it ends when that has been read. In RAM: at once."""
        return nullcontext()

    def _undecodable(self, found: Found, error: CodecError) -> None:
        """A miss. Damaged past what a checksum sees: gone. In another version's encoding: kept for that version."""
        kept = isinstance(error, UnknownEncoding)
        if not kept:
            log.warning("entry cannot be decoded key=%s error=%s", found.key.hex(), printable(error))
        elif len(self._told) < _TOLD_MAX and str(error) not in self._told:
            self._told.add(str(error))
            log.warning("entry cannot be decoded key=%s error=%s effect=%s", found.key.hex(), printable(error), _KEPT)
        at = found.tier, found.entry.encoding
        with self._r.lock:
            self._r.counters.tiers[found.tier].hits -= 1
            self._r.counters.hits_in[at] -= 1
            if not self._r.counters.hits_in[at]:
                del self._r.counters.hits_in[at]  # a stranger's encoding is no name for a number
            self._r.counters.misses["lost" if kept else "corrupt"] += 1
            self._r.lookups.lost(0, "lost" if kept else "corrupt")
        if not kept:
            self._forget([found.key], "corrupt")

    def _hit_or_raise(self, found: Found, *, out: Mapping[str, Any] | None, copy: bool, room: Room | None) -> Hit:
        key, tier, entry, age_s = found
        if not copy and entry.encoding == "raw":
            tensors: Mapping[str, Any] = {name: t.parts[""] for name, t in entry.tensors.items()}
            if isinstance(entry.block, Place):
                tensors = BlockTensors(tensors, entry.block)
        elif out is not None:
            tensors = self._decode_into(entry, out)
        else:
            tensors = self._transcoder.decode(entry, None if room is None else room(entry.specs))
        if copy and out is None and arrays.resolve_framework(self._framework) == "numpy":
            tensors = {name: to_numpy(x) for name, x in tensors.items()}
        return Hit(key, tensors, tier, entry.encoding, entry.lossy, age_s, entry.receipt)

    def _decode_into(self, entry: Entry, out: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: arrays.describe(name, x) for name, x in out.items()}
        held = entry.specs
        if given != held:
            raise InvalidEntry(f"out must hold exactly the entry's tensors {held}, got {given}")
        # A numpy array is filled through a tensor over its bytes, so both kinds take the one path.
        direct = {name: x if arrays.is_torch(x) else as_torch(x) for name, x in out.items()}
        if all(x.is_contiguous() and x.device == self._device for x in direct.values()):
            try:
                self._transcoder.decode(entry, direct)
            except CodecError:
                pass  # the entry's fault, or that of `out`: a leaf that requires a gradient cannot be written to
            else:
                return dict(out)
        decoded = self._transcoder.decode(entry)
        with Blaming(InvalidEntry, "out"):
            for name, x in decoded.items():
                direct[name].copy_(x)
        return dict(out)


def _check(found: Found) -> None:
    """Raise CodecError for an entry out of a disk that could not be decoded."""
    if found.tier == "cold":
        check_entry(found.entry)


def as_torch(x: Any) -> torch.Tensor:
    """A tensor over the memory of a numpy array. Raises InvalidEntry where they cannot share it."""
    if not (x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative):
        raise InvalidEntry("out: a numpy array must be C-contiguous, writeable and of native byte order")
    return arrays.from_bytes(arrays.describe("", x), arrays.as_bytes(x), "torch")  # type: ignore[no-any-return]


def to_numpy(x: torch.Tensor) -> Any:
    """An array of a tensor's numbers."""
    spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
    assert spec.dtype in BY_NAME
    return arrays.from_bytes(spec, arrays.as_bytes(x), "numpy")
