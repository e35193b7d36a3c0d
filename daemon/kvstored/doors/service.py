"""What every gRPC method shares: errors of the engine become a status here, once. The event loop's thread."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import InvalidEntry, KvstoreError
from kvstore.view import StoreView
from kvstored.access.tenant_view import TenantViews
from kvstored_client.wire.frames import BadFrame

logger = logging.getLogger(__name__)


Context = grpc.aio.ServicerContext[Any, Any]


Handler = Callable[[Any, bytes, Context], Awaitable[Any]]


R = TypeVar("R")


def answering(handler: Handler) -> Handler:
    """The boundary: an error of the engine becomes its status, any other one INTERNAL with a line in the log."""

    @wraps(handler)
    async def answer(self: Any, request: bytes, context: Context) -> Any:
        try:
            return await handler(self, request, context)
        except KvstoreError as error:
            refusal = error
        except (BadFrame, DecodeError) as error:
            refusal = InvalidEntry(str(error))
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("call failed method=%s", handler.__name__)
            refusal = KvstoreError("internal error, see the daemon's log")
        return await refuse(context, refusal)

    return answer


async def refuse(context: Context, error: KvstoreError) -> NoReturn:
    """End a call with an error's status; its class travels in the trailing metadata."""
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    metadata = [("kvstored-error", name)]
    retry_after_ms = getattr(error, "retry_after_ms", None)
    if retry_after_ms is not None:
        metadata.append(("retry-after-ms", str(retry_after_ms)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), tuple(metadata))


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
