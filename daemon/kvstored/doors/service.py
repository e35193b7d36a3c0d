"""What both gRPC services share. The event loop's thread."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import grpc

from kvstore.view import StoreView
from kvstored.access.tenant_view import TenantViews

Context = grpc.aio.ServicerContext[Any, Any]


R = TypeVar("R")


class Service:
    """What both services share: the store, and the threads that may wait for it."""

    def __init__(self, views: TenantViews, threads: Executor, boot_epoch: int) -> None:
        self._views = views
        self._threads = threads
        self._epoch = boot_epoch

    @property
    def _store(self) -> StoreView:
        """The store as the caller may see it. Only on the event loop: the caller is the running task's."""
        return self._views.current()

    def _run(self, work: Callable[..., R], *args: Any) -> Awaitable[R]:
        """Work that may block, on a worker thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args))
