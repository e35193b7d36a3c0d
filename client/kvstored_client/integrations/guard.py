"""Guard: a cache for an inference engine: its calls never raise, and never block past a deadline.

Every call runs on a thread of the guard, which waits for it until its deadline; a later result is dropped. So this
holds for any cache, a client of a slow daemon or an embedded store on a slow disk, and depends on no other timeout.
After three failures in a row the guard makes no calls for a while (`breaker`). A call that the cache refuses (a key, a
tensor or an option that no cache would accept) is the caller's error: a miss too, but not a failure of the cache. Calls
with any number of keys are made in pieces (`kvstore.pieces`). Puts are made later, on one writer thread, from tensors
that do not change any more; if too many bytes wait, a put is dropped and counted.

Thread-safe. Fork-safe: a child starts with threads of its own and without the parent's waiting puts.
"""

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from kvstore.errors import ConfigError, InvalidEntry, PermissionDenied
from kvstore.hit import Held, Hit, Match
from kvstore.lookup import REPORT_MAX_S, Lookup
from kvstore.pieces import fill, given, in_pieces
from kvstored_client.breaker import Breaker
from kvstored_client.client import Client
from kvstored_client.device import Transfers

logger = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 0.05
"""A lookup that takes longer costs more than the scheduling slot it delays."""
FETCH_TIMEOUT_S = 2.0
"""Bytes are worth more patience: 2 s move 4 GB on one host, and recomputing as much takes tens of seconds."""
WAITING_MAX_NBYTES = 1 << 30
THREADS_MAX = 4
"""As many calls may be overdue at once; with more, the next call is a miss at once."""

_CALLERS = (InvalidEntry, ConfigError, PermissionDenied)
"""The caller's errors: they say nothing about the next call."""

T = TypeVar("T")


class Guard:
    """A cache behind deadlines: the verbs of `prefix.Cache`, each a miss where the cache fails or is late.

    cache: a Client or a Store; an address; or None for the daemon at the default address.
    failures: calls answered as a miss because the cache raised or was late. refused: calls that ended in a caller's
    error. dropped: puts given up.
    """

    def __init__(
        self,
        cache: Any = None,
        *,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        fetch_timeout_s: float = FETCH_TIMEOUT_S,
        waiting_max_nbytes: int = WAITING_MAX_NBYTES,
        prefill_tokens_per_s: float = 0.0,
    ) -> None:
        if not 0 <= prefill_tokens_per_s < math.inf:
            raise ValueError(f"prefill_tokens_per_s must be 0 or more, got {prefill_tokens_per_s!r}")
        self._prefill_tokens_per_s = prefill_tokens_per_s
        for name, value in (("lookup_timeout_s", lookup_timeout_s), ("fetch_timeout_s", fetch_timeout_s)):
            if not value > 0:
                raise ValueError(f"{name} must be over 0, got {value!r}")
        self.cache = Client(cache, timeout_s=fetch_timeout_s) if cache is None or isinstance(cache, str) else cache
        self.lookup_timeout_s = lookup_timeout_s
        self.fetch_timeout_s = fetch_timeout_s
        self.waiting_max_nbytes = waiting_max_nbytes
        self.failures = 0
        self.refused = 0
        self.dropped = 0
        self._pid = 0
        self._start_afresh()
        # The first call of a client makes the connection; a lookup's deadline is too short to share with that.
        # `locate`, which is no lookup: a miss that nobody asked for would be in every worker's hit ratio.
        self._callers.run(_Call(lambda: self.cache.locate([b"kvstored"])))
        _alive.add(self)

    def __repr__(self) -> str:
        told = f"failures={self.failures}, refused={self.refused}, dropped={self.dropped}"
        return f"Guard({self._cache!r}, {told})"

    @property
    def cache(self) -> Any:
        """The cache behind the guard, with calls of any number of keys."""
        return self._cache

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._cache = in_pieces(cache)

    def _start_afresh(self) -> None:
        self._pid = os.getpid()
        self._breaker = Breaker()
        self._callers = _Threads(THREADS_MAX)
        self._writer = _Writer(self.waiting_max_nbytes)

    def call(
        self, work: Callable[[], T], timeout_s: float, otherwise: T, give_back: Callable[[T], object] | None = None
    ) -> T:
        """The result of `work`, or `otherwise` if it raises or takes longer than `timeout_s`.

        give_back: takes a result that came later, on the thread of the work.
        """
        if self._pid != os.getpid():
            self._start_afresh()
        if not self._breaker.allow(timeout_s):
            return otherwise
        call = _Call(work, give_back)
        if not self._callers.run(call):
            return self._failed(otherwise, "too many calls are overdue")
        if not call.done.wait(timeout_s) and call.given_up():
            return self._failed(otherwise, f"no answer within {timeout_s} s")
        if call.error is not None:
            return self._ended(call.error, otherwise)
        self._breaker.succeeded()
        result: T = call.result
        return result

    def later(self, work: Callable[[], object], nbytes: int) -> bool:
        """Do `work` (a put) on the writer's thread. False: too much is waiting, it was dropped.

        nbytes: how much memory the work holds until then.
        """
        if self._pid != os.getpid():
            self._start_afresh()
        if self._breaker.is_open and not self._breaker.allow(self.fetch_timeout_s):
            self.dropped += 1
            return False
        taken = self._writer.add(lambda: self._write(work), nbytes)
        self.dropped += not taken
        return taken

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the puts made so far are done. False: they are not, after `timeout_s`."""
        return self._pid != os.getpid() or self._writer.wait(timeout_s)

    def copies(self, tensors: Sequence[Any]) -> list[Any]:
        """Copies of torch tensors to put, which a late put may go on reading while the originals are used anew.

        Where the cache has memory shared with a daemon they lie there: the put's only copy on this side.
        """
        make = getattr(self.cache, "empty", None)
        if make is None:
            return [x.clone() for x in tensors]
        specs = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
        room: list[Any] | None = self.call(lambda: [make(*spec) for spec in specs], self.fetch_timeout_s, None)
        if room is None or any(type(to) is not type(x) for to, x in zip(room, tensors, strict=True)):
            return [x.clone() for x in tensors]
        return [to.copy_(x) for to, x in zip(room, tensors, strict=True)]

    def put_many(
        self,
        entries: Sequence[tuple[bytes, Mapping[str, Any]]],
        **how: Any,
    ) -> int:
        """Put entries, root first. Returns how many were stored, as far as that is known in time."""
        return self.call(lambda: int(self.cache.put_many(entries, **how)), self.fetch_timeout_s, 0)

    def get(self, key: bytes, *, lookup: Lookup | None = None) -> Hit | None:
        """The value under a key; None on a miss."""
        return self.get_many([key], lookup=lookup)[0]

    def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> list[Hit | None]:
        """Values in the order of keys. leading: a chain, up to the first miss. lookup: how it is counted."""
        missing: list[Hit | None] = [] if leading else [None] * len(keys)
        found = self.call(
            lambda: list(self.cache.get_many(keys, leading=leading, **given(lookup))), self.fetch_timeout_s, missing
        )
        return found if leading or len(found) == len(keys) else missing

    @contextmanager
    def lease_many(
        self,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        lookup: Lookup | None = None,
        **how: Any,
    ) -> Iterator[list[Hit | None]]:
        """As get_many, without copies. The lease begins within the deadline, and ends in the caller's thread.

        What is read from it lies in memory by then, so reading waits for nobody. Raises, when the block ends, as
        `Client.lease` does: RecordCorrupt where a block was used again while it was read, and LeaseKept.
        """
        missing: list[Hit | None] = [] if leading else [None] * len(keys)

        def begin() -> tuple[ExitStack, list[Hit | None]]:
            with ExitStack() as leases:
                hits = list(leases.enter_context(self.cache.lease_many(keys, leading=leading, **given(lookup), **how)))
                return leases.pop_all(), hits

        leases, hits = self.call(begin, self.fetch_timeout_s, (ExitStack(), missing), _give_back)
        with leases:
            try:
                yield hits if leading or len(hits) == len(keys) else missing
            finally:
                del hits  # a view that this generator held would outlive its lease

    def how_to_lease(self, out: Any) -> dict[str, Any]:
        """How `lease_many` is best asked for what is to fill these tensors: see `Client.how_to_lease`."""
        asked = getattr(self.cache, "how_to_lease", None)
        return {} if asked is None else asked(out)

    def before(self, entries: Iterable[Mapping[str, Any]]) -> Callable[[], None] | None:
        """What waits for all that this thread's streams are to do with tensors on a GPU: see `Transfers.before`."""
        found = getattr(self.cache, "transfers", None)
        return (found if isinstance(found, Transfers) else Transfers(None)).before(entries)

    def fill(self, pairs: list[tuple[Any, Any]]) -> None:
        """Copy (target, source) pairs, sources that were leased: see `Client.fill`."""
        getattr(self.cache, "fill", fill)(pairs)

    def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> Match:
        """How many leading keys are held, and where."""
        return self.call(lambda: self.cache.match(keys, **given(lookup)), self.lookup_timeout_s, Match(()))

    def locate(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held."""
        missing: list[Held | None] = [None] * len(keys)
        return self.call(lambda: list(self.cache.locate(keys, **given(lookup))), self.lookup_timeout_s, missing)

    def restored(self, tokens: int, spent_s: float) -> None:
        """Report what a restored prefix saved, where the operator has said how fast its engine prefills.

        For engines whose storage sees no forward pass and so can time none. spent_s: what restoring took.
        """
        if self._prefill_tokens_per_s:
            self.report(prefill_saved_s=tokens / self._prefill_tokens_per_s - spent_s)

    def report(self, *, prefill_saved_s: float) -> None:
        """Add seconds of prefill that hits made unnecessary to the cache's numbers, later."""
        if prefill_saved_s > 0:
            self.later(lambda: self.cache.report(prefill_saved_s=min(prefill_saved_s, REPORT_MAX_S)), 0)

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use."""
        return self.call(lambda: int(self.cache.touch(keys, ttl_s=ttl_s)), self.lookup_timeout_s, 0)

    def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys."""
        return self.call(lambda: int(self.cache.delete(*keys, keep_shared=keep_shared)), self.fetch_timeout_s, 0)

    def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys. Returns how many are held."""
        return self.call(lambda: int(self.cache.pin(*keys, ttl_s=ttl_s)), self.fetch_timeout_s, 0)

    def unpin(self, *keys: bytes) -> int:
        """Let go of keys. Returns how many were let go."""
        return self.call(lambda: int(self.cache.unpin(*keys)), self.fetch_timeout_s, 0)

    def _write(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the boundary: an engine never hears of a put that failed
            self.dropped += 1
            self._ended(error, None)

    def _ended(self, error: Exception, otherwise: T) -> T:
        """What a call is answered with that ended in an error; whose error it was decides what is counted."""
        why = f"{type(error).__name__}: {error}"
        if not isinstance(error, _CALLERS):
            return self._failed(otherwise, why)
        self.refused += 1
        # A warning only once: a caller that sends one such call sends many.
        logger.log(logging.WARNING if self.refused == 1 else logging.DEBUG, "refused, answered as a miss: %s", why)
        return otherwise

    def _failed(self, otherwise: T, why: str) -> T:
        self.failures += 1
        if self._breaker.failed():
            logger.warning("cache left alone for a while, answering misses: %s", why)
        else:
            logger.debug("answered as a miss: %s", why)
        return otherwise


def guarded(cache: Any) -> Guard:
    """The guard itself, or a guard around a cache or an address."""
    return cache if isinstance(cache, Guard) else Guard(cache)


def _give_back(found: tuple[ExitStack, object]) -> None:
    """Of a lease that came too late."""
    found[0].close()


class _Call:
    """Work on another thread; `done` is set when `result` or `error` is there.

    give_back: takes the result if nobody waits for it any more.
    """

    __slots__ = ("_give_back", "_lock", "_over", "_work", "done", "error", "result")

    def __init__(self, work: Callable[[], Any], give_back: Callable[[Any], object] | None = None) -> None:
        self._work = work
        self._give_back = give_back
        self._lock = threading.Lock()
        self._over = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def __call__(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # noqa: BLE001 - handed to who waits
            self.error = error
        with self._lock:
            late = self._over
            self.done.set()
        if late and self.error is None and self._give_back is not None:
            with suppress(Exception):  # nobody is there to hear of it
                self._give_back(self.result)

    def given_up(self) -> bool:
        """Nobody waits any more. False: it is done after all."""
        with self._lock:
            self._over = not self.done.is_set()
            return self._over


class _Threads:
    """At most so many threads, started when needed. Daemon threads: an overdue call never holds up the exit."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._free = 0
        self._started = 0
        self._calls: SimpleQueue[_Call] = SimpleQueue()

    def run(self, call: _Call) -> bool:
        """Start the call. False: all threads are busy."""
        with self._lock:
            if self._free:
                self._free -= 1
            elif self._started < self._most:
                self._started += 1
                threading.Thread(target=self._serve, name="kvstored-guard", daemon=True).start()
            else:
                return False
        self._calls.put(call)
        return True

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            call()
            del call  # an idle thread would keep the last result's tensors alive
            with self._lock:
                self._free += 1


class _Writer:
    """Runs works one after the other on one thread, which ends when there are none."""

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes = most_nbytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._nbytes = 0
        self._running = False

    def add(self, work: Callable[[], None], nbytes: int) -> bool:
        """Queue the work. False: over the limit."""
        with self._changed:
            if self._nbytes and self._nbytes + nbytes > self._most_nbytes:
                return False
            self._waiting.append((work, nbytes))
            self._nbytes += nbytes
            if not self._running:
                self._running = True
                threading.Thread(target=self._serve, name="kvstored-writer", daemon=True).start()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Whether all is done within the time."""
        until = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, until - time.monotonic()))

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                work, nbytes = self._waiting.popleft()
            work()
            del work
            with self._changed:
                self._nbytes -= nbytes


_alive: "weakref.WeakSet[Guard]" = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    # A worker that ends right after its answer has paid for the prefill: give its puts a moment.
    for guard in list(_alive):
        guard.flush(2.0)
