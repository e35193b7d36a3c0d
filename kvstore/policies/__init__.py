"""Which key leaves a tier next. A policy only keeps an order: it sees keys, never bytes, sizes, time, chains or pins.

A pinned key is not tracked: its tier forgets it here and tracks it again when it is unpinned. A policy may remember
keys that were evicted (ghosts), at most as many as it tracks; `forget` leaves no ghost, `evict` may leave one.
Chunks arrive and are touched deepest first, root last. LRU then evicts leaf first by itself; for every policy the tier
evicts a victim's deepest descendant in its place (`tiers.order`), so no policy can leave an orphan.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

from kvstore.errors import ConfigError
from kvstore.extensions import POLICIES
from kvstore.keys import Key


class Policy(Protocol):
    """An order of keys. Not thread-safe: the tier's lock covers it."""

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the next to leave. A known key is touched."""
        ...

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count as use, in the order given. Returns the tracked ones; unknown keys are ignored."""
        ...

    def forget(self, key: Key) -> None:
        """Stop tracking a key, and drop its ghost. An unknown key is ignored."""
        ...

    def evict(self, key: Key) -> None:
        """Stop tracking a key because its place is needed. It need not be the `victim`. An unknown key is ignored."""
        ...

    def victim(self) -> Key | None:
        """The key that should leave next, still tracked; None if no key is."""
        ...

    def __iter__(self) -> Iterator[Key]:
        """Tracked keys, those that leave sooner first."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...


def policy_named(name: str) -> Callable[[], Policy]:
    """What makes a policy of this name: ours, registered, or offered by a package.

    Raises KeyError for an unknown name: the configuration has checked it. Raises ConfigError where it cannot be loaded.
    """
    from kvstore.policies.arc import ARC
    from kvstore.policies.lru import LRU
    from kvstore.policies.s3fifo import S3FIFO

    factories: dict[str, Callable[[], Policy]] = {"lru": LRU, "arc": ARC, "s3fifo": S3FIFO}
    own = factories.get(name)
    found = own if own is not None else POLICIES.find(name, _register)
    if found is None:
        raise KeyError(name)
    return cast("Callable[[], Policy]", found)


def register_policy(name: str, factory: Callable[[], Policy] | object) -> None:
    """Make a policy known under a name, for `StoreConfig(policy=name)`. factory: makes an empty one; often a class.

    An installed package may offer it instead, as an entry point of the group "kvstored.policies". Raises ConfigError
    for a name that is taken, and for what does not do what `Policy` says; a few keys are put through one to see.
    """
    _register(name, factory)


def _register(name: str, factory: object) -> None:
    if not callable(factory):
        raise ConfigError(f"policy {name!r}: expected a class or function that makes a policy, got {factory!r:.80}")
    try:
        problem = _problem_of(factory)
    except Exception as error:
        raise ConfigError(f"policy {name!r}: {type(error).__name__}: {error}") from error
    if problem:
        raise ConfigError(f"policy {name!r}: {problem}")
    POLICIES.add(name, factory)


def _problem_of(factory: Callable[[], Any]) -> str | None:
    """What a policy does otherwise than `Policy` says, tried with four keys; None: nothing."""
    a, b, c, d = (Key(name) for name in (b"a", b"b", b"c", b"d"))
    policy: Policy = factory()
    if policy.victim() is not None or len(policy):
        return "a new one must be empty, without a victim"
    for key in (a, b, c):
        policy.track(key)
    policy.track(d, soon=True)
    if (len(policy), set(policy), a in policy, b"x" in policy) != (4, {a, b, c, d}, True, False):
        return "it must hold the keys that it was told to track, and no others"
    if list(policy.touch([a, Key(b"x"), b])) != [a, b]:
        return "touch must return the keys it keeps of those given, in their order"
    for forgotten in (policy.forget, policy.evict):
        victim = policy.victim()
        if victim is None or victim not in policy:
            return "victim must be one of the keys it holds"
        forgotten(victim)
        forgotten(Key(b"x"))
        if victim in policy or victim in set(policy):
            return "forget and evict must let go of the key"
    return None if len(policy) == 2 else "forget and evict must let go of one key each"
