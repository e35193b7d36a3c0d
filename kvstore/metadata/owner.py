"""The owner of an entry: a tenant, and within it the namespace that the caller named, with their bytes and counters.

A store has one Owner per pair (`tenants` makes them), and every Meta refers to one. Owners with the same `lane` share
one order of eviction: all of a tenant's namespaces, except those with a quota of their own (`tiers.order`).
A tier's lock guards the bytes of that tier, the store's lock everything else.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

TIERS = ("hot", "warm", "cold")
Limits = tuple[float, float, float]
"""Bytes by tier, in the order of TIERS; infinite: no limit."""
NO_LIMITS: Limits = (inf, inf, inf)


@dataclass(slots=True, eq=False)
class Owner:
    """A tenant's namespace; "" stands for no tenant, and for no namespace.

    lane: names the order that its keys are evicted from. limits: the namespace's quota. tenant_limits: the tenant's.
    nbytes: bytes held, by tier. limited: whether any limit is set.
    """

    tenant: str = ""
    namespace: str = ""
    lane: str = ""
    limits: Limits = NO_LIMITS
    tenant_limits: Limits = NO_LIMITS
    entries: int = 0
    hits: int = 0
    nbytes: list[int] = field(default_factory=lambda: [0, 0, 0])
    limited: bool = field(init=False)

    def __post_init__(self) -> None:
        self.limited = self.limits is not NO_LIMITS or self.tenant_limits is not NO_LIMITS

    @property
    def name(self) -> str:
        """The name that an operator sees: TENANT/NAMESPACE, or the one of them that there is."""
        return "/".join(part for part in (self.tenant, self.namespace) if part)

    @property
    def idle(self) -> bool:
        """Whether it holds nothing."""
        return not self.entries and not any(self.nbytes)


NOBODY = Owner()
"""The owner of a Meta until its store gives it one."""


@lru_cache(maxsize=4096)
def labelled(namespace: str) -> Owner:
    """An owner with nothing but the namespace's name: a record on disk knows no more."""
    return Owner(namespace=namespace) if namespace else NOBODY
