"""Written at put: chunks of chains are offered when they are stored, and published behind the caller's back.

    offer       keys into a queue bounded in bytes: a put pays for an append
    run_once    deletions first; then what waits: which are there already (one round trip, which also claims the rest),
                then the objects of those claimed, a chunk never before the one it continues

The queue holds keys, not values: what is published is read from the tiers when its turn comes. When the queue is full
the oldest are dropped; while the store does not answer they wait. Deletions and publications come from one thread, so
none of them overtakes another.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore.entries.entry import Entry
from kvstore.errors import KvstoreError
from kvstore.keys import Key
from kvstore.shared import Buffer, SharedUnavailable
from kvstore.shared.names import name_of
from kvstore.shared.objects import TTL_MAX_S, Facts, made, nbytes_of
from kvstore.shared.outside import Outside

ASK_S = 1.0
SEND_S = 10.0
DELETE_S = 2.0
"""Nobody waits for these; a store that takes longer is asked again."""
BATCH_KEYS = 256
SEND_NBYTES = 64 << 20
DELETE_KEYS = 512
BACKOFF_S = 1.0
AGAIN_S = 2.0
"""After this a chunk that another host has claimed is looked for again."""
TRIES_MAX = 8
"""So it outlasts the claim of a host that died."""
UNUSED_MAX = 65_536
"""Keys that the admission rule did not let in, and that a hit may: 6 MiB."""
UNUSED_LOOKED_AT = 2048
CHAIN_MAX = 4096
"""Chunks before a chunk that are published with it."""


class Candidate(NamedTuple):
    """A chunk that may be published. nbytes: about the size of its object. deserves: the admission rule lets it in."""

    key: Key
    parent: Key | None
    tenant: str
    namespace: str
    ttl_s: float
    exact: bool
    nbytes: int
    deserves: bool


class Held(Protocol):
    """What the publisher asks of the store that it publishes from."""

    def candidate(self, key: Key, *, continued: bool = False) -> Candidate | str:
        """What may be published, or a word for why it may not. continued: what continues it is published, too."""
        ...

    def ancestors(self, key: Key, at_most: int) -> list[Key]:
        """The chunks before a chunk, nearest first."""
        ...

    def form(self, key: Key) -> Entry | None:
        """The entry as it looks below hot: encoded once, and kept so. None: it is gone."""
        ...

    def wrote(self, nbytes: int) -> None:
        """Count bytes against the day's budget."""
        ...


@dataclass(slots=True)
class _Offer:
    keys: Sequence[Key]
    nbytes: int
    at: float
    not_before: float = 0.0
    tries: int = 0


class Publisher:
    """The queue and its work."""

    def __init__(self, outside: Outside, held: Held) -> None:
        self._out = outside
        self._held = held
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._queue: deque[_Offer] = deque()
        self._nbytes = 0
        self._retry_at = 0.0
        self._unused: OrderedDict[Key, None] = OrderedDict()
        self.awake = threading.Event()
        """Set when something cannot wait: a deletion, or half of the queue's room is taken."""
        self.offers = 0
        """Since start: whether there are new ones."""

    @property
    def queue_nbytes(self) -> int:
        """About the bytes of the objects that wait."""
        return self._nbytes

    def waits(self, key: Key) -> bool:
        """Whether a key is in the queue. Walks it: for people."""
        with self._lock:
            return any(key in offer.keys for offer in self._queue)

    def offer(self, keys: Sequence[Key], nbytes: int) -> None:
        """Publish these some time soon: a chain, root first. nbytes: about the size of their objects. Wakes nobody."""
        half = self._out.config.buffer_nbytes // 2
        before = self._nbytes
        self._append(_Offer(keys, nbytes, self._out.clock.now()))
        self.offers += 1
        if before <= half < before + nbytes:
            self.awake.set()

    def _append(self, offer: _Offer) -> None:
        dropped = 0
        with self._lock:
            self._queue.append(offer)
            self._nbytes += offer.nbytes
            while self._nbytes > self._out.config.buffer_nbytes and self._queue:
                oldest = self._queue.popleft()
                self._nbytes -= oldest.nbytes
                dropped += len(oldest.keys)
        if dropped:
            self._out.numbers.drop("full", dropped)

    def run_once(self) -> None:
        """Delete and publish what waits, until nothing does or the store does not answer. One thread at a time."""
        with self._turn:
            if self._out.clock.now() < self._retry_at:
                return
            try:
                self._delete()
                self._offer_used()
                while (offers := self._taken()) is not None:
                    self._publish_or_keep(offers)
            except SharedUnavailable as error:
                self._out.numbers.failed(error.reason)
                self._retry_at = self._out.clock.now() + BACKOFF_S

    def _delete(self) -> None:
        out = self._out
        if not (out.bars.everything or len(out.bars)):
            return
        out.be_fresh(ASK_S)
        if out.bars.everything:
            out.epochs.raised(None, DELETE_S)
            out.bars.flushed()
        while pairs := out.bars.waiting(DELETE_KEYS):
            aliases = [out.alias(key) for key, _ in pairs]
            gone = out.engine.delete([name_of(alias) for alias in aliases], DELETE_S)
            for alias in aliases:
                out.published.pop(alias, None)
            out.bars.done([pair for pair, acknowledged in zip(pairs, gone, strict=True) if acknowledged])
            if not all(gone):
                raise SharedUnavailable("delete", f"{gone.count(False)} of {len(gone)} deletions not acknowledged")

    def _offer_used(self) -> None:
        """Offer what the admission rule kept out and what has been hit since."""
        for key in list(self._unused)[:UNUSED_LOOKED_AT]:
            found = self._held.candidate(key)
            if isinstance(found, Candidate) and not found.deserves:
                self._unused.move_to_end(key)
                continue
            del self._unused[key]
            if isinstance(found, Candidate):
                self._append(_Offer([key], found.nbytes, self._out.clock.now()))

    def _taken(self) -> list[_Offer] | None:
        """Offers whose time has come, of one batch; None: there are none."""
        now = self._out.clock.now()
        taken: list[_Offer] = []
        delayed: list[_Offer] = []
        keys = 0
        with self._lock:
            while self._queue and keys < BATCH_KEYS:
                offer = self._queue.popleft()
                if offer.not_before > now:
                    delayed.append(offer)
                    continue
                taken.append(offer)
                keys += len(offer.keys)
                self._nbytes -= offer.nbytes
            self._queue.extend(delayed)
        return taken or None

    def _publish_or_keep(self, offers: list[_Offer]) -> None:
        try:
            self._publish(offers)
        except SharedUnavailable:
            for offer in offers:
                self._append(offer)
            raise

    def _publish(self, offers: list[_Offer]) -> None:
        self._out.be_fresh(ASK_S)
        since = {key: offer for offer in reversed(offers) for key in offer.keys}
        chunks = self._chosen(list(since))
        if not chunks:
            return
        aliases = [self._out.alias(chunk.key) for chunk in chunks]
        looked = self._out.heads_or_claims(aliases, ASK_S)
        sent: list[tuple[Candidate, Key, bool]] = []
        waits: dict[Key, bool] = {}  # for a server (True), or for the host that claimed it
        for chunk, alias, found in zip(chunks, aliases, looked, strict=True):
            if self._out.worth_keeping(alias, found):
                self._is_there(chunk, alias)
                self._out.numbers.count(duplicate_uploads=1)
            elif (found.there or found.claimed) and chunk.parent not in waits:
                sent.append((chunk, alias, found.there))
            else:
                self._out.numbers.count(duplicate_uploads=found.answered and not (found.there or found.claimed))
                waits[chunk.key] = not found.answered or (chunk.parent is not None and waits.get(chunk.parent, False))
        later = [key for key, for_server in waits.items() if not for_server] + self._send(sent, since)
        self._try_again(later, since)
        self._try_again([key for key, for_server in waits.items() if for_server], since, counts=False)

    def _chosen(self, keys: Sequence[Key]) -> list[Candidate]:
        """What is published of the keys offered, with what they continue: parents before children."""
        chosen: dict[Key, Candidate] = {}
        refused: dict[Key, str] = {}
        for key in reversed(keys):  # the deepest first: a short prefix may be the beginning of a longer one
            if key in chosen:
                continue
            path = [key]
            for before in self._held.ancestors(key, CHAIN_MAX):
                if before in chosen:
                    break
                path.append(before)
            why = self._choose(path, chosen)
            if why:
                refused[key] = why
        for key, why in refused.items():
            if key not in chosen:
                self._out.numbers.drop(why)
                if why == "unused":
                    self._keep_unused(key)
        return [chunk for chunk in chosen.values() if not self._is_known(chunk)]

    def _choose(self, path: Sequence[Key], chosen: dict[Key, Candidate]) -> str:
        """Choose a chunk and those before it, nearest first, or as many as may leave, and say why not all of them."""
        last = self._held.candidate(path[0])
        if isinstance(last, str):
            return last
        for at in reversed(path):
            found = last if at == path[0] else self._held.candidate(at, continued=True)
            if at in self._out.bars:
                return "deleted"
            if isinstance(found, str):
                return found if at == path[0] else "parent"
            if not found.deserves:
                return "unused"
            chosen[at] = found
        return ""

    def _keep_unused(self, key: Key) -> None:
        self._unused[key] = None
        if len(self._unused) > UNUSED_MAX:
            self._unused.popitem(last=False)

    def _send(self, chunks: Sequence[tuple[Candidate, Key, bool]], since: dict[Key, _Offer]) -> list[Key]:
        """Upload, root first, some bytes at a time. Returns the keys to try again."""
        later: list[Key] = []
        lost: set[Key] = set()
        at_most = min(SEND_NBYTES, self._out.config.buffer_nbytes // 2)
        group: list[tuple[Candidate, Key, bool, list[Buffer]]] = []
        nbytes = 0
        for chunk, alias, replace in chunks:
            buffers = None if chunk.parent in lost or chunk.key in self._out.bars else self._made(chunk, alias)
            if buffers is None:
                lost.add(chunk.key)
                self._out.numbers.drop("gone")
                continue
            group.append((chunk, alias, replace, buffers))
            nbytes += nbytes_of(buffers)
            if nbytes >= at_most:
                later += self._put(group, since)
                group, nbytes = [], 0
        return later + self._put(group, since)

    def _made(self, chunk: Candidate, alias: Key) -> list[Buffer] | None:
        """The object of a chunk; None: it is gone, or must not leave this host."""
        out = self._out
        entry = self._held.form(chunk.key)
        if entry is None:
            return None
        seal = out.seals.of_owner(chunk.tenant, chunk.namespace)
        if seal is None and not out.config.clear:
            return None  # no key file covers its owner: it may not lie there in clear
        epoch = out.epochs.of(out.names.tag(chunk.namespace))
        facts = Facts(chunk.namespace, min(chunk.ttl_s, TTL_MAX_S), chunk.exact, out.clock.now(), epoch)
        try:
            return made(out.names, alias, entry, facts, seal)
        except KvstoreError:  # too many names for a record's header
            return None

    def _put(self, group: Sequence[tuple[Candidate, Key, bool, list[Buffer]]], since: dict[Key, _Offer]) -> list[Key]:
        later: list[Key] = []
        for replace in (False, True):
            part = [(chunk, alias, buffers) for chunk, alias, old, buffers in group if old is replace]
            if not part:
                continue
            ttl_s = min(self._out.config.ttl_s, max(chunk.ttl_s for chunk, _, _ in part))
            objects = [(name_of(alias), buffers) for _, alias, buffers in part]
            stored = self._out.engine.put(objects, ttl_s, SEND_S, replace=replace)
            for (chunk, alias, buffers), done in zip(part, stored, strict=True):
                if not done:
                    later.append(chunk.key)
                    continue
                self._is_there(chunk, alias)
                nbytes = nbytes_of(buffers)
                self._held.wrote(nbytes)
                self._out.numbers.count(published=1, publish_nbytes=nbytes)
                if chunk.key in since:
                    self._out.numbers.lag_s = self._out.clock.now() - since[chunk.key].at
        return later

    def _is_there(self, chunk: Candidate, alias: Key) -> None:
        self._out.is_there(alias, self._out.epochs.of(self._out.names.tag(chunk.namespace)))

    def _is_known(self, chunk: Candidate) -> bool:
        alias = self._out.alias(chunk.key)
        known = None if alias in self._out.incomplete else self._out.published.get(alias)
        return known is not None and known >= self._out.epochs.of(self._out.names.tag(chunk.namespace))

    def _try_again(self, keys: Sequence[Key], since: dict[Key, _Offer], *, counts: bool = True) -> None:
        """Look again in a while. counts: not for ever: another host has claimed them, or they were not stored.

        What a server that does not answer keeps waiting, waits as long as it has room in the queue.
        """
        now = self._out.clock.now()
        by_offer: dict[int, tuple[_Offer, list[Key]]] = {}
        for key in keys:
            offer = since.get(key)
            if offer is not None:
                by_offer.setdefault(id(offer), (offer, []))[1].append(key)
        for offer, left in by_offer.values():
            tries = offer.tries + counts
            if tries >= TRIES_MAX:
                self._out.numbers.drop("refused", len(left))
                continue
            nbytes = offer.nbytes * len(left) // len(offer.keys)
            self._append(_Offer(left, nbytes, offer.at, now + AGAIN_S, tries))
