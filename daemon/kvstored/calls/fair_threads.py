"""Worker threads at which callers take turns: whoever asks for little waits for no other's queue.

A caller may use all threads but one while it alone asks, and as many as there are processors, half of the threads at
most, while others ask too: work in Python takes turns anyway, and the more of it goes on, the longer each of the others
waits for its turn. Of what waits, each caller's next has its turn after the other callers'. Thread-safe.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

R = TypeVar("R")
ALONE_S = 1.0
"""A caller is alone when all that was asked for so long was asked by it."""
Work = tuple[Future[Any], Callable[[], Any]]


class FairThreads:
    """The threads: so many at most, made when they are first needed."""

    def __init__(self, threads: int, name: str) -> None:
        self._limit = threads
        self._alone = max(1, threads - 1)
        self._each = max(1, min(threads // 2, len(os.sched_getaffinity(0))))
        self._asked_last = ""
        self._changed_at = float("-inf")
        """When another caller than before asked."""
        self._name = name
        self._turn = threading.Condition()
        self._waiting: dict[str, deque[Work]] = {}
        """By caller, whose turn is next first."""
        self._running: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._ends = False

    @property
    def waiting(self) -> int:
        """Work that waits for a thread."""
        with self._turn:
            return sum(map(len, self._waiting.values()))

    def run(self, caller: str, work: Callable[..., R], *args: Any) -> "asyncio.Future[R]":
        """Have a caller's work done, on the event loop."""
        return asyncio.wrap_future(self.submit(caller, work, *args))

    def submit(self, caller: str, work: Callable[..., R], *args: Any) -> "Future[R]":
        """Have a caller's work done. Cancelling what this returns takes it out of the queue."""
        future: Future[R] = Future()
        with self._turn:
            if self._ends:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if caller != self._asked_last:
                self._asked_last, self._changed_at = caller, time.monotonic()
            self._waiting.setdefault(caller, deque()).append((future, partial(work, *args)))
            self._turn.notify()
            # A thread that was woken counts as idle until it has taken its work out of the queue.
            if sum(map(len, self._waiting.values())) > self._idle and len(self._threads) < self._limit:
                thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self) -> None:
        """End the threads once nothing waits. Blocks."""
        with self._turn:
            self._ends = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, done: str | None) -> tuple[str, Work] | None:
        """Wait for work that has its turn; its caller goes to the end of the row. None: no more comes.

        done: the caller whose work this thread has just done.
        """
        waiting, running = self._waiting, self._running
        with self._turn:
            if done is not None:
                running[done] -= 1
                if not running[done]:
                    del running[done]
                self._turn.notify_all() if self._ends else self._turn.notify()
            while True:
                alone = time.monotonic() - self._changed_at >= ALONE_S
                each = self._alone if alone else self._each
                for caller, queue in waiting.items():
                    if running.get(caller, 0) < each:
                        work = queue.popleft()
                        del waiting[caller]
                        if queue:
                            waiting[caller] = queue
                        running[caller] = running.get(caller, 0) + 1
                        return caller, work
                if self._ends and not waiting:
                    return None
                self._idle += 1
                self._turn.wait()
                self._idle -= 1

    def _work(self) -> None:
        caller: str | None = None
        while (found := self._take(caller)) is not None:
            caller, (future, call) = found
            del found
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 - the future's, as in every pool of threads
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del future, call
