"""Which key leaves a tier next: it chooses the owner first, then the key.

Each lane (a tenant, or one of its namespaces that has a quota; see `owner`) has an order of its own under the tier's
policy. An owner over its quota loses its own keys; otherwise the tenant that holds the most bytes does. So a tenant
that floods the store evicts its own entries first. Within a lane the policy names a victim, and one of its descendants
that the tier holds leaves in its place (`Branches`): no eviction takes a chunk's parent, whatever the policy, unless
more than a thousand chunks continue each other below it. Under LRU, with chains touched deepest first, the victim
already is a leaf.
Knows keys, sizes and owners, and looks at no value. Not thread-safe: the tier's lock covers it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from math import inf

import numpy as np

from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.chains import Chains
from kvstore.metadata.index import Column, Spread, hashes_of
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, TIERS, Owner
from kvstore.policies import Policy
from kvstore.policies.lru import LRU, KeyOrder
from kvstore.tiers.pinned import Pinned

LEVELS_MAX = 1024
"""Chunks followed downwards for one eviction: 0.2 ms. Who touches a chain deepest first never goes down one."""


def nobody(key: Key) -> Owner:
    """The owner of every key in a tier without accounts."""
    del key
    return NOBODY


def _copy(keys: Iterable[Key]) -> list[Key]:
    while True:
        try:
            return list(keys)
        except RuntimeError:  # it changed meanwhile
            continue


class Branches:
    """Which keys of one tier continue which other keys, so that an eviction finds a chunk that nothing continues.

    `chains` knows the children of a key wherever they are held; a root may have a million of them and a tier hold the
    last one. This knows those that may leave this tier, so nobody looks through the others. A parent need not be held.
    Children by parent; all operations O(1). Its owner does not ask it to add or drop a key without a parent.
    """

    def __init__(self) -> None:
        # Most chunks have one child: no container for it. Of several the newest is the first.
        self._below: Spread[Key | KeyOrder] = Spread()

    def __len__(self) -> int:
        return len(self._below)

    def add(self, links: Iterable[tuple[Key, Key]]) -> None:
        """Add keys, each with its parent, of which it is the newest child."""
        for key, parent in links:
            held = self._below.get(parent)
            if held is None:
                self._below[parent] = key
            elif isinstance(held, KeyOrder):
                held.prepend(key)
            elif held != key:
                children = self._below[parent] = KeyOrder()
                children.append(key)
                children.append(held)

    def drop(self, key: Key, parent: Key) -> None:
        """Drop a key from those of its parent, if it is there."""
        held = self._below.get(parent)
        if held is None:
            return
        if isinstance(held, KeyOrder):
            held.discard(key)
            if held:
                return
        elif held != key:
            return
        del self._below[parent]

    def leaf(self, key: Key) -> Key:
        """The newest chunk that continues a key, directly or not, and that none continues; itself if there is none."""
        for _ in range(LEVELS_MAX):
            held = self._below.get(key)
            if held is None:
                break
            newest = held.first() if isinstance(held, KeyOrder) else held
            assert newest is not None, "it has no children"
            key = newest
        return key


class Order:
    """The keys of one tier, the pinned ones apart.

    owner_of: the owner of every key held. chains: which key continues which; None: there are no chains. pin_max_nbytes:
    of all that is pinned. tenants: those that share the store.
    """

    def __init__(
        self,
        policy: Callable[[], Policy] = LRU,
        *,
        chains: Chains | None = None,
        owner_of: Callable[[Key], Owner] = nobody,
        tier: str = "hot",
        pin_max_nbytes: float = inf,
        tenants: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._policy = policy
        self._index = None if chains is None else chains.index
        self._branches = Branches()
        self.owner_of = owner_of
        self._at = TIERS.index(tier)
        self._first = policy()
        self._lanes: dict[str, Policy] = {"": self._first}
        self._used: dict[str, int] = {"": 0}
        self._tenant_of: dict[str, str] = {"": ""}
        self._alone = True  # one lane, as in most stores: `owner_of` is not called
        self.tracks: Callable[[object], bool] = self._first.__contains__
        """Whether a key is held and not pinned here."""
        self.touch: Callable[[Iterable[Key]], list[Key]] = self._first.touch
        """Count as use, in the order given. Returns the held keys without the pinned ones."""
        self.tenants = tenants
        self._pinned = Pinned(pin_max_nbytes, tier, tenants)

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of pinned keys."""
        return self._pinned.nbytes

    def set_pin_limit(self, nbytes: float) -> None:
        """How many bytes may be pinned. What is pinned over it stays."""
        self._pinned.limit_nbytes = nbytes

    def used(self) -> dict[str, int]:
        """Bytes by tenant, pinned ones included, without tenants that hold none."""
        return {tenant: nbytes for tenant in set(self._tenant_of.values()) if (nbytes := self._used_by(tenant))}

    def _used_by(self, tenant: str) -> int:
        return sum(nbytes for lane, nbytes in self._used.items() if self._tenant_of[lane] == tenant)

    def within_quota(self, owner: Owner, nbytes: int) -> bool:
        """Whether an owner may hold `nbytes` more now."""
        return self._left_of_own(owner) >= nbytes and self._left_of_tenant(owner) >= nbytes

    def admits(self, owner: Owner, nbytes: int) -> bool:
        """Whether an owner's quotas ever allow an entry of `nbytes`."""
        return nbytes <= owner.limits[self._at] and nbytes <= owner.tenant_limits[self._at]

    def _left_of_own(self, owner: Owner) -> float:
        return owner.limits[self._at] - self._used.get(owner.lane, 0)

    def _left_of_tenant(self, owner: Owner) -> float:
        limit = owner.tenant_limits[self._at]
        return limit if limit == inf else limit - self._used_by(owner.tenant)

    def count(self, owner: Owner, nbytes: int) -> None:
        """Count bytes of an owner; negative: fewer."""
        if owner.lane not in self._lanes:
            self._open_lane(owner)
        self._used[owner.lane] += nbytes
        owner.nbytes[self._at] += nbytes

    def _open_lane(self, owner: Owner) -> Policy:
        self._used[owner.lane] = 0
        self._tenant_of[owner.lane] = owner.tenant
        self._alone, self.touch, self.tracks = False, self._touch_each, self._tracks_each
        lane = self._lanes[owner.lane] = self._policy()
        return lane

    def _lane_of(self, key: Key) -> Policy:
        if self._alone:
            return self._first
        return self._lanes.get(self.owner_of(key).lane, self._first)

    def track(
        self, key: Key, nbytes: int = 0, *, soon: bool = False, owner: Owner | None = None, meta: Meta | None = None
    ) -> None:
        """Track a new key as the most recently used; `soon`: as the next to leave, unless it is used.

        owner, meta: the key's, where the caller has them.
        """
        meta = meta or self._meta(key)
        if owner is None:
            owner = self.owner_of(key) if meta is None else meta.owner
        name = owner.lane
        lane = self._lanes.get(name)
        (self._open_lane(owner) if lane is None else lane).track(key, soon=soon)
        if meta is not None and meta.parent is not None:
            self._branches.add(((key, meta.parent),))
        self._used[name] += nbytes
        owner.nbytes[self._at] += nbytes

    def track_all(self, held: Sequence[tuple[Entry, Meta]], nbytes: int) -> None:
        """`track` of the keys of new entries of one owner. nbytes: of all."""
        owner = held[0][1].owner
        lane = self._lanes.get(owner.lane)
        if lane is None:
            lane = self._open_lane(owner)
        for entry, meta in held:
            lane.track(entry.key, soon=meta.soon)
        links = [(entry.key, meta.parent) for entry, meta in held if meta.parent is not None]
        if links:
            self._branches.add(links)
        self._used[owner.lane] += nbytes
        owner.nbytes[self._at] += nbytes

    def _meta(self, key: Key) -> Meta | None:
        """The key's Meta, where this order knows of chains."""
        return None if self._index is None else self._index.get(key)

    def recover(self, keys: Sequence[Key], rows: Column, owners: Sequence[Owner], owner: Column) -> None:
        """Track keys that a restart found: those at `rows`, the least recently used first. `count` counts their bytes.

        For an order without chains, as of the tier that a restart fills. owner: for each of `keys`, one of `owners`.
        """
        lanes: dict[str, list[int]] = {}
        for code, of in enumerate(owners):
            lanes.setdefault(of.lane, []).append(code)
            if of.lane not in self._lanes:
                self._open_lane(of)
        hashes = hashes_of(keys)
        for name, codes in lanes.items():
            own, lane = rows if len(lanes) == 1 else rows[np.isin(owner[rows], codes)], self._lanes[name]
            if isinstance(lane, LRU):
                lane.extend(keys, own, hashes)
            else:
                for row in own.tolist():
                    lane.track(keys[row])

    def _touch_each(self, keys: Iterable[Key]) -> list[Key]:
        return [key for key in keys if self._lane_of(key).touch((key,))]

    def forget(self, key: Key, nbytes: int = 0) -> None:
        """Stop tracking a key of `nbytes`, and drop its ghost."""
        self._let_go(key, nbytes).forget(key)

    def evict(self, key: Key, nbytes: int = 0) -> None:
        """Stop tracking a key because its place is needed."""
        self._let_go(key, nbytes).evict(key)

    def _let_go(self, key: Key, nbytes: int) -> Policy:
        meta = self._meta(key)
        if self._pinned.nbytes:
            self._pinned.release(key)
        if meta is not None and meta.parent is not None:
            self._branches.drop(key, meta.parent)
        if not nbytes:  # none were counted, or nothing is held: a tier may be told to forget what it does not hold
            return self._first if self._alone else self._lane_of(key)
        owner = self.owner_of(key) if meta is None else meta.owner
        self._used[owner.lane] -= nbytes
        owner.nbytes[self._at] -= nbytes
        return self._lanes[owner.lane]

    def victim(self, owner: Owner, nbytes: int) -> Key | None:
        """The key to evict next for `nbytes` of an owner; None if all keys that could go are pinned."""
        if self._alone and not owner.limited:
            key = self._first.victim()
            return None if key is None else self.leaf(key)
        for lane in self._lanes_in_turn(owner, nbytes):
            key = self._lanes[lane].victim()
            if key is not None:
                return self.leaf(key)
        return None

    def leaf(self, key: Key) -> Key:
        """A descendant that would leave before a key, or the key."""
        return self._branches.leaf(key)

    def _lanes_in_turn(self, owner: Owner, nbytes: int) -> list[str]:
        if self._left_of_own(owner) < nbytes:
            return [owner.lane] if owner.lane in self._lanes else []
        # The new bytes are counted: among equals the owner of the new entry gives way.
        tenants = dict.fromkeys(self._tenant_of.values(), 0)
        for lane, used in self._used.items():
            tenants[self._tenant_of[lane]] += used
        tenants[owner.tenant] = tenants.get(owner.tenant, 0) + nbytes
        own_only = self._left_of_tenant(owner) < nbytes
        lanes = [lane for lane in self._lanes if not own_only or self._tenant_of[lane] == owner.tenant]
        return sorted(
            lanes,
            key=lambda lane: (
                -tenants[self._tenant_of[lane]],
                -self._used[lane] - (nbytes if lane == owner.lane else 0),
            ),
        )

    def pin(self, key: Key, nbytes: int) -> None:
        """Keep a held key from being a victim. Does nothing if it is pinned."""
        if key not in self._pinned:
            self._pinned.hold(key, nbytes, self.owner_of(key).tenant)
            self._lane_of(key).forget(key)
            meta = self._meta(key)
            if meta is not None and meta.parent is not None:
                self._branches.drop(key, meta.parent)

    def unpin(self, key: Key) -> None:
        """Allow a key to be a victim again; it counts as the most recently used."""
        if self._pinned.release(key):
            self._lane_of(key).track(key)
            meta = self._meta(key)
            if meta is not None and meta.parent is not None:
                self._branches.add(((key, meta.parent),))

    def pinned_beside(self, key: Key) -> int:
        """Bytes of the pinned keys other than this one, which would be replaced."""
        return self._pinned.nbytes - self._pinned.nbytes_of(key)

    def check_pin(self, key: Key, nbytes: int) -> None:
        """Raise OverQuota if a key of so many bytes may not be pinned."""
        self._pinned.check(nbytes, self.owner_of(key).tenant)

    def is_pinned(self, key: Key) -> bool:
        """Whether a key is held and pinned."""
        return key in self._pinned

    def __contains__(self, key: object) -> bool:
        return self.tracks(key) or key in self._pinned

    def _tracks_each(self, key: object) -> bool:
        return isinstance(key, bytes) and key in self._lane_of(Key(key))

    def __iter__(self) -> Iterator[Key]:
        """Keys, those that leave sooner first, pinned ones last."""
        return chain(*self._lanes.values(), self._pinned)

    def keys_now(self) -> list[Key]:
        """A copy of what iterating gives, in short steps of the interpreter. Any thread, without the lock."""
        found: list[Key] = []
        for lane in list(self._lanes.values()):
            found += lane.keys_now() if isinstance(lane, LRU) else _copy(lane)
        return found + self._pinned.keys_now()

    def __len__(self) -> int:
        return len(self._pinned) + sum(map(len, self._lanes.values()))
