"""Which key leaves a tier next: first whose, then which.

Each owner (a tenant; see `tenants`) has an order of its own under the tier's policy. Who is over the quota gives up its
own keys; otherwise who holds the most bytes does. So a tenant that floods the store evicts itself first. Within an
owner the policy names a victim, and the deepest of its descendants that the tier holds leaves in its place: no chunk
loses its parent to an eviction, whatever the policy. Under LRU, touched deepest first, the victim is that leaf already.
Knows keys, sizes and owners, no values. Not thread-safe: the tier's lock covers it.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain

from kvstore.chains import Chains
from kvstore.entry import Key
from kvstore.policies import Policy
from kvstore.policies.lru import LRU

Owner = str
NOBODY: Owner = ""
"""The owner of keys outside every tenant: the embedded store's own."""


def nobody(key: Key) -> Owner:
    """The owner of every key where there are no tenants."""
    del key
    return NOBODY


class Order:
    """Keys of one tier, pinned ones apart.

    owner_of: whose a key is. quotas: bytes an owner may hold here; who is not in it has no limit of its own.
    chains: which key continues which; None: none does.
    """

    def __init__(
        self,
        policy: Callable[[], Policy] = LRU,
        *,
        chains: Chains | None = None,
        owner_of: Callable[[Key], Owner] = nobody,
        quotas: Mapping[Owner, int] | None = None,
    ) -> None:
        self._policy = policy
        self._chains = chains
        self._owner_of = owner_of
        self._quotas = quotas or {}
        self._orders: dict[Owner, Policy] = {NOBODY: policy()}
        self._sizes: dict[Key, int] = {}
        self._pinned: set[Key] = set()
        self._used: dict[Owner, int] = {NOBODY: 0}
        self._pinned_nbytes = 0

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of pinned keys."""
        return self._pinned_nbytes

    def used_nbytes(self, owner: Owner) -> int:
        """Bytes an owner holds, pinned ones included."""
        return self._used.get(owner, 0)

    def used(self) -> dict[Owner, int]:
        """Bytes by owner, of those who hold any."""
        return {owner: nbytes for owner, nbytes in self._used.items() if nbytes}

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key; 0 when it is not here."""
        return self._sizes.get(key, 0)

    def over_quota_nbytes(self, key: Key, nbytes: int) -> int:
        """How far `nbytes` more under this key would take its owner over the quota; 0 or less: not at all."""
        if not self._quotas:
            return 0
        owner = self._owner_of(key)
        quota = self._quotas.get(owner)
        return 0 if quota is None else self._used.get(owner, 0) + nbytes - quota

    def admits(self, key: Key, nbytes: int) -> bool:
        """Whether the owner's quota could ever hold this many bytes under one key."""
        quota = self._quotas.get(self._owner_of(key)) if self._quotas else None
        return quota is None or nbytes <= quota

    def track(self, key: Key, nbytes: int, *, soon: bool = False) -> None:
        """Count a key as held, as the most recently used; `soon`: as the next to leave, unless it is used."""
        self.forget(key)
        owner = self._owner_of(key)
        order = self._orders.get(owner)
        if order is None:
            order = self._orders[owner] = self._policy()
            self._used[owner] = 0
        self._sizes[key] = nbytes
        self._used[owner] += nbytes
        order.track(key, soon=soon)

    def resize(self, key: Key, nbytes: int) -> None:
        """Correct the bytes counted for a key held."""
        change = nbytes - self._sizes[key]
        self._sizes[key] = nbytes
        self._used[self._owner_of(key)] += change
        if key in self._pinned:
            self._pinned_nbytes += change

    def touch(self, key: Key) -> None:
        """Count as use."""
        order = self._orders.get(self._owner_of(key))
        if order is not None:
            order.touch(key)

    def forget(self, key: Key) -> None:
        """Let go of a key, and of any memory of it."""
        self._drop(key)
        order = self._orders.get(self._owner_of(key))
        if order is not None:
            order.forget(key)

    def evict(self, key: Key) -> None:
        """Let go of a key because its place is needed."""
        self._drop(key)
        order = self._orders.get(self._owner_of(key))
        if order is not None:
            order.evict(key)

    def _drop(self, key: Key) -> None:
        nbytes = self._sizes.pop(key, None)
        if nbytes is None:
            return
        self._used[self._owner_of(key)] -= nbytes
        if key in self._pinned:
            self._pinned.remove(key)
            self._pinned_nbytes -= nbytes

    def victim(self, incoming: Key | None = None) -> Key | None:
        """The key to evict next for the sake of `incoming`; None when everything that could go is pinned."""
        for owner in self._owners_in_turn(incoming):
            key = self._orders[owner].victim()
            if key is not None:
                return key if self._chains is None else self._chains.leaf(key, self._sizes)
        return None

    def _owners_in_turn(self, incoming: Key | None) -> list[Owner]:
        if len(self._orders) == 1:
            return [NOBODY]
        if (
            incoming is not None
            and self.over_quota_nbytes(incoming, 0) >= 0
            and self._quotas.get(owner := self._owner_of(incoming))
        ):
            return [owner]
        return sorted(self._orders, key=lambda owner: -self._used[owner])

    def pin(self, key: Key) -> None:
        """Keep a key held from being a victim. Unknown or pinned: nothing happens."""
        nbytes = self._sizes.get(key)
        if nbytes is None or key in self._pinned:
            return
        self._pinned.add(key)
        self._pinned_nbytes += nbytes
        self._orders[self._owner_of(key)].forget(key)

    def unpin(self, key: Key) -> None:
        """Let a key be a victim again, as the most recently used."""
        if key in self._pinned:
            self._pinned.remove(key)
            self._pinned_nbytes -= self._sizes[key]
            self._orders[self._owner_of(key)].track(key)

    def pinned_beside(self, key: Key) -> int:
        """Bytes of pinned keys other than this one, which would be replaced."""
        return self._pinned_nbytes - (self._sizes[key] if key in self._pinned else 0)

    def is_pinned(self, key: Key) -> bool:
        """Whether a key is held and pinned."""
        return key in self._pinned

    @property
    def held(self) -> Container[Key]:
        """The keys held, pinned ones included."""
        return self._sizes.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __iter__(self) -> Iterator[Key]:
        """Keys, those likely to leave sooner first, pinned ones last."""
        return chain(*self._orders.values(), self._pinned)

    def __len__(self) -> int:
        return len(self._sizes)
