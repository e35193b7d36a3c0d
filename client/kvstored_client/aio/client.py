"""The asyncio client: one table of the verbs of the blocking one.

Each verb runs as it is written there, and answers with an awaitable because it asks through `LoopAsking`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack, cast

from kvstore import arrays
from kvstore.device import Driver
from kvstore.hit import Hit
from kvstore.keys import CHUNK_TOKENS, IdentityFields, identity_of
from kvstore.lookup import Lookup
from kvstore.pieces import AwaitedPieces
from kvstore.prefix import Prefixes as Namespace
from kvstored_client import client as blocking
from kvstored_client.aio.asking import LoopAsking
from kvstored_client.aio.calls import BREATH_S
from kvstored_client.asking import Leases, OnError
from kvstored_client.decoding import Decode

__all__ = ["Client", "Namespace"]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=blocking.Client)


def _awaited(
    verb: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate["Client", P], Coroutine[Any, Any, T]]:
    """A verb to await."""

    @wraps(verb)
    async def awaited(self: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return await cast("Coroutine[Any, Any, T]", verb(self.asking, *args, **kwargs))

    return cast("Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]", awaited)


def _iterated(
    verb: Callable[Concatenate[Any, P], Iterator[T]],
) -> Callable[Concatenate["Client", P], AsyncIterator[T]]:
    """A verb to iterate over with `async for`."""

    @wraps(verb)
    def iterated(self: "Client", *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return cast("AsyncIterator[T]", verb(self.asking, *args, **kwargs))

    return cast("Callable[Concatenate[Client, P], AsyncIterator[T]]", iterated)


def _leased(
    verb: Callable[Concatenate[Any, P], AbstractContextManager[T]],
) -> Callable[Concatenate["Client", P], "Lease[T]"]:
    """A verb to enter with `async with`."""

    @wraps(verb)
    def leased(self: "Client", *args: P.args, **kwargs: P.kwargs) -> "Lease[T]":
        return Lease(cast("Leases", verb(self.asking, *args, **kwargs)))

    return cast("Callable[Concatenate[Client, P], Lease[T]]", leased)


class Lease(Generic[T]):
    """A lease that begins with its block."""

    def __init__(self, lease: Leases) -> None:
        self._lease = lease

    async def __aenter__(self) -> T:
        hits = await cast("Any", self._lease.begin())
        return cast("T", self._lease.enter(hits))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lease.__exit__(kind, error, trace)


class Client:
    """A cache behind a daemon, for one event loop at a time. Arguments as of `kvstored_client.Client`."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = blocking.TIMEOUT_S,
        framework: arrays.Framework = "auto",
        on_error: OnError = "miss",
        shared_memory: bool = True,
        decode: Decode = "auto",
        driver: Driver | None = None,
    ) -> None:
        self.asking = LoopAsking(
            address, timeout_s=timeout_s, framework=framework, on_error=on_error, shared_memory=shared_memory,
            decode=decode, driver=driver,
        )  # fmt: skip

    put = _awaited(blocking.Client.put)
    put_many = _awaited(blocking.Client.put_many)
    get = _awaited(blocking.Client.get)
    get_many = _awaited(blocking.Client.get_many)
    match = _awaited(blocking.Client.match)
    locate = _awaited(blocking.Client.locate)
    touch = _awaited(blocking.Client.touch)
    delete = _awaited(blocking.Client.delete)
    pin = _awaited(blocking.Client.pin)
    unpin = _awaited(blocking.Client.unpin)
    lease = _leased(blocking.Client.lease)
    lease_many = _leased(blocking.Client.lease_many)
    empty = _awaited(blocking.Client.empty)
    evict = _awaited(blocking.Client.evict)
    demote = _awaited(blocking.Client.demote)
    promote = _awaited(blocking.Client.promote)
    drain = _awaited(blocking.Client.drain)
    verify = _iterated(blocking.Client.verify)
    check_shared = _awaited(blocking.Client.check_shared)
    flush_shared = _awaited(blocking.Client.flush_shared)
    snapshot = _iterated(blocking.Client.snapshot)
    report = _awaited(blocking.Client.report)
    inspect = _awaited(blocking.Client.inspect)
    explain = _awaited(blocking.Client.explain)
    entries = _iterated(blocking.Client.entries)
    ping = _awaited(blocking.Client.ping)
    stats = _awaited(blocking.Client.stats)
    settings = _awaited(blocking.Client.settings)
    configure = _awaited(blocking.Client.configure)

    @property
    def address(self) -> str:
        """Where the daemon is."""
        return self.asking.address

    @property
    def boot_epoch(self) -> int:
        """A number that changes with each start of the daemon; 0 before the first answer."""
        return self.asking.boot_epoch

    @property
    def restarts(self) -> int:
        """How often the daemon was found restarted."""
        return self.asking.restarts

    @property
    def failures(self) -> int:
        """Calls that ended in trouble and were answered as a miss, or raised."""
        return self.asking.failures

    def namespace(self, *, chunk_tokens: int = CHUNK_TOKENS, **identity: Unpack[IdentityFields]) -> Namespace:
        """The prefixes of one model: `identity` is the fields of `keys.Identity`, all that have no default."""
        return Namespace(AwaitedPieces(_Prefixed(self)), identity_of(identity), chunk_tokens)

    async def close(self) -> None:
        """End the connections and all calls. Closing twice is harmless. Tensors of `empty` stay readable."""
        await self.asking.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Prefixed:
    """A client as the prefix layer wants it (see `kvstore.pieces`)."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.answers_tails = client.asking.answers_tails
        self._since = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def lease_into(
        self,
        leases: ExitStack,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        lookup: Lookup | None = None,
        **how: Any,
    ) -> Iterable[Hit | None]:
        lease = cast("Leases", self._client.asking.lease_many(keys, leading=leading, lookup=lookup, **how))
        hits = cast("Iterable[Hit | None]", lease.enter(await cast("Any", lease.begin())))
        leases.push(lease)
        return hits

    async def fill(self, pairs: list[tuple[Any, Any]]) -> None:
        await self._client.asking.fill(pairs)

    async def how_to_lease(self, out: Any) -> dict[str, Any]:
        return self._client.asking.how_to_lease(out)

    async def breathe(self) -> None:
        if time.perf_counter() - self._since > BREATH_S:
            await asyncio.sleep(0)
            self._since = time.perf_counter()

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        return await self._client.asking.worker.run(call, *args)
