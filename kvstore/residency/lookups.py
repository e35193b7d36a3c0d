"""Counts lookups of prefixes, each once: a get of what a match found a moment ago is the same lookup.

`Asked` remembers which keys were matched lately, so that it also holds for a match in an engine's scheduler and a get
in its worker, and for callers that say nothing of it. Bounded in keys and in time. Everything under the store's lock.
"""

from collections.abc import Sequence

from kvstore.keys import Key
from kvstore.lookup import ELSEWHERE, Lookup
from kvstore.metadata.meta import Meta
from kvstore.stats import LookupCounters, MissCause

ASKED_MAX = 16_384
"""Keys remembered in each half: 4 million tokens of chunks of 256, about 2 MB."""
ASKED_S = 30.0
"""How long each half is filled: an engine gets what it matched within seconds."""


class Asked:
    """Keys that a match named and no get has asked for yet, with how often, in two halves by age."""

    def __init__(self) -> None:
        # No Counter: its `update` takes longer than the whole match of a key.
        self.young: dict[Key, int] = {}
        self.old: dict[Key, int] = {}
        self._since = 0.0

    def __bool__(self) -> bool:
        return bool(self.young or self.old)

    def note(self, keys: Sequence[Key], now: float) -> None:
        """Remember the keys of a match."""
        if len(self.young) >= ASKED_MAX or not 0 <= now - self._since < ASKED_S:
            stale = not 0 <= now - self._since < 2 * ASKED_S
            self.old, self.young, self._since = {} if stale else self.young, {}, now
        young = self.young
        for key in keys:
            young[key] = young.get(key, 0) + 1

    def take(self, key: Key, now: float) -> bool:
        """Whether a match named the key within the last minute; that match is then used up."""
        if not 0 <= now - self._since < 2 * ASKED_S:
            self.young.clear()
            self.old.clear()
            return False
        for half in (self.young, self.old):
            left = half.get(key)
            if left:
                if left == 1:
                    del half[key]
                else:
                    half[key] = left - 1
                return True
        return False

    def discard(self, key: Key) -> None:
        """Forget a key: it was put since, so the next get is another lookup."""
        self.young.pop(key, None)
        self.old.pop(key, None)


class Lookups:
    """The counters of lookups, and which are counted already."""

    def __init__(self, counters: LookupCounters) -> None:
        self.asked = Asked()
        self._counters = counters

    def matched(self, lookup: Lookup | None, keys: Sequence[Key], found: int, miss: MissCause | None) -> None:
        """Count a match, or a piece of one. found: how many of `keys`. miss: why the chain ended."""
        how = Lookup(len(keys)) if lookup is None else lookup
        self._add(how, found)
        if miss is not None and how.counted:
            self._counters.misses[miss] += 1

    def got(
        self, lookup: Lookup | None, keys: Sequence[Key], metas: Sequence[Meta | None], misses: Sequence[MissCause],
        *, ended: bool, leading: bool, now: float,
    ) -> Lookup | None:  # fmt: skip
        """Count the keys that a get covers. Returns what the same get's next keys count as.

        keys: those still asked for, the keys covered first. ended: the chain ends here, so the others are missing.
        """
        if lookup is None and not leading:
            self._each(keys, metas, misses, now)
            return None
        if (lookup is None or lookup.counted) and self._named_before(keys, len(metas), now):
            return ELSEWHERE
        how = Lookup(len(keys) if ended else len(metas)) if lookup is None else lookup
        self._add(how, len(metas) - (0 if leading else len(misses)))
        if misses and how.counted:
            self._counters.misses.update(misses)
        return lookup if lookup is None or len(metas) == len(keys) else lookup.continued()

    def lost(self, key_tokens: int, cause: MissCause) -> None:
        """What was counted as found is a miss after all."""
        c = self._counters
        c.hit_keys = max(0, c.hit_keys - 1)
        c.hit_tokens = max(0, c.hit_tokens - key_tokens)
        c.misses[cause] += 1

    def _add(self, how: Lookup, found: int) -> None:
        c = self._counters
        c.keys += how.keys
        c.tokens += how.tokens
        if how.counted:
            c.hit_keys += found
            c.hit_tokens += found * how.key_tokens

    def _named_before(self, keys: Sequence[Key], covered: int, now: float) -> bool:
        asked = self.asked
        if not asked or not keys or not asked.take(keys[0], now):
            return False
        for i in range(1, covered):
            asked.take(keys[i], now)
        return True

    def _each(self, keys: Sequence[Key], metas: Sequence[Meta | None], misses: Sequence[MissCause], now: float) -> None:
        """Keys that have nothing to do with each other."""
        asked = self.asked
        if not asked:
            c, count = self._counters, len(metas)
            c.keys += count
            c.hit_keys += count - len(misses)
            if misses:
                c.misses.update(misses)
            return
        causes = iter(misses)
        for key, meta in zip(keys, metas, strict=False):
            cause = next(causes) if meta is None else None
            if not asked.take(key, now):
                self._add(Lookup(1), int(meta is not None))
                if cause is not None:
                    self._counters.misses[cause] += 1
