"""What the store holds: named tensors under a key, in memory.

Invariant: an Entry and everything it refers to never change after the entry is made. So any thread may
read it without a lock, and a tier may hand out the object that it holds. A caller shares no memory with
the entry that it puts: `Store.put` copies.
Leaves out: when it expires and how often it was used (`metadata.meta.Meta`), and its form as bytes
(`record`).
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

import torch

from kvstore.arrays import CheckedSpecs
from kvstore.dtypes import BY_NAME, TensorSpec
from kvstore.errors import CodecError
from kvstore.keys import Key
from kvstore.untracked import untrack_tensors

ENTRY_OVERHEAD_NBYTES = 512
"""Counted for an entry in addition to its payload: Entry, Meta, key and three dictionary slots, as measured
with tracemalloc over 100,000 entries (checked by tests/kvstore/entries/test_overhead.py)."""
TENSOR_OVERHEAD_NBYTES = 864
"""Counted for each tensor part in addition to its payload: the torch.Tensor, its storage and its names."""


NO_ATTRS: Mapping[str, object] = MappingProxyType({})
"""The attributes of a tensor whose encoding needs none."""
_set = object.__setattr__
_TORCH = {name: getattr(torch, name, None) for name in BY_NAME}


def is_of(x: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether a tensor has this type and shape. Asked twice of every tensor of a get: no words are made for it."""
    return x.dtype is _TORCH.get(spec.dtype) and x.shape == spec.shape


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTensor:
    """One tensor as a codec wrote it.

    spec: type and shape after decoding. encoding: the codec's name; "raw" means `parts[""]` is the tensor.
    parts: contiguous tensors by suffix; "" is the main part (for NF4 the packed codes), the others are
    stored in a record as `<tensor name>.<suffix>`. attrs: small values, valid as JSON, that the codec needs.
    """

    spec: TensorSpec
    encoding: str
    parts: Mapping[str, torch.Tensor]
    attrs: Mapping[str, object] = field(default_factory=lambda: NO_ATTRS)

    @property
    def nbytes(self) -> int:
        """Bytes counted against a budget: the parts, and what holding them costs."""
        return sum(part.numel() * part.element_size() + TENSOR_OVERHEAD_NBYTES for part in self.parts.values())

    @property
    def relative_error(self) -> float:
        """|x - decoded| / |x| as measured when the tensor was encoded; see `error_in`."""
        return error_in(self.encoding, self.attrs)

    @property
    def described(self) -> "Described":
        """The tensor without its parts."""
        return Described(self.spec, self.encoding, self.relative_error, basis_in(self.attrs))


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor without its parts; the fields are those of `EncodedTensor`. basis: its digest (kv-learned), or ""."""

    spec: TensorSpec
    encoding: str
    relative_error: float
    basis: str = ""


def basis_in(attrs: Mapping[str, object]) -> str:
    """The digest of a basis in a tensor's attributes."""
    basis = attrs.get("basis")
    return basis if isinstance(basis, str) else ""


def error_in(encoding: str, attrs: Mapping[str, object]) -> float:
    """The receipt in a tensor's attributes: 0 for a tensor that was never encoded, infinity if none was measured.

    A raw tensor has a receipt if it is the decoded copy of an encoded form. Infinity, and not None or NaN, so that an
    unknown error is over every bound.
    """
    measured = attrs.get("relative_error", 0.0 if encoding == "raw" else inf)
    # Records come from a disk: an attribute counts as a receipt only if it can be an error.
    if isinstance(measured, bool) or not isinstance(measured, int | float) or not measured >= 0:  # NaN included
        return inf
    try:
        return float(measured)
    except OverflowError:  # JSON knows integers of any length
        return inf


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Named tensors under a key, each raw or encoded.

    lossy: whether any tensor ever went through a lossy codec; a decoded copy stays lossy.
    nbytes: bytes counted against a tier's budget, metadata included. value_nbytes: of the tensors once decoded; counted
    here unless whoever makes the entry knows them.
    encoding: the first that is not raw ("nf4-kv2"), or "raw": tensors of one entry may have different ones.
    kept_reply: a server's serialized reply for this object, kept so that it is built once.
    block: where in shared memory its tensors lie (`shm.arena.Place`); None: in ordinary memory, or unknown.
    """

    key: Key
    tensors: Mapping[str, EncodedTensor]
    lossy: bool = False
    nbytes: int = field(init=False)
    encoding: str = field(init=False)
    kept_reply: object = field(init=False, repr=False)
    block: object = field(default=None, kw_only=True, repr=False)
    value_nbytes: int = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        tensors, total = self.tensors, ENTRY_OVERHEAD_NBYTES + len(self.key)
        # A mapping that knows its size (`compact`) is counted without making its tensors.
        known = getattr(tensors, "nbytes", None)
        total += known if known is not None else sum(len(name) + t.nbytes for name, t in tensors.items())
        encoding = getattr(tensors, "encoding", None)
        if encoding is None:
            encoding = next((name for name in self.encodings if name != "raw"), "raw")
        if self.value_nbytes < 0:
            value = getattr(tensors, "value_nbytes", None)
            if value is None:
                value = sum([spec.nbytes for spec in self.specs.values()])
            _set(self, "value_nbytes", value)
        _set(self, "nbytes", total)
        _set(self, "encoding", encoding)
        _set(self, "kept_reply", None)

    def keep_reply(self, kept_reply: object) -> None:
        """Keep a reply. The fields it is built from never change, so two threads that build it build equal replies."""
        _set(self, "kept_reply", kept_reply)

    def to(self, device: torch.device) -> "Entry":
        """The entry with all parts on a device; the same entry if they are there already."""
        if getattr(self.tensors, "device", None) == device:
            return self
        parts = [part for tensor in self.tensors.values() for part in tensor.parts.values()]
        if all(part.device == device for part in parts):
            return self
        moved = {
            name: EncodedTensor(t.spec, t.encoding, {s: part.to(device) for s, part in t.parts.items()}, t.attrs)
            for name, t in self.tensors.items()
        }
        return Entry(self.key, moved, lossy=self.lossy)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Types and shapes of the tensors once decoded."""
        known: Mapping[str, TensorSpec] | None = getattr(self.tensors, "specs", None)
        return {name: t.spec for name, t in self.tensors.items()} if known is None else known

    @property
    def encodings(self) -> Collection[str]:
        """Each tensor's encoding."""
        known: Collection[str] | None = getattr(self.tensors, "encodings", None)
        return [t.encoding for t in self.tensors.values()] if known is None else known

    def is_encoded_in(self, names: Collection[str]) -> bool:
        """Whether the entry is encoded, and each encoded tensor in one of these encodings."""
        found = {*self.encodings} - {"raw"}
        return bool(found) and found.issubset(names)

    @property
    def receipt(self) -> dict[str, float]:
        """The relative error of each tensor by name, measured when it was encoded: 0 for a tensor as it was put."""
        known: dict[str, float] | None = getattr(self.tensors, "receipt", None)
        return {name: t.relative_error for name, t in self.tensors.items()} if known is None else known


class ArrivingTensors(Mapping[str, EncodedTensor]):
    """Raw tensors whose bytes are still being copied: whoever reads an entry of them waits for the copy, or makes it.

    A put is answered before its bytes lie where they are kept. Until then nobody sees them: the first look at a tensor
    makes the copy, and what is read, encoded, summed or written afterwards is that copy. So what the sender does to its
    own memory later changes nothing, and no two readers see different bytes. Thread-safe.
    copy: makes the tensors in memory that nobody else can write to; called once. owner: whose segments on a device the
    store's copy is to lie in; None: its own.
    """

    __slots__ = ("_copy", "_lock", "_place", "_tensors", "nbytes", "owner", "specs", "value_nbytes")
    device = torch.device("cpu")
    encoding = "raw"

    def __init__(
        self, specs: CheckedSpecs, copy: Callable[[], Mapping[str, torch.Tensor]], owner: int | str | None = None
    ) -> None:
        self.owner = owner
        self.specs = specs
        self.value_nbytes = specs.nbytes
        self.nbytes = self.value_nbytes + sum(len(name) + TENSOR_OVERHEAD_NBYTES for name in specs)
        self._copy: Callable[[], Mapping[str, torch.Tensor]] | None = copy
        self._tensors: Mapping[str, EncodedTensor] | None = None
        self._place: object = None
        self._lock = threading.Lock()

    @property
    def encodings(self) -> list[str]:
        """`Entry.encodings`, without waiting."""
        return ["raw"] * len(self.specs)

    @property
    def receipt(self) -> dict[str, float]:
        """`Entry.receipt`, without waiting."""
        return dict.fromkeys(self.specs, 0.0)

    @property
    def place(self) -> object:
        """Where in shared memory the copy lies (`shm.arena.Place`); None: in ordinary memory."""
        self.arrive()
        return self._place

    @property
    def place_now(self) -> object:
        """As `place`, without waiting: None also before the copy is made."""
        return self._place

    def arrive(self) -> Mapping[str, EncodedTensor]:
        """The tensors; the copy is made before this returns. Raises CodecError where it could not be made."""
        tensors = self._tensors
        if tensors is not None:
            return tensors
        with self._lock:
            if self._tensors is None:
                copy, self._copy = self._copy, None
                if copy is None:
                    raise CodecError("the bytes of this entry could not be copied when it was put")
                made = copy()
                self._place = getattr(made, "place", None)
                tensors = {
                    name: EncodedTensor(spec, "raw", {"": made[name]}, NO_ATTRS) for name, spec in self.specs.items()
                }
                untrack_tensors(tensors)
                self._tensors = tensors
            return self._tensors

    def __getitem__(self, name: str) -> EncodedTensor:
        return self.arrive()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
