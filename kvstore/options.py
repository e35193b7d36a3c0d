"""How an entry is kept: one type for the embedded store, the client and the daemon, checked when it is made.

A door makes one and nobody behind it checks the fields again. What only a store knows, it checks itself: its longest
time to live. Imports the standard library only.
"""

from dataclasses import dataclass
from math import inf

from kvstore.errors import InvalidEntry
from kvstore.hit import FIDELITIES, PRIORITIES, Fidelity, Priority
from kvstore.keys import check_namespace


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How entries are kept; entries with equal options can be put together. `Store.put` says what each field means.

    Raises InvalidEntry for what no store accepts.
    """

    ttl_s: float | None = None
    sliding: bool = True
    pin: bool = False
    fidelity: Fidelity = "auto"
    priority: Priority = "normal"
    namespace: str = ""

    def __post_init__(self) -> None:
        if self.ttl_s is not None and not 0 < self.ttl_s < inf:  # NaN included
            raise InvalidEntry(f"ttl_s must be over 0 and finite, got {self.ttl_s!r}")
        if self.fidelity not in FIDELITIES:
            raise InvalidEntry(f"fidelity must be one of {', '.join(FIDELITIES)}, got {self.fidelity!r}")
        if self.priority not in PRIORITIES:
            raise InvalidEntry(f"priority must be one of {', '.join(PRIORITIES)}, got {self.priority!r}")
        check_namespace(self.namespace)
