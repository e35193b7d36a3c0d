"""What a caller gets back: the same plain objects from an embedded store and from a client.

Holds no torch: a light client imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from kvstore.dtypes import TensorSpec

Fidelity = Literal["auto", "exact"]
FIDELITIES: tuple[Fidelity, ...] = ("auto", "exact")
Priority = Literal["low", "normal"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal")

TensorInfo = TensorSpec
"""What an `EntryInfo` says of each tensor, by its name for callers."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A value found.

    tensors: by name, torch tensors or numpy arrays (see `arrays`). tier: which tier answered. encoding: how it
    was held there. lossy: whether it ever went through a lossy codec. age_s: seconds since it was put. receipt: for
    each tensor the relative error |x - decoded| / |x| that was measured when it was encoded: 0.0 where it is bit for
    bit as put, infinity where an older version encoded it and nobody measured.
    """

    key: bytes
    tensors: Mapping[str, Any]
    tier: str
    encoding: str
    lossy: bool
    age_s: float
    receipt: Mapping[str, float] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """The largest of the receipt: 0.0 where every tensor is as it was put."""
        return max(self.receipt.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Held:
    """Where one key of a chain is held, and the bytes of its tensors once decoded."""

    tier: str
    nbytes: int


class Match(int):
    """The number of leading keys held: an int that also says where each of them is (`held`)."""

    held: tuple[Held, ...]

    def __new__(cls, held: tuple[Held, ...]) -> Self:
        """A match of `len(held)` leading keys."""
        match = super().__new__(cls, len(held))
        match.held = held
        return match


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """What is known of an entry without reading its value.

    tiers: where it is held, uppermost first; tier_nbytes: bytes counted against each budget, in that order.
    encoding: in the uppermost tier. value_nbytes: bytes of the tensors once decoded.
    ttl_left_s: seconds until it expires; None while pinned. receipt: of the tensors described, as in a `Hit`.
    tenant, namespace: whose it is, and the name it was put under; "" for none.
    """

    key: bytes
    tiers: tuple[str, ...]
    tier_nbytes: tuple[int, ...]
    tensors: Mapping[str, TensorSpec]
    encoding: str
    lossy: bool
    fidelity: str
    pinned: bool
    value_nbytes: int
    age_s: float
    ttl_left_s: float | None
    hits: int
    receipt: Mapping[str, float] = field(default_factory=dict)
    tenant: str = ""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a key is, or why it is gone.

    state: "held", a `metadata.tombstones.GoneCause`, or "never put" (or so long ago that nobody remembers). tier: the
    uppermost that holds it, or the lowest that last did. gone_s: seconds since it left. entry: what is held.
    """

    key: bytes
    state: str
    tier: str = ""
    gone_s: float = 0.0
    hits: int = 0
    entry: EntryInfo | None = None


class Verified(NamedTuple):
    """How far a check of the records on disk is. corrupt: found damaged meanwhile, and dropped."""

    checked: int
    total: int
    nbytes: int
    corrupt: int
