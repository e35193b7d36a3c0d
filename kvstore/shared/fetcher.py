"""Read below cold: what other hosts have of a prefix, from where it ends on this host.

    look   the heads of all that follows, in one round trip: how many chunks there are, and how large
    bring  look, then the bodies in one more; each checked and installed below hot, the first chunk first

None of it waits longer than `lookup_s` and `fetch_s`, or than its caller has time. What had arrived by then is the hit;
the rest is fetched in the background. A key is asked for by one call at a time, the others wait for that one. An answer
"not there" holds for a second, a head for half a minute. Never raises what the store does wrong: it is a miss. Any
thread, without a lock.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

from kvstore.errors import RecordCorrupt, UnknownSeal
from kvstore.keys import CHUNK_TOKENS, Key
from kvstore.printable import printable
from kvstore.shared import SharedUnavailable
from kvstore.shared.names import name_of
from kvstore.shared.objects import Arrived, Head, opened
from kvstore.shared.outside import Outside

log = logging.getLogger(__name__)

ABSENT_S = 1.0
"""For so long a key that was not there is not asked for again: the same prompt often comes in a burst."""
HEAD_S = 30.0
"""For so long a head is believed: what a match has promised is got within that, by keys in any order."""
REMEMBERED_MAX = 16_384
WINDOW_NBYTES = 256 << 20
"""Bodies asked for at once: more would be in memory together before the first is installed."""
BACKGROUND_MAX = 64
BACKGROUND_S = 30.0
RATE_S = 30.0
"""For so long a measured speed speaks against fetching; then one fetch measures again."""

Install = Callable[[Sequence[Arrived], Key | None], int]
"""Hold a chain of entries that continues a key, root first. Returns how many of them, from the first on, are held."""


@dataclass(slots=True)
class Run:
    """What a prefix lacks. keys: in their order; parent: the chunk before, None: the first is a root.

    key_tokens: tokens of a chunk.
    """

    keys: Sequence[Key]
    parent: Key | None
    key_tokens: int

    def after(self, taken: int) -> "Run":
        """What is left when the first keys are held."""
        return Run(self.keys[taken:], self.keys[taken - 1] if taken else self.parent, self.key_tokens)


class Fetcher:
    """Asks for chunks and installs them."""

    def __init__(self, outside: Outside, install: Install, wake: Callable[[], None]) -> None:
        """wake: there is work for `run_once`."""
        self._out = outside
        self._install = install
        self._wake = wake
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._flights: dict[Key, threading.Event] = {}
        self._heads: OrderedDict[Key, tuple[Head, float]] = OrderedDict()
        self._absent: OrderedDict[Key, float] = OrderedDict()
        self._promised: OrderedDict[Key, tuple[Run, int, float]] = OrderedDict()
        self._later: deque[Run] = deque()
        self._damaged: deque[Key] = deque(maxlen=REMEMBERED_MAX)
        self._rate: float = 0.0
        self._rated_at = -inf

    def look(self, run: Run, timeout_s: float = inf) -> list[Head]:
        """The heads of the leading keys that can be read from the store. At most one round trip."""
        run = self._worth_asking(run)
        if not run.keys:
            return []
        with self._alone(run, min(timeout_s, self._out.config.lookup_s)):
            # Who waited for another finds what that one learned in memory.
            heads = self._looked(run, timeout_s)
        if not self._long_enough(len(heads), run) or self._slower_than_computing(heads, run):
            return []
        until = self._out.clock.now() + HEAD_S
        with self._lock:
            self._promised.update((key, (run, i, until)) for i, key in enumerate(run.keys[: len(heads)]))
            _trim(self._promised)
        return heads

    def promised(self, keys: Sequence[Key]) -> list[Run]:
        """What of these a `look` found lately and nobody has brought, each with the chunks it continues."""
        if not self._promised:
            return []
        now, found = self._out.clock.now(), dict[int, tuple[Run, int]]()
        with self._lock:
            for key in keys:
                run, at, until = self._promised.pop(key, (None, 0, 0.0))
                if run is not None and until > now:
                    found[id(run)] = run, max(at, found.get(id(run), (run, 0))[1])
        return [Run(run.keys[: at + 1], run.parent, run.key_tokens) for run, at in found.values()]

    def bring(self, run: Run, timeout_s: float = inf) -> bool:
        """Install what the store has of a run. True: another call was asking already, look again at what is missing."""
        run = self._worth_asking(run)
        if not run.keys:
            return False
        config = self._out.config
        with self._alone(run, min(timeout_s, config.lookup_s + config.fetch_s)) as first:
            if first:
                self._fetched(run, timeout_s, background=False)
            return not first

    def run_once(self) -> None:
        """Fetch what calls left unfinished, and have damaged objects deleted. One thread at a time."""
        with self._turn:
            while self._later:
                run = self._worth_asking(self._later.popleft())
                if run.keys:
                    with self._alone(run, 0.0) as first:
                        if first:
                            self._fetched(run, BACKGROUND_S, background=True)
            self._delete_damaged()

    def _worth_asking(self, run: Run) -> Run:
        """The part of a run that may be asked for: up to a key that was deleted here."""
        bars = self._out.bars
        barred = next((i for i, key in enumerate(run.keys) if key in bars), None)
        keys = run.keys if barred is None else run.keys[:barred]
        return Run(keys if self._long_enough(len(keys), run) else (), run.parent, run.key_tokens)

    def _long_enough(self, chunks: int, run: Run) -> bool:
        return chunks * (run.key_tokens or CHUNK_TOKENS) >= self._out.config.tokens_min

    @contextmanager
    def _alone(self, run: Run, wait_s: float) -> Iterator[bool]:
        """One call at a time for a key. False: another one was under way, and has been waited for."""
        mine, own = threading.Event(), list[Key]()
        with self._lock:
            other = self._flights.get(run.keys[0])
            if other is None:
                own = [key for key in run.keys if self._flights.setdefault(key, mine) is mine]
        if other is not None:
            if wait_s > 0:
                other.wait(wait_s)
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                for key in own:
                    del self._flights[key]
            mine.set()

    def _looked(self, run: Run, timeout_s: float) -> list[Head]:
        """The leading heads, from memory as far as it goes."""
        out, now = self._out, self._out.clock.now()
        timeout_s = min(timeout_s, out.config.lookup_s)
        if self._absent.get(out.alias(run.keys[0]), 0.0) > now:
            return []
        try:
            out.be_fresh(timeout_s)
            aliases = [out.alias(key) for key in run.keys]
            heads, ended = self._remembered(aliases, now)
            left_s = timeout_s - (out.clock.now() - now)
            if ended or left_s <= 0:
                return heads
            looked = out.heads(aliases[len(heads) :], left_s)
        except SharedUnavailable as error:
            out.numbers.count(lookups=1, futile=1, lookup_s=out.clock.now() - now)
            out.numbers.failed(error.reason)
            self._not_there([out.alias(run.keys[0])])
            return []
        found = [place.head for place in looked]
        fresh = [head for head in found[: found.index(None) if None in found else len(found)] if head is not None]
        self._remember(aliases[len(heads) :], fresh)
        heads += fresh
        out.numbers.count(lookups=1, futile=not heads, lookup_s=out.clock.now() - now)
        return heads

    def _remembered(self, aliases: Sequence[Key], now: float) -> tuple[list[Head], bool]:
        """The leading heads that are remembered; True: what follows is known, too, and it is nothing."""
        heads: list[Head] = []
        with self._lock:
            for alias in aliases:
                if self._absent.get(alias, 0.0) > now:
                    return heads, True
                head, until = self._heads.get(alias, (None, 0.0))
                if head is None or until <= now or not self._out.readable(head):
                    return heads, False
                heads.append(head)
        return heads, True

    def _remember(self, aliases: Sequence[Key], heads: Sequence[Head]) -> None:
        until = self._out.clock.now() + HEAD_S
        with self._lock:
            for alias, head in zip(aliases, heads, strict=False):
                self._heads[alias] = head, until
            _trim(self._heads)
        self._not_there(aliases[len(heads) : len(heads) + 1])

    def _not_there(self, aliases: Sequence[Key]) -> None:
        until = self._out.clock.now() + ABSENT_S
        with self._lock:
            for alias in aliases:
                self._absent[alias] = until
                self._absent.move_to_end(alias)
                self._heads.pop(alias, None)
            _trim(self._absent)

    def _fetched(self, run: Run, timeout_s: float, *, background: bool) -> None:
        """Look, and fetch what is worth it."""
        out = self._out
        deadline = out.clock.now() + timeout_s
        with out.bars.flight():
            heads = self._looked(run, timeout_s)
            if not heads:
                return
            if not self._long_enough(len(heads), run) or self._slower_than_computing(heads, run):
                out.numbers.count(futile=1)
                return
            until = min(deadline, out.clock.now() + (BACKGROUND_S if background else out.config.fetch_s))
            taken, late = self._take(run, heads, until)
            if late and not background and taken < len(heads):
                self._finish_later(Run(run.keys[: len(heads)], run.parent, run.key_tokens).after(taken))

    def _take(self, run: Run, heads: Sequence[Head], until: float) -> tuple[int, bool]:
        """Fetch and install, a window at a time. Returns how many are held, and whether time ran out."""
        out, taken = self._out, 0
        while taken < len(heads):
            left_s = until - out.clock.now()
            if left_s <= 0:
                return taken, True
            began = out.clock.now()
            part = _window(heads[taken:])
            aliases = [out.alias(key) for key in run.keys[taken : taken + len(part)]]
            try:
                bodies = out.engine.get([name_of(a) for a in aliases], [head.nbytes for head in part], left_s)
            except SharedUnavailable as error:
                out.numbers.failed(error.reason)
                bodies = [None] * len(part)
            took_s = out.clock.now() - began
            arrived = self._checked(run.keys[taken:], aliases, part, bodies)
            self._measured(part[: len(arrived)], took_s)
            held = self._install(arrived, run.after(taken).parent) if arrived else 0
            nbytes = sum(head.nbytes for head in part[:held])
            out.numbers.count(hits=held, hit_nbytes=nbytes, fetch_s=took_s)
            taken += held
            if held < len(part):
                late = took_s >= 0.95 * left_s
                if not late:
                    self._not_there(aliases[held : held + 1])
                    self._did_not_come(aliases[held:], bodies[held:])
                return taken, late
        return taken, False

    def _checked(
        self, keys: Sequence[Key], aliases: Sequence[Key], heads: Sequence[Head], bodies: Sequence[bytearray | None]
    ) -> list[Arrived]:
        """The leading objects that arrived and are what they should be."""
        out = self._out
        found: list[Arrived] = []
        for key, alias, head, body in zip(keys, aliases, heads, bodies, strict=False):
            if body is None:
                break
            try:
                found.append(opened(out.names, alias, key, head, body, out.seals, clear=out.config.clear))
            except RecordCorrupt as error:
                out.numbers.count(corrupt=1)
                log.debug("shared object is not believed name=%s error=%s", name_of(alias), printable(error))
                if not isinstance(error, UnknownSeal):  # good for a host that has the key
                    out.did_not_come(alias)
                    self._damaged.append(alias)
                    self._wake()
                self._not_there([alias])
                break
        return found

    def _did_not_come(self, aliases: Sequence[Key], bodies: Sequence[bytearray | None]) -> None:
        """Objects whose heads were known did not come: who computes them looks for them, and publishes them again."""
        missing = [alias for alias, body in zip(aliases, bodies, strict=True) if body is None]
        if missing and missing[0] == aliases[0]:
            self._out.did_not_come(aliases[0])
        self._not_there(missing)
        for alias in missing:
            self._out.published.pop(alias, None)

    def _finish_later(self, run: Run) -> None:
        if len(self._later) < BACKGROUND_MAX:
            self._later.append(run)
            self._wake()

    def _delete_damaged(self) -> None:
        """Nobody would publish a chunk again whose head is right and whose body is not."""
        aliases = [self._damaged.popleft() for _ in range(len(self._damaged))]
        if aliases:
            try:
                self._out.engine.delete([name_of(alias) for alias in aliases], 1.0)
            except SharedUnavailable as error:
                self._out.numbers.failed(error.reason)

    def _measured(self, heads: Sequence[Head], took_s: float) -> None:
        if heads and took_s > 0:
            rate = sum(head.nbytes for head in heads) / took_s
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
            self._rated_at = self._out.clock.now()

    def _slower_than_computing(self, heads: Sequence[Head], run: Run) -> bool:
        out = self._out
        speed = out.config.prefill_tokens_per_s
        if not speed or not self._rate or out.clock.now() - self._rated_at > RATE_S:
            return False
        compute_s = len(heads) * (run.key_tokens or CHUNK_TOKENS) / speed
        return sum(head.nbytes for head in heads) / self._rate > compute_s


def _window(heads: Sequence[Head]) -> Sequence[Head]:
    """The leading objects that are fetched at once: at least one."""
    nbytes = 0
    for i, head in enumerate(heads):
        nbytes += head.nbytes
        if i and nbytes > WINDOW_NBYTES:
            return heads[:i]
    return heads


def _trim(remembered: OrderedDict[Key, Any]) -> None:
    while len(remembered) > REMEMBERED_MAX:
        remembered.popitem(last=False)
