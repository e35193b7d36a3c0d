"""The table of epochs: what a flush raises, so that every host misses what was published before it.

    table = head (96 bytes: magic, version, size, SHA-256 of the body | HMAC) | body, JSON: {"all": N, "TAG": N...}

One object for all hosts, read in the background each second, one round trip while nothing changes. Each number only
grows: hosts merge what they find with what they know by the larger one, and write back what the table has lost, so two
flushes at once both hold, and a table that a server lost comes back from any host. A table that is damaged says
nothing that can be believed: everything is flushed. Invariant: nothing is looked up or published under a table older
than STALE_S. Any thread.
"""

import hmac
import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256

from kvstore.clock import Clock
from kvstore.errors import RecordCorrupt
from kvstore.shared import HEAD_NBYTES, Engine, SharedUnavailable
from kvstore.shared.names import MAC_NBYTES, VERSION, Names

MAGIC = b"KVSE"
_HEAD = struct.Struct("<4sHHQ16x32s")
REFRESH_S = 1.0
STALE_S = 2.0
TTL_S = 365 * 86400.0
"""Every host reads the table each second, so no server that evicts by use lets go of it."""
TAGS_MAX = 1024
"""Namespaces with an epoch of their own. One more flush of a namespace flushes everything, and the table is empty."""
_BODY_MAX_NBYTES = 1 << 20
BODY_TRIES = 3
"""So often the body of a table may be missing though its head is there: then it is damaged."""
_ALL = "all"


class Epochs:
    """What this host knows of the table."""

    def __init__(self, engine: Engine, names: Names, clock: Clock) -> None:
        self._engine = engine
        self._names = names
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}
        self._digest = b""
        self._without_body = 0
        self.read_at: float | None = None

    @property
    def all(self) -> int:
        """The epoch of the whole store."""
        return self._known.get(_ALL, 0)

    def of(self, tag: bytes) -> int:
        """The epoch of a namespace."""
        return self._known.get(tag.hex(), 0)

    @property
    def fresh(self) -> bool:
        """Whether the table was read lately enough to be relied on."""
        return self.read_at is not None and self._clock.now() - self.read_at <= STALE_S

    @property
    def due(self) -> bool:
        """Whether it is time to read it again."""
        return self.read_at is None or self._clock.now() - self.read_at >= REFRESH_S

    def refresh(self, timeout_s: float, *, unless_fresh: bool = False) -> None:
        """Read the table, and repair it where this host knows more. Raises SharedUnavailable."""
        with self._alone(timeout_s):
            if not (unless_fresh and self.fresh):
                self._refresh(timeout_s)

    @contextmanager
    def _alone(self, timeout_s: float) -> Iterator[None]:
        """One at a time: who waits for another's answer waits no longer than for one of its own."""
        if not self._lock.acquire(timeout=timeout_s):
            raise SharedUnavailable("epochs", f"the table of epochs was not read within {timeout_s} s")
        try:
            yield
        finally:
            self._lock.release()

    def raised(self, tag: bytes | None, timeout_s: float) -> None:
        """Flush a namespace, or everything (None). Raises SharedUnavailable: it may hold all the same."""
        with self._alone(timeout_s):
            self._refresh(timeout_s)
            # Not only one more: a number that a lost table had used before would bring its objects back.
            number = max(self.all, *self._known.values(), int(self._clock.now() * 1000), 0) + 1
            if tag is None or (tag.hex() not in self._known and len(self._known) > TAGS_MAX):
                self._known = {_ALL: number}
            else:
                self._known = {**self._known, tag.hex(): number}
            self._write(timeout_s)

    def _refresh(self, timeout_s: float) -> None:
        now = self._clock.now()
        head = self._engine.heads([self._names.epochs], timeout_s)[0]
        if head is None:
            # Not there, or a replica that has not got it yet: what is known holds, and is written again.
            if self._known:
                self._write(timeout_s)
        elif bytes(head) != self._digest:
            found = self._read(head, timeout_s)
            damaged = found is None
            if found is None:
                found = {_ALL: max(self.all, int(now * 1000)) + 1}
            self._merge(found)
            if damaged or self._known != found:
                self._write(timeout_s)
            else:
                self._digest = bytes(head)
        self.read_at = now

    def _merge(self, found: Mapping[str, int]) -> None:
        merged = {tag: max(number, self._known.get(tag, 0)) for tag, number in {**self._known, **found}.items()}
        # An epoch of a namespace from before everything was flushed says nothing any more.
        least = merged.get(_ALL, 0)
        self._known = {tag: number for tag, number in merged.items() if tag == _ALL or number > least}

    def _read(self, head: bytes, timeout_s: float) -> dict[str, int] | None:
        """The table in the store; None: it is damaged. Raises SharedUnavailable where its body did not come."""
        try:
            nbytes, digest = self._parsed(head)
        except RecordCorrupt:
            return None
        body = self._engine.get([self._names.epochs], [HEAD_NBYTES + nbytes], timeout_s)[0]
        if body is None:
            self._without_body += 1
            if self._without_body >= BODY_TRIES:
                return None
            raise SharedUnavailable("epochs", "the table of epochs did not arrive")
        self._without_body = 0
        if bytes(body[:HEAD_NBYTES]) != bytes(head):
            raise SharedUnavailable("epochs", "the table of epochs changed while it was read")
        text = bytes(body[HEAD_NBYTES:])
        return {str(tag): int(number) for tag, number in json.loads(text).items()} if _is(digest, text) else None

    def _parsed(self, head: bytes) -> tuple[int, bytes]:
        plain, mac = bytes(head[:-MAC_NBYTES]), bytes(head[-MAC_NBYTES:])
        if len(head) != HEAD_NBYTES or not hmac.compare_digest(self._names.epochs_mac(plain), mac):
            raise RecordCorrupt("the table of epochs was not written by a host with the secret")
        magic, version, _, nbytes, digest = _HEAD.unpack(plain)
        if magic != MAGIC or version != VERSION or nbytes > _BODY_MAX_NBYTES:
            raise RecordCorrupt(f"a table of epochs of version {version} with {nbytes} bytes")
        return nbytes, digest

    def _write(self, timeout_s: float) -> None:
        text = json.dumps(self._known, sort_keys=True, separators=(",", ":")).encode()
        plain = _HEAD.pack(MAGIC, VERSION, 0, len(text), sha256(text).digest())
        head = plain + self._names.epochs_mac(plain)
        if not self._engine.put([(self._names.epochs, [head + text])], TTL_S, timeout_s, replace=True)[0]:
            raise SharedUnavailable("epochs", "the table of epochs was not stored")
        self._digest = head


def _is(digest: bytes, text: bytes) -> bool:
    return hmac.compare_digest(digest, sha256(text).digest())
