"""A deadline of our own around any engine: a library's timeout is not one.

Each call runs on a thread of this pool, and its caller waits for it no longer than timeout_s + GRACE_S. What is late is
left to itself: its answer is dropped, its thread and its bytes are counted until it ends. So threads and bytes are
bounded whatever hangs, and who finds no free thread, or no room in the budget, is told so at once.

An engine that has no breaker for each of its servers gets one here. Thread-safe.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kvstore.clock import Clock
from kvstore.shared import AsksAndClaims, Buffer, Engine, Health, SharedUnavailable
from kvstore.shared.breaker import CLOSED, Breaker
from kvstore.shared.names import PREFIX

THREADS = 16
"""Calls at once. A fetch is one call; its values come from all servers in parallel anyway."""
WAITING_MAX = 64
"""Calls that wait for a thread."""
IN_FLIGHT_MAX_NBYTES = 512 << 20
"""Of values on their way, both directions."""
GRACE_S = 0.012
"""What an engine has left, after its own deadline, to return what had arrived."""
PROBE_NAME = f"{PREFIX}probe"
PROBE_S = 30.0
"""A probe waits as long as the longest pause: a store that hung answers it the moment it goes on."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class _Job(Generic[T]):
    """One call. Its end is told by a lock that is released: half the cost of an Event."""

    def __init__(self, run: Callable[[], T], done: Callable[[], None]) -> None:
        self._run, self._done = run, done
        self._ended = threading.Lock()
        self._ended.acquire()
        self.result: T | None = None
        self.error: BaseException | None = None
        self.abandoned = False

    def work(self) -> None:
        """On a thread of the pool."""
        try:
            if not self.abandoned:
                self.result = self._run()
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            self.error = error
        finally:
            self._done()
            self._ended.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        return self._ended.acquire(timeout=timeout_s)


class Guarded:
    """An `Engine` around another.

    state: of the breakers that the other keeps for its servers; None: it keeps none. punctual: it waits for nothing
    but its own poll, so its calls need no thread of another's. Its `health`, which goes through a library, gets one.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        *,
        state: Callable[[], int] | None = None,
        punctual: bool = False,
        threads: int = THREADS,
        in_flight_max_nbytes: int = IN_FLIGHT_MAX_NBYTES,
    ) -> None:
        self.engine = engine
        self._own_breaker = Breaker(clock) if state is None else None
        self._state = state
        self._punctual = punctual
        self._threads_max = threads
        self._in_flight_max_nbytes = in_flight_max_nbytes
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._threads = 0
        self._pending = 0
        self.in_flight_nbytes = 0
        self._closed = False

    @property
    def breaker(self) -> int:
        """0: closed, 1: half-open, 2: open; of an engine with many servers: whether any may be asked. Asks nobody."""
        if self._own_breaker is not None:
            return self._own_breaker.state
        return self._state() if self._state is not None else CLOSED

    def heads(self, names: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """See `Engine`."""
        return self._call(lambda: self.engine.heads(names, timeout_s), timeout_s) if names else []

    def get(self, names: Sequence[str], nbytes: Sequence[int], timeout_s: float) -> list[bytearray | None]:
        """See `Engine`."""
        return self._call(lambda: self.engine.get(names, nbytes, timeout_s), timeout_s, sum(nbytes)) if names else []

    def put(
        self, objects: Sequence[tuple[str, Sequence[Buffer]]], ttl_s: float, timeout_s: float, *, replace: bool = False
    ) -> list[bool]:
        """See `Engine`."""
        if not objects:
            return []
        nbytes = sum(memoryview(buffer).nbytes for _, buffers in objects for buffer in buffers)
        return self._call(lambda: self.engine.put(objects, ttl_s, timeout_s, replace=replace), timeout_s, nbytes)

    def claim(self, names: Sequence[str], ttl_s: float, timeout_s: float) -> list[bool]:
        """See `Engine`."""
        return self._call(lambda: self.engine.claim(names, ttl_s, timeout_s), timeout_s) if names else []

    def heads_or_claims(self, names: Sequence[str], claim_s: float, timeout_s: float) -> list[bytes | bool | None]:
        """See `AsksAndClaims`. Of an engine without a claim of its own every absent name is this caller's."""
        engine = self.engine
        if isinstance(engine, AsksAndClaims):
            asking = engine
            return self._call(lambda: asking.heads_or_claims(names, claim_s, timeout_s), timeout_s) if names else []
        return [head or True for head in self.heads(names, timeout_s)]

    def delete(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """See `Engine`."""
        return self._call(lambda: self.engine.delete(names, timeout_s), timeout_s) if names else []

    def health(self, timeout_s: float) -> Health:
        """See `Engine`. Asked of an engine that is barred, too: that is when an operator asks."""
        return self._call(lambda: self.engine.health(timeout_s), timeout_s, even_if_open=True)

    def close(self) -> None:
        """See `Engine`. Threads end once they have nothing to do; one that hangs ends with the process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._jobs.put(None)
        self.engine.close()

    def _call(self, run: Callable[[], T], timeout_s: float, nbytes: int = 0, *, even_if_open: bool = False) -> T:
        breaker = self._own_breaker
        if breaker is not None and not breaker.closed and not even_if_open:
            self._probe(breaker)
            raise SharedUnavailable("barred", "the shared store has not answered lately and is not asked")
        if self._punctual and not even_if_open:
            return self._run_here(run, nbytes)
        job = self._submit(run, nbytes)
        if not job.wait(timeout_s + GRACE_S):
            job.abandoned = True
            if breaker is not None:
                breaker.failed(hung=True)
            raise SharedUnavailable("timeout", f"the shared store did not answer within {timeout_s:g} s")
        if job.error is None:
            if breaker is not None:
                breaker.succeeded()
            return job.result  # type: ignore[return-value] # of a job without an error
        if breaker is not None:
            breaker.failed(hung=isinstance(job.error, SharedUnavailable) and job.error.reason == "timeout")
        if isinstance(job.error, SharedUnavailable):
            raise job.error
        _log.warning("shared store error=%s: %s", type(job.error).__name__, job.error)
        raise SharedUnavailable("error", f"the shared store: {type(job.error).__name__}: {job.error}") from job.error

    def _run_here(self, run: Callable[[], T], nbytes: int) -> T:
        """In the caller's thread, its bytes counted."""
        with self._lock:
            self._reserve(nbytes)
        try:
            return run()
        except SharedUnavailable:
            raise
        except Exception as error:
            _log.warning("shared store error=%s: %s", type(error).__name__, error)
            raise SharedUnavailable("error", f"the shared store: {type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self.in_flight_nbytes -= nbytes

    def _reserve(self, nbytes: int) -> None:
        """Count bytes, under the lock. Raises SharedUnavailable where there is no room for them."""
        if self._closed:
            raise SharedUnavailable("closed", "the shared store is closed")
        under_way = self.in_flight_nbytes
        if under_way and under_way + nbytes > self._in_flight_max_nbytes:
            raise SharedUnavailable(
                "busy",
                f"the shared store: {under_way} bytes are on their way, and {nbytes} more pass "
                f"{self._in_flight_max_nbytes}",
            )
        self.in_flight_nbytes += nbytes

    def _submit(self, run: Callable[[], T], nbytes: int) -> _Job[T]:
        """Have a thread run it. Raises SharedUnavailable where there is no thread or no room."""
        with self._lock:
            if self._pending >= self._threads_max + WAITING_MAX:
                raise SharedUnavailable("busy", f"the shared store: {self._pending} calls are under way already")
            self._reserve(nbytes)
            self._pending += 1
            wants_thread = self._pending > self._threads and self._threads < self._threads_max
            self._threads += wants_thread

        def done() -> None:
            with self._lock:
                self._pending -= 1
                self.in_flight_nbytes -= nbytes

        job = _Job(run, done)
        if wants_thread:
            threading.Thread(target=self._work, name="kvstored-shared", daemon=True).start()
        self._jobs.put(job)  # type: ignore[arg-type] # a queue of jobs of any result
        return job

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.work()
            del job  # its values are not kept until the next one comes

    def _probe(self, breaker: Breaker) -> None:
        """One lookup beside the calls, that nobody waits for."""
        if not breaker.take_probe():
            return

        def probe() -> None:
            try:
                self.engine.heads([PROBE_NAME], PROBE_S)
            except BaseException:
                breaker.probe_failed()
                raise
            breaker.succeeded()

        try:
            self._submit(probe, 0)
        except SharedUnavailable:
            breaker.probe_failed()
