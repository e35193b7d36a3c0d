"""S3 and what speaks it as an engine, by obstore. An object is one object: PREFIX/v1/ab/HEX.

All requests of one engine run on one thread's event loop, at most REQUESTS_MAX at once, none tried twice; at its
deadline a call takes what has arrived and cancels the rest. S3 keeps no time to live: a lifecycle rule of the bucket
removes, and what a record says of its own end decides. There is no cheap claim. Any thread.
"""

import asyncio
import concurrent.futures
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, S3Store

from kvstore.shared import HEAD_NBYTES, Buffer, Health, SharedUnavailable
from kvstore.shared.addresses import S3Url
from kvstore.shared.names import PREFIX, VERSION

REQUESTS_MAX = 64
REQUEST_MAX_S = 60.0
"""Of a request that no deadline has cancelled, for the case that cancelling does not reach the library."""
CONNECT_MAX_S = 2.0
_CANCEL_S = 0.002
"""What the event loop needs to take down what it has, before the caller's deadline."""

T = TypeVar("T")


def connect(url: S3Url, credentials: Mapping[str, str]) -> ObjectStore:
    """A bucket. credentials: as `credentials.read` gives them; none: as the SDKs find them."""
    options: dict[str, Any] = dict(credentials) | {
        name: value for name, value in (("endpoint", url.endpoint), ("region", url.region)) if value
    }
    return S3Store(
        url.bucket,
        virtual_hosted_style_request=not url.path_style,
        client_options={
            "timeout": timedelta(seconds=REQUEST_MAX_S),
            "connect_timeout": timedelta(seconds=CONNECT_MAX_S),
            "allow_http": url.endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_MAX_S)},
        **options,
    )


class S3:
    """An `Engine`. Its objects lie under `url.prefix`. complaints: what is wrong with the bucket (`s3_health`)."""

    def __init__(
        self,
        store: ObjectStore,
        url: S3Url,
        *,
        complaints: Callable[[float], list[str]] = lambda _timeout_s: [],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._url, self._monotonic = store, url, monotonic
        self._complaints = complaints
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(REQUESTS_MAX)
        self._closed = False

    def heads(self, names: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """See `Engine`. Ranged reads: they cost what asking for the presence costs."""

        async def head(name: str) -> bytes | None:
            try:
                found = await obstore.get_range_async(self._store, self._path(name), start=0, end=HEAD_NBYTES)
            except FileNotFoundError:
                return None
            return bytes(found)

        return self._all([head(name) for name in names], timeout_s, None)

    def get(self, names: Sequence[str], nbytes: Sequence[int], timeout_s: float) -> list[bytearray | None]:
        """See `Engine`."""

        async def get(name: str, size: int) -> bytearray | None:
            try:
                # One byte more than it should have: an object that is longer is not this one.
                found = await obstore.get_range_async(self._store, self._path(name), start=0, end=size + 1)
            except FileNotFoundError:
                return None
            return bytearray(memoryview(found)) if len(found) == size else None

        return self._all([get(name, size) for name, size in zip(names, nbytes, strict=True)], timeout_s, None)

    def put(
        self, objects: Sequence[tuple[str, Sequence[Buffer]]], ttl_s: float, timeout_s: float, *, replace: bool = False
    ) -> list[bool]:
        """See `Engine`. ttl_s is the bucket's to keep."""
        del ttl_s
        mode: Literal["create", "overwrite"] = "overwrite" if replace else "create"

        async def put(name: str, buffers: Sequence[Buffer]) -> bool:
            body = b"".join(buffers)
            with suppress(AlreadyExistsError):
                await obstore.put_async(self._store, self._path(name), body, mode=mode, use_multipart=False)
            return True

        return self._all([put(name, buffers) for name, buffers in objects], timeout_s, False)

    def claim(self, names: Sequence[str], ttl_s: float, timeout_s: float) -> list[bool]:
        """See `Engine`. Always True: a conditional PUT costs as much as the upload that it might save."""
        del ttl_s, timeout_s
        return [True] * len(names)

    def delete(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """See `Engine`."""

        async def delete(name: str) -> bool:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, self._path(name))
            return True

        return self._all([delete(name) for name in names], timeout_s, False)

    def health(self, timeout_s: float) -> Health:
        """See `Engine`. S3 does not say how much it holds."""
        begun = self._monotonic()
        self.heads([f"{PREFIX}health"], timeout_s)
        round_trip_s = self._monotonic() - begun
        return Health(1, 1, round_trip_s, complaints=self._complaints(max(0.1, timeout_s - round_trip_s)))

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(_cancel_all, loop)

    def _path(self, name: str) -> str:
        """PREFIX/v1/ab/abcdef...: S3 spreads load by the beginning of a path, here 256 ways."""
        plain = name.removeprefix(PREFIX)
        spread = plain[:2] if re.fullmatch(r"[0-9a-f]{64}", plain) else "other"
        return "/".join(part for part in (self._url.prefix, f"v{VERSION}", spread, plain) if part)

    def _all(self, calls: Sequence[Coroutine[Any, Any, T]], timeout_s: float, missing: T) -> list[T]:
        """Their results, `missing` for those that failed or were late. Raises SharedUnavailable if all did."""
        if not calls:
            return []
        try:
            loop = self._running_loop()
            future = asyncio.run_coroutine_threadsafe(self._wait(calls, timeout_s), loop)
        except SharedUnavailable:
            for call in calls:
                call.close()
            raise
        try:
            outcomes = future.result()
        except (asyncio.CancelledError, concurrent.futures.CancelledError):
            raise SharedUnavailable("closed", "the shared store is closed") from None
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(outcomes):
            raise _unavailable(failures)
        return [missing if isinstance(outcome, BaseException) else outcome for outcome in outcomes]

    async def _wait(self, calls: Sequence[Coroutine[Any, Any, T]], timeout_s: float) -> list[T | BaseException]:
        tasks = [asyncio.ensure_future(self._in_turn(call)) for call in calls]
        _, late = await asyncio.wait(tasks, timeout=max(0.001, timeout_s - _CANCEL_S))
        for task in late:
            task.cancel()
        outcomes: list[T | BaseException] = []
        for task in tasks:
            if task in late:
                outcomes.append(TimeoutError())
            else:
                outcomes.append(task.exception() or task.result())
        return outcomes

    async def _in_turn(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            async with self._slots:
                return await call
        finally:
            call.close()  # if its turn never came

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise SharedUnavailable("closed", "the shared store is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), name="kvstored-shared-s3", daemon=True).start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    """End every call, then the loop."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.call_later(0.05, loop.stop)


def _unavailable(failures: Sequence[BaseException]) -> SharedUnavailable:
    """Why all requests of a call failed: the first reason that says more than that the time was up."""
    told = next((error for error in failures if not isinstance(error, TimeoutError)), None)
    if told is None:
        return SharedUnavailable("timeout", "the shared store (S3) did not answer in time")
    reason = "denied" if isinstance(told, PermissionDeniedError | UnauthenticatedError) else "unreachable"
    return SharedUnavailable(reason, f"the shared store (S3): {str(told).partition(chr(10))[0][:200]}")
