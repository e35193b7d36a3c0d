"""Which key leaves a tier next: first whose, then which.

Each owner (a tenant; see `tenants`) has an order of its own under the tier's policy. Who is over the quota gives up its
own keys; otherwise who holds the most bytes does. So a tenant that floods the store evicts itself first. Within an
owner the policy names a victim, and the deepest of its descendants that the tier holds leaves in its place: no chunk
loses its parent to an eviction, whatever the policy. Under LRU, touched deepest first, the victim is that leaf already.
Knows keys, sizes and owners, no values. Not thread-safe: the tier's lock covers it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from math import inf

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
        self._used: dict[Owner, int] = {NOBODY: 0}
        self._pinned: dict[Key, int] = {}
        self._pinned_nbytes = 0

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of pinned keys."""
        return self._pinned_nbytes

    def used(self) -> dict[Owner, int]:
        """Bytes by owner, of those who hold any, pinned ones included."""
        return {owner: nbytes for owner, nbytes in self._used.items() if nbytes}

    def within_quota(self, key: Key, nbytes: int) -> bool:
        """Whether the owner of a key may hold `nbytes` more now."""
        return self._left(self._owner_of(key)) >= nbytes if self._quotas else True

    def admits(self, key: Key, nbytes: int) -> bool:
        """Whether the owner of a key may ever hold this many bytes under it."""
        return nbytes <= self._quotas.get(self._owner_of(key), nbytes) if self._quotas else True

    def _left(self, owner: Owner) -> float:
        return self._quotas.get(owner, inf) - self._used.get(owner, 0)

    def track(self, key: Key, nbytes: int, *, soon: bool = False) -> None:
        """Count a new key as held, as the most recently used; `soon`: as the next to leave, unless it is used."""
        owner = self._owner_of(key)
        order = self._orders.get(owner)
        if order is None:
            order = self._orders[owner] = self._policy()
            self._used[owner] = 0
        self._used[owner] += nbytes
        order.track(key, soon=soon)

    def touch(self, keys: Iterable[Key]) -> None:
        """Count as use, in the order given."""
        if len(self._orders) == 1:
            touch = self._orders[NOBODY].touch
            for key in keys:
                touch(key)
            return
        for key in keys:
            order = self._orders.get(self._owner_of(key))
            if order is not None:
                order.touch(key)

    def forget(self, key: Key, nbytes: int) -> None:
        """Let go of a key held with so many bytes, and of any memory of it."""
        self._let_go(key, nbytes).forget(key)

    def evict(self, key: Key, nbytes: int) -> None:
        """Let go of a key because its place is needed."""
        self._let_go(key, nbytes).evict(key)

    def _let_go(self, key: Key, nbytes: int) -> Policy:
        owner = self._owner_of(key)
        self._used[owner] -= nbytes
        self._pinned_nbytes -= self._pinned.pop(key, 0)
        return self._orders[owner]

    def victim(self, incoming: Key, nbytes: int) -> Key | None:
        """The key to evict next for `nbytes` under `incoming`; None when everything that could go is pinned."""
        for owner in self._owners_in_turn(incoming, nbytes):
            order = self._orders[owner]
            key = order.victim()
            if key is not None:
                return key if self._chains is None else self._chains.leaf(key, order)
        return None

    def _owners_in_turn(self, incoming: Key, nbytes: int) -> list[Owner]:
        if len(self._orders) == 1:
            return [NOBODY]
        owner = self._owner_of(incoming)
        if self._left(owner) < nbytes:
            return [owner]
        # With what comes in counted: among equals it is the newcomer's owner who gives way.
        return sorted(self._orders, key=lambda each: -self._used[each] - (nbytes if each == owner else 0))

    def pin(self, key: Key, nbytes: int) -> None:
        """Keep a key held from being a victim. A pinned key: nothing happens."""
        if key not in self._pinned:
            self._pinned[key] = nbytes
            self._pinned_nbytes += nbytes
            self._orders[self._owner_of(key)].forget(key)

    def unpin(self, key: Key) -> None:
        """Let a key be a victim again, as the most recently used."""
        nbytes = self._pinned.pop(key, None)
        if nbytes is not None:
            self._pinned_nbytes -= nbytes
            self._orders[self._owner_of(key)].track(key)

    def pinned_beside(self, key: Key) -> int:
        """Bytes of pinned keys other than this one, which would be replaced."""
        return self._pinned_nbytes - self._pinned.get(key, 0)

    def is_pinned(self, key: Key) -> bool:
        """Whether a key is held and pinned."""
        return key in self._pinned

    def __contains__(self, key: object) -> bool:
        return key in self._pinned or any(key in order for order in self._orders.values())

    def __iter__(self) -> Iterator[Key]:
        """Keys, those likely to leave sooner first, pinned ones last."""
        return chain(*self._orders.values(), self._pinned)

    def __len__(self) -> int:
        return len(self._pinned) + sum(map(len, self._orders.values()))
