"""What a verb asks the daemon, and how it reads the answer: through shared memory, else over the stream.

A verb of `Client` checks what it was given, ends with one of these and leaves the answer to its `read`. `aio` has the
same for an event loop, where each of them is a coroutine. Trouble on the daemon's side becomes a miss here, once,
unless the caller wants it raised. Thread-safe.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np

from kvstore import arrays
from kvstore.device import Driver
from kvstore.device.copies import Batch
from kvstore.errors import CodecError, InvalidEntry, OverQuota, RecordCorrupt, TierUnavailable
from kvstore.hit import Held, Hit, TensorInfo
from kvstore.lookup import Lookup
from kvstore.options import PutOptions
from kvstore.packed import ENCODINGS
from kvstored_client.buffers import Out
from kvstored_client.decoding import DECODES, SHM_FROM_NBYTES, Decode, accepted, unpacked
from kvstored_client.device import Transfers, settle_stream
from kvstored_client.device.paged import Paged
from kvstored_client.interrupts import damage
from kvstored_client.puts import Outgoing
from kvstored_client.shm import gets, leases, puts
from kvstored_client.shm.connection import KEYS_PER_PACKET
from kvstored_client.shm.pool import Connection, ConnectionPool, Silent, UseStream
from kvstored_client.stream.receiver import Receiver
from kvstored_client.stream.transport import ADMIN, CACHE, ReplyType, Request, Transport, log_change
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.address import default_address, lease_path, socket_path
from kvstored_client.wire.messages import GetOptions, read_places

logger = logging.getLogger(__name__)

OnError = Literal["miss", "raise"]
SOFT = (TierUnavailable, OverQuota, RecordCorrupt)
"""What a daemon in trouble looks like: a miss on the data path."""

_how_to_get = lru_cache(maxsize=64)(GetOptions)
R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")


class Wanted(NamedTuple):
    """How a lease is asked for: see `Client.lease_many`."""

    leading: bool = False
    lookup: Lookup | None = None
    packed: bool = False
    device: bytes = b""
    tails: Sequence[bytes] = ()


class Leases:
    """A lease that begins with its block."""

    def __init__(
        self,
        begin: Callable[[Sequence[bytes], Wanted], Sequence[Hit | None]],
        keys: Sequence[bytes],
        wanted: Wanted,
    ) -> None:
        self._begin = begin
        self._keys = keys
        self._wanted = wanted
        self._hits: Sequence[Hit | None] = ()

    def begin(self) -> Sequence[Hit | None]:
        """Ask for it: the hits for `enter`. Of an asyncio client, something to await."""
        return self._begin(self._keys, self._wanted)

    def enter(self, hits: Sequence[Hit | None]) -> Any:
        """What the block is given of these hits, which end with this lease."""
        self._hits = hits
        return hits

    def __enter__(self) -> Any:
        return self.enter(self.begin())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        hits, self._hits = self._hits, ()
        if isinstance(hits, leases.LeasedHits):
            hits.end(interrupted=kind is not None)


class OneLease(Leases):
    """The same of one key."""

    def enter(self, hits: Sequence[Hit | None]) -> Hit | None:
        """The hit."""
        self._hits = hits
        return hits[0] if hits else None


def leading_hits(hits: list[Hit | None]) -> list[Hit | None]:
    """Of a chain, the hits before the first miss."""
    return hits[: next((i for i, hit in enumerate(hits) if hit is None), len(hits))]


class Asking:
    """The questions behind the verbs. failures: calls that ended in trouble and were answered as a miss, or raised."""

    def __init__(
        self,
        address: str | None,
        timeout_s: float,
        framework: arrays.Framework,
        on_error: OnError,
        decode: Decode,
        *,
        shared_memory: bool,
        driver: Driver | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be over 0, got {timeout_s!r}")
        if on_error not in ("miss", "raise"):
            raise ValueError(f"on_error is miss or raise, got {on_error!r}")
        if decode not in DECODES:
            raise ValueError(f"decode is one of {', '.join(DECODES)}, got {decode!r}")
        arrays.resolve_framework(framework)
        self._decode = decode
        self._framework = framework
        self._resolved_for: tuple[bool | None, tuple[str, tuple[str, ...]]] = (None, ("", ()))
        self._on_error = on_error
        self._transport = self._transport_to(address or default_address(), timeout_s)
        path = socket_path(self._transport.target)
        self.transfers = Transfers(driver)
        # With a token too: the daemon hangs up on users its tokens file does not name, and the stream is taken.
        self._pool = self._pool_at(lease_path(path), timeout_s) if shared_memory and path is not None else None
        self.answers_tails = self._pool is not None
        """`lease_many` may say which of the tails is held: a `Namespace` asks for them with the whole chunks."""
        if self._pool is not None:
            self._pool.transfers = self.transfers
            self._transport.on_fork = self._pool.start_afresh
        else:
            self._transport.on_fork = self.transfers.forget
        self.failures = 0
        self._epoch = 0  # the last one seen

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
            reply_message = self._through_shared_memory(ConnectionPool.ask, pb.LeaseCall(**{name: request}))
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
        if reply.boot_epoch != self._epoch:
            self._saw_epoch(reply.boot_epoch)
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

    def _sent(self, batch: list[Outgoing], read: Callable[[int], T]) -> T:
        return read(self._data(self._send, 0, batch) if batch else 0)

    def _received(
        self, keys: Sequence[bytes], read: Callable[[list[Hit | None]], T], *, leading: bool = False, out: Out = None,
        lookup: Lookup | None = None, packed: bool = False,
    ) -> T:  # fmt: skip
        """Read the hits by position. out: for each key tensors to fill, or None."""
        hits: list[Hit | None] = [None] * len(keys)
        if keys:
            self._data(self._read, None, hits, keys, leading=leading, out=out, lookup=lookup, packed=packed)
        return read(hits)

    def _emptied(self, spec: TensorInfo, framework: str) -> Any:
        try:
            return self._through_shared_memory(puts.empty, spec, framework)
        except (UseStream, *SOFT):
            return arrays.from_bytes(spec, np.empty(arrays.check_specs({"x": spec}), dtype=np.uint8), framework)

    def _streamed(self, verb: str, request: Request | None, read: Callable[[bytes], Sequence[T]]) -> Iterator[T]:
        if request is not None:
            with closing(self._transport.stream_in(ADMIN + verb, request)) as messages:
                for message in messages:
                    yield from read(message)

    def _health(self) -> bool:
        return self._transport.health()

    def _send(self, batch: list[Outgoing]) -> int:
        try:
            stored, epoch, commits = self._through_shared_memory(puts.put, batch)
        except UseStream:
            return self._send_stream(batch)
        if commits > 1:
            self._touch([entry.key for entry in batch])  # as one batch: the root ends most recently used
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        return self._at_most(len(batch), stored)

    def _send_stream(self, batch: list[Outgoing]) -> int:
        tensors = [entry.tensors for entry in batch]
        before = self.transfers.before(tensors) if _on_gpu(tensors) else None
        if before is not None:
            before()  # gRPC reads the tensors in a thread of its own
        return self._stored(len(batch), self._transport.put(batch))

    def _stored(self, asked: int, answer: bytes) -> int:
        reply = self._noted(self._understood(pb.PutReply.FromString, answer))
        return self._at_most(asked, int(reply.stored))

    def _how_to_read(
        self, keys: Sequence[bytes], *, leading: bool, lookup: Lookup | None, packed: bool, device: bytes
    ) -> tuple[GetOptions, str]:
        """The options of a get, and the framework of what it returns. packed: all that travels is to come encoded."""
        framework, accept = self._resolved()
        from_nbytes = SHM_FROM_NBYTES if accept and self._decode == "auto" and self._pool else 0
        if packed:
            accept, from_nbytes = ENCODINGS, 0
        if lookup is None and leading and len(keys) > KEYS_PER_PACKET:
            lookup = Lookup(len(keys))  # what lies behind the first miss is in no packet
        return _how_to_get(leading, accept, from_nbytes, lookup, device), framework

    def _read(
        self,
        hits: list[Hit | None],
        keys: Sequence[bytes],
        *,
        leading: bool,
        out: Out,
        lookup: Lookup | None,
        packed: bool,
    ) -> None:
        on_gpu = out is not None and self.transfers.serves(out)
        there = on_gpu and self._unpacks(out)
        device = self._there(out) if on_gpu else b""
        how, framework = self._how_to_read(keys, leading=leading, lookup=lookup, packed=packed or there, device=device)
        try:
            hits[:], stale, epoch = self._through_shared_memory(gets.get, keys, how, framework, out, packed, on_gpu)
        except UseStream:
            request = how.request(keys)
            Receiver(keys, framework, out, hits, packed=packed, fill=self._fill_now if there else None).read_from(
                self._transport, request
            )
            return
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        if stale:
            self.failures += stale

    def _resolved(self) -> tuple[str, tuple[str, ...]]:
        """The framework of what is returned, and the encodings to ask for: both change when torch is imported."""
        torch_there = "torch" in sys.modules
        known, resolved = self._resolved_for
        if known is not torch_there:
            resolved = arrays.resolve_framework(self._framework), accepted(self._decode)
            self._resolved_for = torch_there, resolved
        return resolved

    def _lease(self, keys: Sequence[bytes], asked: Wanted) -> Sequence[Hit | None]:
        return self._data(self._leased, (), keys, asked)

    def _leased(self, keys: Sequence[bytes], asked: Wanted) -> Sequence[Hit | None]:
        how, framework = self._how_leased(asked)
        try:
            return self._through_shared_memory(leases.lease, keys, how, framework, asked.tails)
        except UseStream:
            request = self._how_streamed(asked).request(keys)
            receiver = Receiver(keys, framework, packed=asked.packed)
            receiver.read_from(self._transport, request)
            return leading_hits(receiver.hits) if asked.leading else receiver.hits

    def _how_leased(self, asked: Wanted) -> tuple[GetOptions, str]:
        """The options of a lease, and the framework of what is leased."""
        leading, lookup, packed, device, _ = asked
        return _how_to_get(leading, ENCODINGS if packed else (), 0, lookup, device), self._resolved()[0]

    def _how_streamed(self, asked: Wanted) -> GetOptions:
        """The same where it is copied over the stream."""
        return _how_to_get(asked.leading, ENCODINGS if asked.packed else self._resolved()[1], 0, asked.lookup)

    def how_to_lease(self, out: Out) -> dict[str, Any]:
        """How `lease_many` is best asked for what is to fill these tensors: see `fill`.

        To tensors on GPUs what is held encoded best comes as it is held, and what is held in their GPU's memory as
        tensors there.
        """
        how: dict[str, Any] = {"packed": True} if self._unpacks(out) else {}
        device = self._there(out)
        return {**how, "device": device} if device else how

    def _unpacks(self, out: Out) -> bool:
        return out is not None and self._decode != "daemon" and self.transfers.unpacks(out)

    def _there(self, out: Out) -> bytes:
        return b"" if out is None or self._pool is None else self.transfers.there(out)

    def fill(self, pairs: list[tuple[Any, Any]]) -> None:
        """Copy (target, source) pairs, sources that this client has leased: those to a GPU all at once.

        Packed sources are decoded: to a GPU, there. Raises RecordCorrupt for one that cannot be.
        """
        self._fill_now(pairs)

    def _fill_now(self, pairs: Sequence[tuple[Any, Any]], batch: Batch | None = None) -> None:
        left = self.transfers.fill(pairs, batch or self._fill_batch(pairs), self._segment_at)
        try:
            for target, source in left:
                dense = unpacked(source)
                if isinstance(target, Paged):
                    target.write(dense)
                else:
                    arrays.copy_into(target, dense)
            for target, source in left:  # torch copies within a GPU when its stream comes to it
                if isinstance(target, Paged) or getattr(source, "is_cuda", False):
                    settle_stream(target.device)
        except CodecError as error:
            raise RecordCorrupt(f"what {self.address} sent cannot be decoded: {error}") from None

    def _fill_batch(self, pairs: Sequence[tuple[Any, Any]]) -> Batch | None:
        return self.transfers.batch_for({"": target} for target, _ in pairs)

    def _segment_at(self, address: int) -> Any:
        return None if self._pool is None else self._pool.segments.at(address)

    def _touch(self, keys: Sequence[bytes], ttl_s: float | None = None) -> int:
        request = pb.TouchRequest(keys=keys, ttl_s=0.0 if ttl_s is None else PutOptions(ttl_s).ttl_s)
        return self._asked("Touch", request, pb.TouchReply, lambda reply: self._at_most(len(keys), reply.touched), 0)

    def _places(self, keys: int, reply: pb.MatchReply) -> list[Held | None]:
        """Where each of so many keys is held; of a match, those that are. An answer may have nothing to say of any."""
        self._at_most(keys, len(reply.held))
        return read_places(reply.held) or [None] * keys


def _on_gpu(out: Out) -> bool:
    """Whether any of these tensors is on a GPU."""
    for tensors in out or ():
        if isinstance(tensors, Mapping):
            for x in tensors.values():
                if getattr(x, "is_cuda", False):
                    return True
    return False
