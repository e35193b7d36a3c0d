"""The results of calls: the same plain objects from an embedded store and from a client.

Imports no torch: a light client imports this.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from kvstore.dtypes import TensorSpec
from kvstore.errors import KvstoreError
from kvstore.printable import short_key

Fidelity = Literal["auto", "exact"]
FIDELITIES: tuple[Fidelity, ...] = ("auto", "exact")
Priority = Literal["low", "normal"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal")

TensorInfo = TensorSpec
"""What an `EntryInfo` says of each tensor, by its name for callers."""


@dataclass(frozen=True, slots=True, repr=False)
class Hit:
    """A value that was found.

    tensors: by name, torch tensors or numpy arrays (see `arrays`). tier: the tier that answered. encoding: its
    encoding there. lossy: whether it ever went through a lossy codec. age_s: seconds since it was put. receipt: for
    each tensor the relative error that was measured when it was encoded (docs/codecs.md): 0.0 if it is bit for bit as
    put, infinity if an older version encoded it without measuring.
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
        """The largest error in the receipt: 0.0 if every tensor is as it was put."""
        return max(self.receipt.values(), default=0.0)

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name!r}: {_shown(x)}" for name, x in self.tensors.items())
        return (
            f"Hit(key={short_key(self.key)}, tensors={{{tensors}}}, tier={self.tier!r}, encoding={self.encoding!r}, "
            f"lossy={self.lossy}, age_s={self.age_s:.3g}, relative_error={self.relative_error:.3g})"
        )


def _shown(x: Any) -> str:
    """A tensor's type and shape, not its values."""
    try:
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    except (AttributeError, KvstoreError):  # no tensor, or one whose lease has ended
        return type(x).__name__


@dataclass(frozen=True, slots=True)
class Held:
    """Where a key is held, and the bytes of its decoded tensors.

    tier: "shared" for what is on no tier of this host: another host has put it, and a get fetches it.
    """

    tier: str
    nbytes: int


class Match(int):
    """The number of leading keys that are held: an int that also has the place of each (`held`)."""

    held: tuple[Held, ...]

    def __new__(cls, held: tuple[Held, ...]) -> Self:
        """A match of `len(held)` leading keys."""
        match = super().__new__(cls, len(held))
        match.held = held
        return match

    def __repr__(self) -> str:
        tiers = Counter(held.tier for held in self.held)
        return f"Match({', '.join([int.__repr__(self), *(f'{tier}: {count}' for tier, count in tiers.items())])})"

    __str__ = int.__repr__  # in a sentence it is the number


@dataclass(frozen=True, slots=True)
class Form:
    """What a tier holds of an entry.

    bits: a value, with all that its budget counts. kl: nats a token that were predicted when the form's basis was
    learned; 0.0 of what is as it was put; None: nobody has. basis: its digest, or "".
    """

    encoding: str
    bits: float
    kl: float | None = None
    basis: str = ""


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """The facts about an entry, without its value.

    tiers: those that hold it, uppermost first; tier_nbytes: bytes counted against each budget, in that order.
    encoding: in the uppermost tier. value_nbytes: bytes of the decoded tensors.
    ttl_left_s: seconds until it expires; None while pinned. receipt: as in a `Hit`.
    tenant, namespace: its owner, and the name it was put under; "" for none. forms: one for each of `tiers`, where
    tensors are described.
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
    forms: tuple[Form, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a key is, or why it is gone.

    state: "held", a `metadata.tombstones.GoneCause`, or "never put" (also if its tombstone is gone). tier: the
    uppermost that holds it, or the lowest that held it last. gone_s: seconds since it left. entry: its facts, if held.
    shared: whether the shared store has it, such as "yes, 8.7 MiB, 512 s left" or "no: it is a partial chunk"; empty:
    nothing is shared.
    """

    key: bytes
    state: str
    tier: str = ""
    gone_s: float = 0.0
    hits: int = 0
    entry: EntryInfo | None = None
    shared: str = ""


class Copied(NamedTuple):
    """The progress of a snapshot. done: of `total` keys, those that were dealt with. copied: entries in it so far.

    nbytes: of their records. lost: entries that were damaged or could not be read, so they are not in it.
    """

    done: int
    total: int
    copied: int
    nbytes: int
    lost: int


class Verified(NamedTuple):
    """The progress of a check of the records on disk. corrupt: records found damaged so far, and dropped."""

    checked: int
    total: int
    nbytes: int
    corrupt: int
