"""Calls that wait for the shared store: on threads of their own, so that no local call waits behind them.

As many at once as there are threads; one more does without the shared store, which is a miss. So a store that hangs
takes no thread from the others, and no queue grows. On the event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

THREADS = 32
"""Of which each mostly waits for a server, at most `store.shared.lookup_s` and `fetch_s`."""

R = TypeVar("R")


class SharedReads:
    """The threads, made when they are first needed."""

    def __init__(self, threads: int = THREADS) -> None:
        self._left = threads
        self._pool = ThreadPoolExecutor(threads, "kvstored-shared")

    async def run(self, work: Callable[[], R]) -> R | None:
        """The result of work on a thread; None: all of them wait."""
        if not self._left:
            return None
        self._left -= 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # When the thread is free, not when the caller is gone.
        future.add_done_callback(self._freed)
        return await asyncio.shield(future)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def _freed(self, future: "asyncio.Future[Any]") -> None:
        self._left += 1
        if not future.cancelled():
            future.exception()  # its caller may be gone, and nobody else looks
