"""Whose a key is, by the secret prefix the daemon puts before it, and how many bytes its owner may hold.

The prefix comes from the authenticated identity on the server's side (the daemon's scopes), never from a caller; the
engine is only told which prefixes are whose. Keys outside all of them belong to nobody in particular, who is one
owner like the others. With tenants, the order of each memory tier keeps them apart (`tiers.order`).
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Mapping, Sequence

from kvstore.config import QuotaConfig
from kvstore.entry import Key
from kvstore.errors import InvalidEntry
from kvstore.tiers import TierName
from kvstore.tiers.order import NOBODY, Owner

TENANT_PREFIX_NBYTES = 16


class Tenants:
    """Owners by key prefix."""

    def __init__(self, quotas: Mapping[str, QuotaConfig]) -> None:
        self._quotas = quotas
        self._by_prefix: dict[bytes, Owner] = {}

    def owner_of(self, key: Key) -> Owner:
        """Whose a key is."""
        return self._by_prefix.get(key[:TENANT_PREFIX_NBYTES], NOBODY) if self._by_prefix else NOBODY

    def register(self, name: str, prefixes: Sequence[bytes]) -> None:
        """Keys that begin so are this tenant's. Raises InvalidEntry."""
        for prefix in prefixes:
            if len(prefix) != TENANT_PREFIX_NBYTES or not name:
                raise InvalidEntry(
                    f"a tenant has a name and prefixes of {TENANT_PREFIX_NBYTES} bytes, got {name!r} and {len(prefix)}"
                )
            self._by_prefix[prefix] = name

    def quotas(self, tier: TierName) -> dict[Owner, int]:
        """Bytes by owner in one tier, of those who have a limit."""
        limits = {
            name: quota.hot_nbytes if tier == "hot" else quota.warm_nbytes for name, quota in self._quotas.items()
        }
        return {name: limit for name, limit in limits.items() if limit is not None}
