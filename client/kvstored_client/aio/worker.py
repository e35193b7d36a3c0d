"""One thread for what would hold an event loop: large copies, decoding, packing. Nothing else runs there.

A call that is cancelled ends its work first: whatever it ends with, nothing writes to the caller's memory any more.
Copies look for that between slices. Belongs to one process: a forked child makes its own. Used by one event loop at a
time.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from kvstored_client.wire.frames import Bytes

T = TypeVar("T")
INLINE_NBYTES = 256 << 10
"""So much is copied on the loop: 0.05 ms, less than to wake a thread and be woken."""
SLICE_NBYTES = 4 << 20
"""Between two looks whether the caller was cancelled: 1 ms."""


class Cancelled(Exception):
    """The caller of this work has been cancelled."""


class Slices:
    """Copies in slices, for as long as somebody waits for it."""

    def __init__(self) -> None:
        self.wanted = True

    def copy(self, target: Bytes, source: Bytes) -> None:
        """target[:] = source, without the GIL. Raises Cancelled."""
        for start in range(0, target.size, SLICE_NBYTES):
            if not self.wanted:
                raise Cancelled
            np.copyto(target[start : start + SLICE_NBYTES], source[start : start + SLICE_NBYTES])


class Worker:
    """The thread; started with its first work."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "kvstored-aio")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """work(*args), in the thread. When this returns or raises the work is over, or was never begun."""
        return await self.sliced(lambda _: work(*args))

    async def sliced(self, work: Callable[[Slices], T]) -> T:
        """The same of work that copies by the slices it is given."""
        slices = Slices()
        try:
            job = self._executor.submit(work, slices)
        except RuntimeError:  # closed, or out of threads
            return work(slices)
        waiting = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            slices.wanted = False
            if not job.cancel():
                await _over(job, waiting)
            raise

    def close(self) -> None:
        """Begin nothing more; what is under way ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)


async def _over(job: "Future[Any]", waiting: "asyncio.Future[Any]") -> None:
    """Return once the work is over, however often this is cancelled meanwhile."""
    while not job.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if waiting.done() and not waiting.cancelled():
        waiting.exception()  # it is nobody's
