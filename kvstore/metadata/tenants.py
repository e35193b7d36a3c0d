"""Who is who: owners by the secret prefix the daemon puts before a key, and by the namespace its caller named.

The prefix comes from the authenticated identity on the server's side (the daemon's tenant views), never from a caller;
the engine is only told which prefixes are whose. Keys outside all of them belong to nobody in particular, who is one
tenant like the others. A namespace is named by the caller, within his tenant: naming another one moves bytes from one
of his own accounts to another. With tenants, or namespaces with a quota, the order of each tier keeps them apart.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import inf

from kvstore.config import QuotaConfig
from kvstore.errors import InvalidEntry
from kvstore.keys import Key
from kvstore.metadata.owner import NO_LIMITS, Limits, Owner

TENANT_PREFIX_NBYTES = 16
OWNERS_MAX = 4096
"""About 2 MB. A caller who invents more namespaces than that is counted under none."""


class Tenants:
    """Owners, made as they come."""

    def __init__(
        self,
        quotas: Mapping[str, QuotaConfig],
        namespaces: Mapping[str, QuotaConfig],
        with_policy: Collection[str] = (),
    ) -> None:
        """with_policy: namespaces that have a codec of their own: past the limit, too, they keep their name."""
        self._with_policy = frozenset(with_policy)
        self._quotas = {name: _limits(quota) for name, quota in quotas.items()}
        self._namespaces = {name: _limits(quota) for name, quota in namespaces.items()}
        self._by_prefix: dict[bytes, str] = {}
        self._owners: dict[tuple[str, str], Owner] = {}

    def tenant_of(self, key: Key) -> str:
        """Whose a key is; "" is everybody outside the tenants."""
        return self._by_prefix.get(key[:TENANT_PREFIX_NBYTES], "") if self._by_prefix else ""

    def owner(self, key: Key, namespace: str = "") -> Owner:
        """Who owns a key that was put under this namespace."""
        of = (self.tenant_of(key), namespace)
        found = self._owners.get(of)
        return found if found is not None else self._make(*of)

    def _make(self, tenant: str, namespace: str) -> Owner:
        # "MODEL@DIGEST": a quota may name one identity, or the model, for each of its identities.
        model = namespace.rpartition("@")[0]
        limits = self._namespaces.get(namespace) or self._namespaces.get(model)
        if len(self._owners) >= OWNERS_MAX and namespace and limits is None:
            for of in [of for of, owner in self._owners.items() if owner.idle]:
                del self._owners[of]
            if len(self._owners) >= OWNERS_MAX:
                # The name in the configuration, not the caller's: these are no more than the configuration has.
                known = next((name for name in (namespace, model) if name in self._with_policy), "")
                if known != namespace:
                    return self._owners.get((tenant, known)) or self._make(tenant, known)
        lane = tenant if limits is None else f"{tenant}/{namespace}"
        made = Owner(tenant, namespace, lane, limits or NO_LIMITS, self._quotas.get(tenant, NO_LIMITS))
        self._owners[tenant, namespace] = made
        return made

    def register(self, name: str, prefixes: Sequence[bytes]) -> bool:
        """Keys that begin so are this tenant's. False: they were already. Raises InvalidEntry."""
        for prefix in prefixes:
            if len(prefix) != TENANT_PREFIX_NBYTES or not name:
                raise InvalidEntry(
                    f"a tenant has a name and prefixes of {TENANT_PREFIX_NBYTES} bytes, got {name!r} and {len(prefix)}"
                )
        fresh = any(self._by_prefix.get(prefix) != name for prefix in prefixes)
        self._by_prefix.update(dict.fromkeys(prefixes, name))
        return fresh

    def __iter__(self) -> Iterator[Owner]:
        """All owners."""
        return iter(self._owners.values())

    def names(self) -> set[str]:
        """The tenants registered."""
        return set(self._by_prefix.values())


def _limits(quota: QuotaConfig) -> Limits:
    hot, warm, cold = (
        inf if limit is None else float(limit) for limit in (quota.hot_nbytes, quota.warm_nbytes, quota.cold_nbytes)
    )
    return hot, warm, cold
