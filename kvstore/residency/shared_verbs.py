"""The verbs of a `Store` that have to do with other hosts, and what its own verbs do for them. Any thread."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf

from kvstore.errors import ConfigError
from kvstore.hit import Explanation
from kvstore.keys import CheckedKeys
from kvstore.lookup import Lookup
from kvstore.metadata.block_events import BlockEvents
from kvstore.residency.sharing import Sharing
from kvstore.residency.state import Residency


class SharedVerbs:
    """Part of a store. Without [store.shared] there is nothing to ask."""

    _r: Residency
    _sharing: Sharing | None
    shares: bool
    """Whether there is a shared store to `bring` from."""

    def bring(
        self, keys: Sequence[bytes], *, leading: bool = True, lookup: Lookup | None = None, timeout_s: float = inf
    ) -> None:
        """Hold what other hosts have put of a chain, from where it ends on this host; for `plan`, which never waits.

        Waits for the shared store, `store.shared.lookup_s` and `fetch_s` at most and no longer than timeout_s. Without
        [store.shared], or where the chain does not end here, it does nothing. leading: False: of keys in any order,
        those that a match has found outside.
        """
        if self._sharing is not None:
            self._sharing.bring(CheckedKeys(keys), lookup, timeout_s, leading=leading)

    def ends_here(self, keys: Sequence[bytes]) -> bool:
        """Whether `bring` of these keys may wait: something is shared, and not all of them are held here."""
        return self._sharing is not None and self._sharing.ends_here(CheckedKeys(keys))

    def block_events(self) -> BlockEvents:
        """Where every key that comes or leaves from now on is told of, for one publisher to take."""
        with self._r.lock:
            self._r.events = events = BlockEvents()
        return events

    def check_shared(self) -> list[str]:
        """What is wrong with the shared store, a sentence each; empty: nothing. Puts, reads and deletes a probe.

        Raises ConfigError without [store.shared].
        """
        return self._shared().source.check()

    def flush_shared(self, namespace: str | None = None) -> None:
        """Put what the shared store has of a namespace, or everything, out of reach: all hosts miss it within 2 s.

        What hosts hold in their own tiers stays. Raises ConfigError without [store.shared], SharedUnavailable where the
        shared store does not answer.
        """
        self._shared().source.flush(namespace)

    def _shared(self) -> Sharing:
        if self._sharing is None:
            raise ConfigError("nothing is shared with other hosts: set store.shared.url")
        return self._sharing

    @contextmanager
    def _barred(self, keys: CheckedKeys, *, some_stay: bool) -> Iterator[None]:
        """While keys are deleted: they are barred before the first of them leaves, and for good when this ends."""
        if self._sharing is None:
            yield
            return
        self._sharing.bar(keys)
        yield
        self._sharing.deleted(keys, some_stay=some_stay)

    def _with_shared(self, found: list[Explanation]) -> list[Explanation]:
        if self._sharing is None:
            return found
        shared = self._sharing.explain(CheckedKeys(of.key for of in found))
        return [replace(of, shared=text) for of, text in zip(found, shared, strict=True)]
