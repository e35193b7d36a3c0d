"""The pinned keys of one tier: what each takes, whose it is, and whether another one may be pinned.

All pins together have a limit. Where several tenants share the store each has an equal share of it, so none can take
what another one will ask for later. Not thread-safe: the tier's lock covers each call.
"""

from collections.abc import Callable, Collection, Iterator

from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.index import Spread


class Pinned:
    """Keys with their bytes and tenants. All operations O(1). tenants: those that share the store, as of now."""

    def __init__(self, limit_nbytes: float, tier: str, tenants: Callable[[], Collection[str]] = tuple) -> None:
        self.limit_nbytes = limit_nbytes
        self._tier = tier
        self._tenants = tenants
        self._pins: Spread[tuple[str, int]] = Spread()
        self._count = 0
        self._by_tenant: dict[str, int] = {}
        self.nbytes = 0

    def hold(self, key: Key, nbytes: int, tenant: str) -> None:
        """Count a pinned key; for one that is, its bytes now."""
        self.release(key)
        self._pins[key] = tenant, nbytes
        self._count += 1
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + nbytes
        self.nbytes += nbytes

    def release(self, key: Key) -> bool:
        """Count a key no longer. False: it was not pinned."""
        found = self._pins.take(key) if self._count else None
        if found is None:
            return False
        self._count -= 1
        tenant, nbytes = found
        self._by_tenant[tenant] -= nbytes
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        self.nbytes -= nbytes
        return True

    def check(self, nbytes: int, tenant: str) -> None:
        """Raise OverQuota if a key of so many bytes may not be pinned for a tenant."""
        total, own = self.nbytes + nbytes, self._by_tenant.get(tenant, 0) + nbytes
        if total > self.limit_nbytes:
            raise OverQuota(
                f"pinning {nbytes} bytes would make {total} pinned bytes in the {self._tier} tier, "
                f"the limit is {self.limit_nbytes} (pin_max_fraction); unpin something"
            )
        sharing = len({tenant, *self._tenants(), *self._by_tenant})
        share = self.limit_nbytes // sharing
        if own > share:
            raise OverQuota(
                f"pinning {nbytes} bytes would make {own} bytes pinned for {tenant or 'callers without a tenant'!r} in "
                f"the {self._tier} tier, the share of each of {sharing} is {share} of {self.limit_nbytes} "
                "(pin_max_fraction); unpin something"
            )

    def nbytes_of(self, key: Key) -> int:
        """What a pinned key takes; 0 for any other."""
        found = self._pins.get(key)
        return 0 if found is None else found[1]

    def keys_now(self) -> list[Key]:
        """A copy of all keys. Any thread, without the lock."""
        return self._pins.keys_now()

    def __contains__(self, key: object) -> bool:
        return key in self._pins

    def __iter__(self) -> Iterator[Key]:
        return iter(self._pins)

    def __len__(self) -> int:
        return self._count
