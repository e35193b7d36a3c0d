"""What a door may call: the verbs that a caller can reach, whether it sees the whole store or its tenant's part.

`Store` has them over every key, the daemon's `TenantView` over the keys of one tenant. Keys, specs and options are
checked before they come here: their types say so. Imports no torch: the types of the engine are named, not loaded.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, Protocol

from kvstore.config import StoreConfig
from kvstore.hit import Held, Hit, Match
from kvstore.keys import CheckedKeys, Key
from kvstore.lookup import Lookup
from kvstore.options import PutOptions

if TYPE_CHECKING:
    from kvstore.entries.entry import Entry
    from kvstore.residency.read_path import Found, Plan
    from kvstore.shm.arena import Room
    from kvstore.store import Store


class StoreView(Protocol):
    """The verbs; each means what `Store` says of it."""

    @property
    def config(self) -> StoreConfig:
        """The store's settings."""
        ...

    def put_entries(
        self, entries: "Sequence[Entry]", options: PutOptions, *, chain: bool = False, parent: Key | None = None
    ) -> int:
        """Put entries that a door has made, root first. Returns how many were stored."""
        ...

    def plan(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        keys: CheckedKeys,
        *,
        leading: bool = False,
        accept: Collection[str] = frozenset(),
        from_nbytes: int = 0,
        at_most_nbytes: float = inf,
        whole_if_hot: bool = False,
        charge: "Callable[[Plan], None] | None" = None,
        count_later: bool = False,
        lookup: Lookup | None = None,
    ) -> "Plan":
        """Look once: what is where, how big, what it needs; charge and count."""
        ...

    @property
    def shares(self) -> bool:
        """Whether there is a shared store to `bring` from."""
        ...

    def bring(
        self, keys: CheckedKeys, *, leading: bool = True, lookup: Lookup | None = None, timeout_s: float = inf
    ) -> None:
        """Hold what other hosts have put of a chain. May wait for the shared store."""
        ...

    def ends_here(self, keys: CheckedKeys) -> bool:
        """Whether not all of these keys are held here. Never waits."""
        ...

    def read(self, plan: "Plan", *, room: "Room | None" = None) -> "Iterator[Hit | Found | None]":
        """The hits of a plan, not copied."""
        ...

    def match(self, keys: CheckedKeys, *, lookup: Lookup | None = None, local: bool = False) -> Match:
        """How many leading keys of a chain are held, and where; local: on this host."""
        ...

    def locate(self, keys: CheckedKeys, *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held."""
        ...

    def first_held(self, keys: CheckedKeys) -> int:
        """Which of some keys is the first that is held; their number: none is."""
        ...

    def touch(self, keys: CheckedKeys, *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first. Returns how many are held."""
        ...

    def delete(self, keys: CheckedKeys, /, *, keep_shared: bool = False) -> int:
        """Forget keys for good. Returns how many were held."""
        ...

    def pin(self, keys: CheckedKeys, /, *, ttl_s: float | None = None) -> int:
        """Keep keys until unpinned, or for `ttl_s` seconds. Returns how many are held."""
        ...

    def unpin(self, keys: CheckedKeys, /) -> int:
        """Let go of them again. Returns how many are held and unpinned now."""
        ...


if TYPE_CHECKING:

    def _is_one(store: Store) -> StoreView:
        return store
