"""Owners, by the secret prefix that the daemon puts before a tenant's keys, and by the namespace that the caller named.

The daemon derives the prefix from the authenticated identity (its tenant views); a caller never chooses it. The engine
only knows which prefixes belong to which tenant. Keys with none of these prefixes belong to the tenant "", which is
treated like the others. A caller names the namespace within its own tenant: another name moves bytes between accounts
of the same tenant. With tenants, or namespaces with a quota, each tier keeps one order of eviction for each of them.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import inf

import numpy as np

from kvstore.config import QuotaConfig
from kvstore.errors import InvalidEntry
from kvstore.keys import Key
from kvstore.metadata.index import Column
from kvstore.metadata.owner import NO_LIMITS, Limits, Owner

TENANT_PREFIX_NBYTES = 16
OWNERS_MAX = 4096
"""About 2 MB. Further namespaces are counted under none."""


class Tenants:
    """The owners of a store, made when they are first named."""

    def __init__(
        self,
        quotas: Mapping[str, QuotaConfig],
        namespaces: Mapping[str, QuotaConfig],
        with_policy: Collection[str] = (),
    ) -> None:
        """with_policy: namespaces with a codec of their own; they keep their name past the limit of owners, too."""
        self._with_policy = frozenset(with_policy)
        self._quotas = {name: _limits(quota) for name, quota in quotas.items()}
        self._namespaces = {name: _limits(quota) for name, quota in namespaces.items()}
        self._by_prefix: dict[bytes, str] = {}
        self._names: frozenset[str] = frozenset()
        self._owners: dict[tuple[str, str], Owner] = {}

    def tenant_of(self, key: Key) -> str:
        """The tenant of a key; "" for keys of no registered tenant."""
        return self._by_prefix.get(key[:TENANT_PREFIX_NBYTES], "")

    def owner(self, key: Key, namespace: str = "") -> Owner:
        """The owner of a key that was put under this namespace."""
        return self._named(self.tenant_of(key) if self._by_prefix else "", namespace)

    def owners(self, keys: Sequence[Key], names: Sequence[str], of: Column) -> tuple[list[Owner], Column]:
        """The owners of many keys that were put under the namespaces `names[of]`; for each key, which one it is."""
        if not self._by_prefix:
            return [self._named("", name) for name in names], of
        pairs = list(zip(map(self.tenant_of, keys), of.tolist(), strict=True))
        known = {pair: code for code, pair in enumerate(dict.fromkeys(pairs))}
        owners = [self._named(tenant, names[code]) for tenant, code in known]
        return owners, np.fromiter(map(known.__getitem__, pairs), np.int64, len(pairs))

    def _named(self, tenant: str, namespace: str) -> Owner:
        return self._owners.get((tenant, namespace)) or self._make(tenant, namespace)

    def _make(self, tenant: str, namespace: str) -> Owner:
        # "MODEL@DIGEST": a quota may name one identity, or the model for all of its identities.
        model = namespace.rpartition("@")[0]
        limits = self._namespaces.get(namespace) or self._namespaces.get(model)
        if len(self._owners) >= OWNERS_MAX and namespace and limits is None:
            for of in [of for of, owner in self._owners.items() if owner.idle]:
                del self._owners[of]
            if len(self._owners) >= OWNERS_MAX:
                # The name from the configuration, not the caller's, so their number is bounded by the configuration.
                known = next((name for name in (namespace, model) if name in self._with_policy), "")
                if known != namespace:
                    return self._owners.get((tenant, known)) or self._make(tenant, known)
        lane = tenant if limits is None else f"{tenant}/{namespace}"
        made = Owner(tenant, namespace, lane, limits or NO_LIMITS, self._quotas.get(tenant, NO_LIMITS))
        self._owners[tenant, namespace] = made
        return made

    def register(self, name: str, prefixes: Sequence[bytes]) -> bool:
        """Give a tenant the keys with these prefixes. False: it has them already. Raises InvalidEntry."""
        for prefix in prefixes:
            if len(prefix) != TENANT_PREFIX_NBYTES or not name:
                raise InvalidEntry(
                    f"a tenant has a name and prefixes of {TENANT_PREFIX_NBYTES} bytes, got {name!r} and {len(prefix)}"
                )
        fresh = any(self._by_prefix.get(prefix) != name for prefix in prefixes)
        self._by_prefix.update(dict.fromkeys(prefixes, name))
        self._names |= {name}
        return fresh

    def __iter__(self) -> Iterator[Owner]:
        """All owners."""
        return iter(self._owners.values())

    def names(self) -> frozenset[str]:
        """The tenants registered."""
        return self._names


def _limits(quota: QuotaConfig) -> Limits:
    hot, warm, cold = (
        inf if limit is None else float(limit) for limit in (quota.hot_nbytes, quota.warm_nbytes, quota.cold_nbytes)
    )
    return hot, warm, cold
