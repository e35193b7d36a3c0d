"""Work in a second thread, that whoever asked for it may be interrupted in at any instant (see `interrupts`).

Not an Executor of the standard library: an interrupt inside one of its conditions leaves a lock held that its thread
waits for, for ever. One thread an Aside, jobs in their order; started with the first and gone with the Aside.
"""

import _thread
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

LOOK_AGAIN_S = 0.05
"""How often who waits looks whether the thread still runs."""


class _Mark:
    __slots__ = ("__weakref__",)


def _nobody() -> None:
    """What a weak reference to nothing answers."""


class Job:
    """One call in the other thread."""

    def __init__(self, work: Callable[..., object], args: tuple[Any, ...], runner: Any) -> None:
        """runner: a weak reference that ends with the thread that is to do it."""
        self._work = work
        self._args = args
        self._unclaimed = [None]  # who takes this does the work, or says that nobody will
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._error: BaseException | None = None
        self.over = False
        self._runner = runner

    def run(self, runner: Any) -> None:
        """Do it, unless it was called off."""
        self._runner = runner
        if not self._claim():
            return
        try:
            self._work(*self._args)
        except Exception as error:  # noqa: BLE001 - it is the waiter's
            self._error = error
        self.over = True
        self._done.release()

    def wait(self) -> None:
        """Wait until it is done. Raises what the work raised."""
        while not self.over:
            if not self._done.acquire(timeout=LOOK_AGAIN_S) and self._runner() is None:
                self._claim()  # its thread did not start, or an exception from another thread has ended it
                self._work(*self._args)
                self.over = True
        if self._error is not None:
            raise self._error

    def call_off(self) -> None:
        """Return once nobody does the work any more."""
        if self._claim():
            self.over = True
        while not self.over and self._runner() is not None:
            self._done.acquire(timeout=LOOK_AGAIN_S)

    def _claim(self) -> bool:
        try:
            self._unclaimed.pop()
        except IndexError:
            return False
        return True


class Aside:
    """One more thread."""

    def __init__(self, begin: Callable[[], object] | None = None) -> None:
        """begin: what the thread does first."""
        self._begin = begin
        self._queue: SimpleQueue[object] = SimpleQueue()
        self._running: Any = _nobody

    def start(self, jobs: list[Job], work: Callable[..., object], *args: Any) -> None:
        """Have work(*args) done. Its job is in `jobs` before it can begin, so that nothing is done unknown to them."""
        if self._running() is None:
            mark = _Mark()
            self._running = weakref.ref(mark)
            end = weakref.ref(self, self._queue.put)
            with suppress(RuntimeError):  # out of threads: who waits does it
                _thread.start_new_thread(_run, (self._queue, self._begin, end, mark))
        job = Job(work, args, self._running)
        jobs.append(job)
        self._queue.put(job)


def _run(queue: "SimpleQueue[object]", begin: Callable[[], object] | None, _end: object, mark: _Mark) -> None:
    """Until something that is no job comes: `_end`, with the last reference to the Aside."""
    runner = weakref.ref(mark)
    if begin is not None:
        begin()
    while isinstance(job := queue.get(), Job):
        job.run(runner)
        del job


def call_off(jobs: list[Job]) -> None:
    """Return once none of the jobs is under way; an interrupt meanwhile is raised then."""
    interrupt: BaseException | None = None
    while jobs:
        try:
            jobs[-1].call_off()
            jobs.pop()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            interrupt = error
    if interrupt is not None:
        raise interrupt
