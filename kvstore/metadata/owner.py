"""Whose an entry is: a tenant, and within it the namespace that its caller named; what each of them holds and did.

One Owner a pair of them in a store (`tenants` makes them), and every Meta points to its own. Owners with one `lane` are
evicted from one order: all of a tenant's, but for namespaces with a quota of their own (`tiers.order`).
The bytes of a tier are guarded by that tier's lock, everything else by the store's.
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
    """A tenant's namespace; "" for no tenant, and for no namespace.

    lane: the order its keys are evicted from. limits: its namespace's quota, tenant_limits: its tenant's.
    nbytes: held, by tier. limited: whether any limit is set.
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
        """For an operator: TENANT/NAMESPACE, or what there is of it."""
        return "/".join(part for part in (self.tenant, self.namespace) if part)

    @property
    def idle(self) -> bool:
        """Whether it holds nothing."""
        return not self.entries and not any(self.nbytes)


NOBODY = Owner()
"""The owner of a Meta until its store gives it one."""


@lru_cache(maxsize=4096)
def labelled(namespace: str) -> Owner:
    """An owner that says no more than the namespace's name: what a record on disk knows."""
    return Owner(namespace=namespace) if namespace else NOBODY
