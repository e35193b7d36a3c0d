"""One question through either door: shared memory where there is some, the stream otherwise.

Trouble on the daemon's side becomes a miss here, once, unless the caller wants it raised. Thread-safe.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from kvstore.device import Driver
from kvstore.errors import InvalidEntry, OverQuota, RecordCorrupt, TierUnavailable
from kvstored_client.device import Transfers
from kvstored_client.interrupts import damage
from kvstored_client.shm import calls
from kvstored_client.shm.pool import Connection, ConnectionPool, Silent, UseStream
from kvstored_client.stream.transport import ADMIN, CACHE, ReplyType, Transport, log_change
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.address import default_address, lease_path, socket_path

logger = logging.getLogger(__name__)

OnError = Literal["miss", "raise"]
SOFT = (TierUnavailable, OverQuota, RecordCorrupt)
"""What a daemon in trouble looks like: a miss on the data path."""

R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")


class Doors:
    """The way to a daemon. failures: calls that ended in trouble and were answered as a miss, or raised."""

    def __init__(
        self, address: str | None, timeout_s: float, on_error: OnError, *, shared_memory: bool, driver: Driver | None
    ) -> None:
        self._on_error = on_error
        self._transport = self._transport_to(address or default_address(), timeout_s)
        path = socket_path(self._transport.target)
        self.transfers = Transfers(driver)
        # With a token too: the daemon hangs up on users its tokens file does not name, and the stream is taken.
        self._pool = self._pool_at(lease_path(path), timeout_s) if shared_memory and path is not None else None
        if self._pool is not None:
            self._pool.transfers = self.transfers
            self._transport.on_fork = self._pool.start_afresh
        else:
            self._transport.on_fork = self.transfers.forget
        self.failures = 0
        self._epoch = 0  # the last one seen over shared memory

    def _transport_to(self, address: str, timeout_s: float) -> Transport:
        return Transport(address, timeout_s, log_change)

    def _pool_at(self, path: Path, timeout_s: float) -> ConnectionPool:
        return ConnectionPool(path, timeout_s)

    @property
    def address(self) -> str:
        """Where the daemon is."""
        return self._transport.address

    @property
    def boot_epoch(self) -> int:
        """A number that changes with each start of the daemon; 0 before the first answer."""
        return self._transport.boot_epoch

    @property
    def restarts(self) -> int:
        """How often the daemon was found restarted."""
        return self._transport.restarts

    def _ask(self, verb: str, request: Any, reply: ReplyType[R]) -> R:
        """A small verb, over the lease socket where there is one: 0.05 ms a round trip, against 0.4."""
        name = verb.lower()
        try:
            reply_message = self._through_shared_memory(calls.ask, pb.LeaseCall(**{name: request}))
        except UseStream:
            return self._noted(self._transport.unary(CACHE + verb, request, reply))  # type: ignore[no-any-return]
        return self._noted(getattr(reply_message, name))  # type: ignore[no-any-return]

    def _through_shared_memory(
        self, call: Callable[Concatenate[ConnectionPool, list[Connection], P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """A call through shared memory. Raises UseStream where there is none, and what the call itself raises."""
        pool, breaker = self._pool, self._transport.breaker
        if pool is None:
            raise UseStream("another host, or switched off")
        if breaker.failures or breaker.openings:
            self._transport.allow()
        hand: list[Connection] = []
        try:
            try:
                result = call(pool, hand, *args, **kwargs)
            finally:
                if hand:
                    pool.put_back(hand)
        except Silent as error:
            pool.put_back(hand)
            raise self._transport.silent(str(error)) from None
        except BaseException:
            pool.put_back(hand)  # the first time it may have been interrupted
            raise
        if breaker.failures or breaker.openings:
            self._transport.answered()
        return result

    def _understood(self, read: Callable[[Any], T], answer: Any) -> T:
        """What an answer says. Raises RecordCorrupt for one that says what cannot be."""
        try:
            return read(answer)
        except InvalidEntry as error:
            raise RecordCorrupt(f"what {self.address} answered cannot be: {error}") from None
        except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
            raise damage(error, f"what {self.address} answered") from None

    def _at_most(self, asked: int, answered: int) -> int:
        if answered > asked:
            raise RecordCorrupt(f"{self.address} answered {answered} of {asked}")
        return answered

    def _saw_epoch(self, epoch: int) -> None:
        self._transport.saw_epoch(epoch)
        self._epoch = epoch

    def _noted(self, reply: Any) -> Any:
        self._transport.saw_epoch(reply.boot_epoch)
        return reply

    def _check_open(self) -> None:
        if self._transport.closed:
            raise TierUnavailable("this client is closed: make another one, or close it later")

    def _asked(
        self, verb: str, request: Any, reply: ReplyType[R], read: Callable[[R], T], otherwise: T, *, small: bool = True
    ) -> T:
        """What a verb of the data path read in its answer. small: over the lease socket where there is one."""
        ask = self._ask if small else self._ask_stream
        return self._data(lambda: read(ask(verb, request, reply)), otherwise)

    def _ask_stream(self, verb: str, request: Any, reply: ReplyType[R]) -> R:
        return self._transport.unary(CACHE + verb, request, reply)

    def _operate(self, verb: str, request: Any, reply: ReplyType[R], read: Callable[[R], T]) -> T:
        """What a verb of the operator's read in its answer."""
        self._check_open()
        try:
            answer = self._transport.unary(ADMIN + verb, request, reply)
        except SOFT:
            self.failures += 1
            raise
        return read(answer)

    def _data(self, call: Callable[P, T], otherwise: T, *args: P.args, **kwargs: P.kwargs) -> T:
        """A call on the data path: trouble on the daemon's side is `otherwise`, unless the caller wants it raised.

        Raises TierUnavailable of a closed client, whatever the caller wants: that is no daemon in trouble, and misses
        for ever would hide it.
        """
        self._check_open()
        try:
            return call(*args, **kwargs)
        except SOFT as error:
            self.failures += 1
            if self._on_error == "raise":
                raise
            logger.debug("answered as a miss: %s", error)
            return otherwise
