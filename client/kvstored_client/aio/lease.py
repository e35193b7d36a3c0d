"""The lease socket under an event loop: connections whose answers the loop waits for, and a pool of them.

The exchange is that of `shm.connection` and `shm.pool`; here is only the waiting. A call that is cancelled while its
answer is due leaves the connection to a task that takes the answer and gives its lease back; until then the connection
serves no other call. Not thread-safe: one event loop at a time.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvstore.errors import KvstoreError
from kvstored_client.aio.worker import Worker
from kvstored_client.shm.connection import ASK_AGAIN_MAX, GREETING, Connection, MoreSegments
from kvstored_client.shm.ingest import Room
from kvstored_client.shm.pool import CONNECTIONS_MAX, ConnectionPool, Silent, UseStream
from kvstored_client.stream.transport import inherited
from kvstored_client.wire._pb import cache_pb2 as pb

CONNECT_AGAIN_S = 0.01
"""A daemon whose queue of new connections is full is tried again after so long."""


async def ready(sock: socket.socket, timeout_s: float, *, to_write: bool = False) -> bool:
    """Whether a socket can be read from (or written to) within a time."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[bool] = loop.create_future()

    def tell(answer: bool) -> None:  # noqa: FBT001 - a callback's argument
        if not found.done():
            found.set_result(answer)

    add: Callable[..., Any] = loop.add_writer if to_write else loop.add_reader
    add(sock, tell, True)
    late = loop.call_later(timeout_s, tell, False)
    try:
        return await found
    finally:
        late.cancel()
        if sock.fileno() >= 0:
            (loop.remove_writer if to_write else loop.remove_reader)(sock)


class LoopConnection(Connection):
    """One lease socket. due: the number of the call whose answer has not come, 0 for none.

    sending: what a put that is under way has filled. The daemon reads it until it answers, whoever waits for that.
    """

    due = 0
    _hung_up = False
    sending: Room | None = None

    def hang_up(self) -> None:
        """As of any connection; one that is being made is made no more."""
        self._hung_up = True
        super().hang_up()

    async def connect(self, path: Path, timeout_s: float) -> int:
        """As `open`."""
        sock, place = self._prepare(path, timeout_s)
        until = asyncio.get_running_loop().time() + timeout_s
        sock.setblocking(False)
        while True:
            try:
                sock.connect(str(path))
                break
            except BlockingIOError:
                if self._hung_up:
                    raise UseStream("this client is closed") from None
                if asyncio.get_running_loop().time() >= until:
                    raise Silent(f"took no connection within {timeout_s} s") from None
                await asyncio.sleep(CONNECT_AGAIN_S)
        sock.setblocking(True)  # for releases, which a thread of their own sends
        self._connected(place)
        return self._greeted(await self.ask(GREETING.SerializeToString(), timeout_s))

    async def ask(self, data: bytes, timeout_s: float) -> pb.LeaseReply:
        """As `exchange`."""
        for _ in range(ASK_AGAIN_MAX):
            try:
                return await self._ask(data, timeout_s)
            except MoreSegments:
                continue
        raise UseStream(f"{ASK_AGAIN_MAX} packets brought segments and no answer")

    async def _ask(self, data: bytes, timeout_s: float) -> pb.LeaseReply:
        packet, number = self._packet(data)
        try:
            await self._send_packet(packet, timeout_s)
        except asyncio.CancelledError:
            self.abandon()  # its releases went with the packet
            raise
        self.due = number
        return await self.answer(timeout_s)

    async def _send_packet(self, packet: bytes, timeout_s: float) -> None:
        sock = self._sock
        assert sock is not None
        while True:
            try:
                sock.send(packet, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if await ready(sock, timeout_s, to_write=True):
                    continue
                self.abandon()
                raise Silent(f"took no call within {timeout_s} s") from None
            except OSError as error:
                self.abandon()
                raise UseStream(str(error)) from None
            return

    async def answer(self, timeout_s: float) -> pb.LeaseReply:
        """The answer that is due. Raises as `exchange`."""
        sock = self._sock
        assert sock is not None
        while True:
            try:
                self._take_packet()
                break
            except BlockingIOError:
                if not await ready(sock, timeout_s):
                    self.abandon()
                    raise Silent(f"no answer within {timeout_s} s") from None
            except OSError as error:
                self.abandon()
                raise UseStream(str(error)) from None
        number, self.due = self.due, 0
        reply = self._read(number)
        self.uncopied, self.sending = self.sending, None
        return reply

    async def find(self, nbytes: int, timeout_s: float) -> Room:
        """As `room`."""
        spare = self.spare_room(nbytes)
        if spare is not None:
            return spare
        plan = self.find_room(nbytes)
        try:
            asked = next(plan)
            while True:
                try:
                    await self.ask(asked.SerializeToString(), timeout_s)
                except UseStream as error:
                    asked = plan.throw(error)
                else:
                    asked = next(plan)
        except StopIteration as found:
            return found.value  # type: ignore[no-any-return]


class LoopPool(ConnectionPool):
    """Connections to one daemon's lease socket, made as needed; a call that finds none waits for its turn."""

    worker: Worker
    """For what would hold the loop."""
    _waiting: deque[asyncio.Future[None]]
    _opening: set[LoopConnection]
    _draining: set[asyncio.Task[None]]

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._draining = set()
        super().__init__(path, timeout_s)

    def start_afresh(self) -> None:
        """As in the pool, with a thread of its own."""
        super().start_afresh()
        if self._draining:
            inherited.append(self._draining)  # tasks of a loop that this process does not run
        self.worker = Worker()
        self._waiting = deque()
        self._opening = set()
        self._draining = set()

    async def get(self, hand: list[Connection], wanted: Connection | None = None) -> LoopConnection:
        """As `take`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.timeout_s
        while not ((wanted is not None and self._take_wanted(hand, wanted)) or self._take_idle(hand)):
            wanted = None
            if len({*self.connections(), *self._opening}) < CONNECTIONS_MAX:
                await self._open(hand)
                break
            await self._turn(until - loop.time())
        connection = hand[-1]
        assert isinstance(connection, LoopConnection)
        return connection

    async def _turn(self, left_s: float) -> None:
        """Wait until a connection may be free. Raises Silent when the time is over."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max(left_s, 0)):
                await turn
        except TimeoutError:
            raise Silent(f"none of {CONNECTIONS_MAX} connections was free within {self.timeout_s} s") from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._tell()  # it was this one's turn: it is the next one's
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)

    def _tell(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def _open(self, hand: list[Connection]) -> None:
        self._check_connecting()
        connection = LoopConnection(self._releases)
        self._opening.add(connection)
        try:
            epoch = await connection.connect(self._path, self.timeout_s / 2)
        except (Silent, OSError, UseStream, KvstoreError) as error:
            raise self._not_connected(connection, error) from None
        except BaseException:
            connection.abandon()
            raise
        finally:
            self._opening.discard(connection)
            self._tell()
        if self._closed:
            connection.abandon()
            raise UseStream("this client is closed")
        hand.append(connection)
        self._connected(connection, epoch)

    def put_back(self, hand: list[Connection]) -> None:
        """As in the pool; of a call that was cancelled the answer is still taken, and its lease given back."""
        for connection in list(hand):
            if isinstance(connection, LoopConnection) and connection.due and not connection.closed:
                hand.remove(connection)
                try:
                    task = asyncio.get_running_loop().create_task(self._drain(connection))
                except RuntimeError:  # no loop any more
                    connection.abandon()
                    continue
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)
        super().put_back(hand)
        self._tell()

    async def _drain(self, connection: LoopConnection) -> None:
        hand: list[Connection] = [connection]
        try:
            reply = await connection.answer(self.timeout_s)
            connection.give_back(reply.lease)
        except (Silent, UseStream, KvstoreError):
            pass  # abandoned where it is, and settled where the daemon has named an error
        except asyncio.CancelledError:
            connection.abandon()
            raise
        finally:
            super().put_back(hand)
            self._tell()

    def close(self) -> None:
        """End all connections. The loop's own are told by its next look at them."""
        super().close()
        self.worker.close()
        for connection in self._opening:
            connection.hang_up()
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    async def ended(self) -> None:
        """Return once no answer is waited for any more."""
        await asyncio.gather(*self._draining, return_exceptions=True)
