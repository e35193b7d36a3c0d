"""Between the store and what other hosts have put (`shared`): what is asked for, installed, offered and deleted.

    get, match of a chain   where it ends here -> the fetcher -> `WritePath.take_from_outside`, below hot
    put of a chain          its keys -> the publisher, which asks back for each: may it leave, and in which form
    delete                  barred before it leaves, deleted outside when the store answers

What only the shared store has gets no Meta. Any thread, without the residency lock.
"""

from collections.abc import Sequence
from itertools import islice
from math import inf
from pathlib import Path

from kvstore.config import StoreConfig
from kvstore.entries.entry import Entry
from kvstore.errors import ConfigError
from kvstore.hit import Held
from kvstore.keys import CHUNK_TOKENS, Key
from kvstore.lookup import Lookup
from kvstore.metadata.meta import Meta
from kvstore.metadata.slices import STEPS, pause, slices
from kvstore.residency.mover import Mover
from kvstore.residency.state import Residency
from kvstore.residency.write_path import WritePath, tokens_of
from kvstore.shared import Engine, SharedUnavailable
from kvstore.shared.fetcher import Run
from kvstore.shared.objects import Arrived, Head
from kvstore.shared.publisher import Candidate
from kvstore.shared.source import Source, opened_engine
from kvstore.tiers.admission import Admission
from kvstore.tiers.balance import DENSITY_MIN, packed_nbytes

ROUNDS_MAX = 3
"""How often a call waits for another one that is asking for the same, before it goes on with what there is."""
WHOLE_MAX = 4096
"""Namespaces whose size of a whole chunk is known."""


class Sharing:
    """One store's use of the shared one."""

    def __init__(
        self, residency: Residency, mover: Mover, write_path: WritePath, config: StoreConfig, engine: Engine | None
    ) -> None:
        """engine: instead of the one of the url. Raises ConfigError."""
        self._r = r = residency
        self._mover = mover
        self._write_path = write_path
        self._config = config.shared
        self._ttl_max_s = config.ttl_max_s
        self._whole_nbytes: dict[tuple[str, str], int] = {}
        self.admission = Admission(config.shared.admission, config.shared.write_nbytes_per_day, r.clock)
        self._tenants = {
            tenant: Admission(config.shared.admission, quota.shared_nbytes_per_day, r.clock)
            for tenant, quota in config.quotas.items()
            if quota.shared_nbytes_per_day is not None
        }
        path = config.cold.path
        self.source = Source(
            config.shared, engine=engine or opened_engine(config.shared, r.clock), clock=r.clock,
            entry_max_nbytes=config.entry_max_nbytes, directory=None if path is None else Path(path),
            held=self, install=self._installed,
        )  # fmt: skip
        r.deleted = self._deleted
        write_path.offer = self._offered

    # What the store's verbs ask.

    def bring(
        self, keys: Sequence[Key], lookup: Lookup | None = None, timeout_s: float = inf, *, leading: bool = True
    ) -> None:
        """Hold what other hosts have of a chain that ends here. No round trip where it does not end.

        leading: False: keys in any order, of which those are brought that a match has found.
        """
        if not leading:
            self._bring_promised(keys, timeout_s)
            return
        clock = self._r.clock
        until = clock.now() + min(timeout_s, self._config.lookup_s + self._config.fetch_s)
        for _ in range(ROUNDS_MAX):
            run = self._missing(keys, lookup)
            left_s = until - clock.now()
            if run is None or left_s <= 0 or not self.source.fetcher.bring(run, left_s):
                return

    def _bring_promised(self, keys: Sequence[Key], timeout_s: float) -> None:
        """Hold those of these keys that a match has found outside: an engine gets them one by one."""
        fetcher = self.source.fetcher
        for run in fetcher.promised(keys):
            rest = self._missing(run.keys, None)
            if rest is not None:
                before = run.parent if rest.parent is None else rest.parent
                fetcher.bring(Run(rest.keys, before, run.key_tokens), timeout_s)

    def ends_here(self, keys: Sequence[Key]) -> bool:
        """Whether a chain ends on this host, so that `bring` would ask for the rest. A look at the index alone."""
        return self._r.first_missing(keys) < len(keys)

    def more(self, keys: Sequence[Key], held: int, lookup: Lookup) -> list[Held]:
        """What other hosts have behind the first `held` keys of a chain, for a match. At most one round trip."""
        run = Run(keys[held:], keys[held - 1] if held else None, lookup.key_tokens)
        return [Held("shared", head.value_nbytes) for head in self.source.fetcher.look(run)]

    def bar(self, keys: Sequence[Key]) -> None:
        """These are about to be deleted."""
        for part in slices(keys):
            self.source.bars.add(part)

    def deleted(self, keys: Sequence[Key], *, some_stay: bool) -> None:
        """These have left, with what continued them; on disk when this returns. some_stay: those still held were not
        deleted.
        """
        bars = self.source.bars
        if some_stay:
            bars.lift([key for key in keys if key in self._r.index])
        bars.keep()
        self.source.publisher.awake.set()

    def explain(self, keys: Sequence[Key]) -> list[str]:
        """For each key whether the shared store has it, and for how long, or why not. One round trip."""
        out = self.source.outside
        try:
            out.be_fresh(out.config.lookup_s)
            looked = out.heads([out.alias(key) for key in keys], out.config.lookup_s)
        except SharedUnavailable as error:
            return [f"unknown: {error}"] * len(keys)
        return [
            self._why_not(key) if place.head is None else _shown(place.head.nbytes, self._left_s(place.head))
            for key, place in zip(keys, looked, strict=True)
        ]

    def _left_s(self, head: Head) -> float:
        """By the writer's clock, which may be another one: to show."""
        ttl_s = min(head.ttl_s, self._config.ttl_s)
        return max(0.0, min(ttl_s, head.published_at + ttl_s - self._r.clock.now()))

    def _why_not(self, key: Key) -> str:
        waits = self.source.waits_for(key)
        if waits:
            return f"no: {waits}"
        with self._r.lock:
            continued = key in self._r.index and self._r.index[key].first_child is not None
        found = self.candidate(key, continued=continued)
        if isinstance(found, str):
            return f"no: {_REASONS.get(found, found)}"
        if not found.deserves:
            return f'no: it was not used enough for store.shared.admission = "{self._config.admission}" or the budget'
        return "no: it is not there"

    # What the fetcher and the publisher ask.

    def _installed(self, arrived: Sequence[Arrived], parent: Key | None) -> int:
        now, bars = self._r.clock.now(), self.source.bars
        keys = [found.entry.key for found in arrived]
        # Its life here begins with its arrival: the writer's clock is another one.
        metas = (
            (found.entry, Meta(now, now + ttl, ttl, found.entry.value_nbytes, exact=found.exact))
            for found in reversed(arrived)
            for ttl in (min(found.ttl_s, self._ttl_max_s),)
        )
        namespace = arrived[0].namespace
        return self._write_path.take_from_outside(keys, metas, parent, namespace, lambda key: key not in bars)

    def candidate(self, key: Key, *, continued: bool = False) -> Candidate | str:
        """See `publisher.Held`."""
        r = self._r
        with r.lock:
            meta = r.live(key)
            if meta is None:
                return "gone"
            why = self._refusal(meta) or self._partial(meta) or ("" if continued else self._short(key))
            if why:
                return why
            owner = meta.owner
            rules = (self.admission, self._tenants.get(owner.tenant, self.admission))
            deserves = all(rule.deserves(key, meta) for rule in rules)
            nbytes = meta.value_nbytes if meta.exact else self._packed_nbytes(key, meta)
            return Candidate(key, meta.parent, owner.tenant, owner.namespace, meta.ttl_s, meta.exact, nbytes, deserves)

    def ancestors(self, key: Key, at_most: int) -> list[Key]:
        """See `publisher.Held`."""
        found: list[Key] = []
        at = key
        while len(found) < at_most:
            with self._r.lock:
                part = list(islice(self._r.chains.ancestors(at), min(STEPS, at_most - len(found))))
            found += part
            if len(part) < STEPS:
                break
            at = part[-1]
            pause()
        return found

    def form(self, key: Key) -> Entry | None:
        """See `publisher.Held`."""
        entry = self._mover.copy_below(key)
        if entry is not None and self._tenants:
            with self._r.lock:
                rule = self._tenants.get(self._r.owner_of(key).tenant)
                if rule is not None:
                    rule.wrote(entry.nbytes)
        return entry

    def wrote(self, nbytes: int) -> None:
        """See `publisher.Held`."""
        with self._r.lock:
            self.admission.wrote(nbytes)

    def _refusal(self, meta: Meta) -> str:
        if meta.parent is None and not meta.root:
            return "no_chain"
        if meta.exact and not self._config.exact:
            return "exact"
        if meta.soon:
            return "low_priority"
        # Its deadline is a moment of this host's clock, which no other host can tell.
        return "" if meta.sliding else "fixed_deadline"

    def _partial(self, meta: Meta) -> str:
        """Whole chunks of a namespace are alike: one that is smaller ended its prompt. No other prompt has it."""
        owner = meta.owner.tenant, meta.owner.namespace
        one_size = "@" in meta.owner.namespace  # the prefix layer's name of one identity (`prefix.namespace_name`)
        above = self._r.index.get(meta.parent) if meta.parent is not None else None
        known = self._whole_nbytes.get(owner, 0) if one_size else 0
        whole = max(known, above.value_nbytes if above is not None else 0)
        if meta.value_nbytes < whole:
            return "partial"
        if one_size and above is not None and (len(self._whole_nbytes) < WHOLE_MAX or owner in self._whole_nbytes):
            self._whole_nbytes[owner] = whole
        return ""

    def _short(self, key: Key) -> str:
        """Nobody asks for a prefix of fewer tokens; with what continues it later, its chunks are published, too."""
        if not self._config.tokens_min:
            return ""
        place = self._r.lookup(key)
        tokens = CHUNK_TOKENS if place is None or place[1] is None else tokens_of(place[1])
        due = -(-self._config.tokens_min // tokens) - 1
        return "" if sum(1 for _ in islice(self._r.chains.ancestors(key), due)) >= due else "short"

    def _offered(self, keys: Sequence[Key], nbytes: int) -> None:
        self.source.publisher.offer(keys, int(nbytes / DENSITY_MIN))

    def _packed_nbytes(self, key: Key, meta: Meta) -> int:
        place = self._r.lookup(key)
        entry = None if place is None else place[1]
        return int(meta.value_nbytes / DENSITY_MIN) if entry is None else packed_nbytes(entry.tensors)

    def _deleted(self, key: Key) -> None:
        self.source.bars.add((key,))

    def _missing(self, keys: Sequence[Key], lookup: Lookup | None) -> Run | None:
        at = self._r.first_missing(keys)
        if at == len(keys):
            return None
        return Run(keys[at:], keys[at - 1] if at else None, 0 if lookup is None else lookup.key_tokens)


_REASONS = {
    "gone": "it is neither there nor here", "no_chain": "it is no chunk of a chain",
    "exact": "it stays exact, and store.shared.exact is false", "low_priority": "it was put with low priority",
    "fixed_deadline": "its deadline does not slide", "partial": "it is a partial chunk",
    "short": "its prefix has fewer tokens than store.shared.tokens_min",
}  # fmt: skip


def _shown(nbytes: int, left_s: float) -> str:
    return f"yes, {nbytes / (1 << 20):.1f} MiB, {left_s:.0f} s left"


def opened(
    residency: Residency, mover: Mover, write_path: WritePath, config: StoreConfig, engine: Engine | None
) -> Sharing | None:
    """The sharing of a configuration; None: nothing is shared. Raises ConfigError."""
    if not config.shared.url:
        if engine is not None:
            raise ConfigError("an engine for the shared store needs store.shared.url")
        return None
    try:
        return Sharing(residency, mover, write_path, config, engine)
    except BaseException:
        if residency.cold is not None:
            residency.cold.close()  # its directory is locked
        raise
