"""Raw entries into encoded ones and back, on the way between tiers: as put, encoded below hot, a raw copy when it comes
back up.

`Mover` decides when; this is how. `TensorTranscoder` does it to tensors; `simulation` has a double that only reckons
sizes, so the same mover, tiers and policies can be asked what they would do with a terabyte.
"""

import time
from collections.abc import Mapping
from typing import Protocol

import torch

from kvstore import kernels
from kvstore.arrays import CheckedSpecs
from kvstore.codecs import decode_all, encode_entry
from kvstore.codecs.choice import CodecChoice
from kvstore.codecs.coarser import coarser_entry
from kvstore.codecs.hints import Hints
from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import packed
from kvstore.entries.entry import NO_ATTRS, EncodedTensor, Entry
from kvstore.keys import Key
from kvstore.residency.placing import beside
from kvstore.residency.state import Residency
from kvstore.shm.arena import Arena, Room

_RAM = torch.device("cpu")


class Transcoder(Protocol):
    """Pure but for counting. Any thread, without the residency lock."""

    def encode(self, entry: Entry, *, prefix_start: bool | None = None, namespace: str = "") -> Entry:
        """What a raw entry that need not stay exact looks like below hot; still raw where the codec must not touch.

        prefix_start: whether a prompt begins with it; None: nobody said. namespace: whose policy holds.
        """
        ...

    def coarser(self, entry: Entry, *, namespace: str) -> Entry:
        """What an entry in its form below hot looks like in cold: coarser where its namespace says so, else itself.

        Never made from a copy above.
        """
        ...

    def exact(self, entry: Entry) -> Entry:
        """The entry bit for bit, where lower tiers can hold it: in RAM."""
        ...

    def restore(self, entry: Entry) -> Entry:
        """A raw copy for hot. Raises OverQuota where that is on a device, and has no room."""
        ...


def chunk_hints(entry: Entry, *, prefix_start: bool) -> dict[str, Hints]:
    """What a codec is told about a chunk: where in its prompt it lies. Where its tokens lie is told by the shape."""
    return dict.fromkeys(entry.tensors, Hints(prefix_start=prefix_start))


def made_entry(key: Key, specs: CheckedSpecs, tensors: Mapping[str, torch.Tensor]) -> Entry:
    """An entry to put, of dense tensors of these specs on the hot device. They are handed over: nobody else writes.

    A door that received the tensors has checked the specs already; nobody behind it does so again.
    """
    raw = {name: EncodedTensor(specs[name], "raw", {"": x}, NO_ATTRS) for name, x in tensors.items()}
    return Entry(key, raw, block=getattr(tensors, "place", None), value_nbytes=specs.nbytes)


def raw_entry(
    key: Key, tensors: Mapping[str, torch.Tensor], *, lossy: bool = False, receipt: Mapping[str, float] | None = None
) -> Entry:
    """An entry of tensors as they are. The caller hands them over: nobody else may write to them.

    receipt: of the encoded form that they were decoded from.
    """
    errors = {name: {"relative_error": error} for name, error in (receipt or {}).items() if error}
    raw = {
        name: EncodedTensor(
            TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape)), "raw", {"": x}, errors.get(name, NO_ATTRS)
        )
        for name, x in tensors.items()
    }
    return Entry(key, raw, lossy=lossy, block=getattr(tensors, "place", None))


class TensorTranscoder:
    """Forms of real tensors, under the policies of one configuration and one hot device.

    encoded: the shared memory that encoded entries are made in; None: ordinary memory.
    """

    encoded: Arena | None = None

    def __init__(
        self, policies: CodecChoice, device: torch.device, residency: Residency, room: Room | None = None
    ) -> None:
        kernels.make_ready()
        self._room = room
        self._policies = policies
        self._device = device
        self._r = residency

    def encode(self, entry: Entry, *, prefix_start: bool | None = None, namespace: str = "") -> Entry:
        """Encoded where the codec may, in RAM."""
        start = time.perf_counter()
        hints = None if prefix_start is None else chunk_hints(entry, prefix_start=prefix_start)
        encoded = encode_entry(entry, self._policies.codec_of(namespace), hints)
        if encoded is not entry:
            with self._r.lock:
                self._r.counters.encodes += 1
                self._r.counters.encode_s += time.perf_counter() - start
                for tensor in encoded.tensors.values():
                    self._r.counters.errors[tensor.encoding].observe(tensor.relative_error)
        return self._beside(packed(encoded.to(_RAM)), entry)

    def _beside(self, below: Entry, entry: Entry) -> Entry:
        """The form below hot of an entry where that is to lie."""
        return below if self.encoded is None else beside(below, entry, self.encoded)

    def coarser(self, entry: Entry, *, namespace: str) -> Entry:
        """The form of the namespace's coarser basis, of what is held in one that nests in it: from symbols alone."""
        basis = self._policies.coarser_of(namespace) if entry.lossy else None
        if basis is None:
            return entry
        start = time.perf_counter()
        made = packed(coarser_entry(entry, basis))
        if made is not entry:
            with self._r.lock:
                self._r.counters.coarsened += 1
                self._r.counters.coarsened_nbytes += entry.nbytes - made.nbytes
                self._r.counters.coarsen_s += time.perf_counter() - start
        return made

    def exact(self, entry: Entry) -> Entry:
        """The same tensors in RAM."""
        return entry.to(_RAM)

    def restore(self, entry: Entry) -> Entry:
        """Decoded on the hot device."""
        room = None if self._room is None else self._room(entry.specs)
        return raw_entry(entry.key, self.decode(entry, room), lossy=entry.lossy, receipt=entry.receipt)

    def decode(self, entry: Entry, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of an entry on the hot device, in fresh memory, or into `out`, which is returned then.

        For a caller who sees no torch mode: this is the hottest path, and asking twice costs a sixth of a small get.
        """
        start = time.perf_counter()
        tensors = decode_all(entry if self._device == _RAM else entry.to(self._device), out)
        if entry.encoding != "raw":
            with self._r.lock:
                self._r.counters.decodes += 1
                self._r.counters.decode_s += time.perf_counter() - start
        return tensors
