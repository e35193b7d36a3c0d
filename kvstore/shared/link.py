"""One connection to a Valkey or Redis server that never blocks: TCP, TLS, AUTH, then commands and their replies.

Each use of it is one exchange between two PINGs with numbers of their own. So a reply that was meant for an earlier
call, and one too many or too few, is seen; a connection whose replies were cut off is closed, never used again.
One thread at a time. Knows no cluster and no deadline (`exchange`).
"""

import errno
import os
import re
import secrets
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvstore.shared import Buffer
from kvstore.shared.addresses import Address, Place
from kvstore.shared.resp import INLINE_MAX_NBYTES, PENDING, Broken, Pending, Refusal, Replies, Reply, command

WINDOW_NBYTES = 13 << 18
"""Bytes of values asked for or sent and not yet answered, a connection: two chunks of 1.5 MiB, or one piece of a longer
value. A server handles what lies in its buffer in one turn: 22 MiB in pieces pipelined at once held Valkey for 22 ms,
one piece of 4 MiB at a time for 4.0, one of 2 MiB for 2.5 (bench/shared.py --part loop)."""
_BUFFERS_AT_ONCE = 256
_WAKE_NBYTES = 1 << 18
_TLS_RECORD_NBYTES = 1 << 14
_PING = b"*2\r\n$4\r\nPING\r\n$%d\r\n%b\r\n"
_DENIALS = ("NOAUTH", "WRONGPASS", "NOPERM")
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Denied(Exception):
    """The server does not accept who we are."""


@dataclass(frozen=True, slots=True)
class Login:
    """How connections are opened. No password: no AUTH. context: of TLS; None: plain TCP."""

    user: str = ""
    password: str = ""
    context: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"Login(user={self.user!r}, tls={self.context is not None})"


@dataclass(slots=True, eq=False)
class Op:
    """A command and its reply. name: what decides its slot. nbytes to nbytes_max: the length that a body may have.

    weight: the bytes of its value, either way. target: makes what a body is received into. reply: PENDING until it is
    there. usual: what its reply mostly is, whole, the body as a group: parsed in one step.
    """

    name: bytes
    buffers: list[Buffer]
    kinds: bytes
    nbytes: int = 0
    nbytes_max: int = 0
    weight: int = 0
    writes: bool = False
    target: Callable[[], memoryview] | None = None
    reply: Reply | Pending = PENDING
    hops: int = 0
    on_replica: bool = False
    usual: re.Pattern[bytes] | None = None


@dataclass(slots=True, eq=False)
class _Own(Op):
    """A command of the link itself, which has one right answer."""

    expected: bytes = b""


class Link:
    """A connection. replica: it asks to read from a server that is one. Raises OSError, Broken and Denied."""

    def __init__(self, address: Address, place: Place, login: Login, *, replica: bool) -> None:
        self.address, self.replica = address, replica
        self._login = login
        family, to = place
        self._socket: socket.socket = socket.socket(family, socket.SOCK_STREAM)
        self._state = "connecting"
        self._out: deque[memoryview] = deque()
        self._due: deque[Op] = deque()
        self._waiting: deque[Op] = deque()
        self._weight = 0
        self._wakes_at = 1
        self._token = 0
        self._salt: Final = secrets.token_hex(4).encode()
        self._wants_write = True
        try:
            self._socket.setblocking(False)
            # No SO_RCVBUF: it ends the kernel's own sizing, and where net.core.rmem_max is 208 KiB, as it mostly is, a
            # get of 1.5 MiB then takes 1.5 times as long.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            failed = self._socket.connect_ex(to)
            if failed not in (0, errno.EINPROGRESS):
                raise OSError(failed, os.strerror(failed))
        except BaseException:
            self._socket.close()
            raise
        self._replies = Replies(self._socket.recv_into)
        self._greet()

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    @property
    def events(self) -> int:
        """What to poll for."""
        return select.POLLIN | (select.POLLOUT if self._wants_write else 0)

    @property
    def received_nbytes(self) -> int:
        """Since it was opened."""
        return self._replies.nbytes

    @property
    def idle(self) -> bool:
        """Whether every command has its reply and nothing else has come."""
        return self.is_answered and self._replies.is_empty

    @property
    def is_answered(self) -> bool:
        """Whether every command has its reply."""
        return not (self._due or self._waiting or self._out)

    @property
    def is_amid_body(self) -> bool:
        """Whether a value is coming."""
        return self._replies.is_amid_body

    def is_usable(self) -> bool:
        """Whether it may be used again: the server has not closed it and has sent nothing unasked."""
        if not self.idle:
            return False
        try:
            self._replies.receive()
        except _WOULD_BLOCK:
            return True  # TLS may have taken a session ticket meanwhile
        except (OSError, Broken):
            pass
        return False

    def begin(self, ops: list[Op]) -> None:
        """Queue an exchange; `step` sends it."""
        self._waiting.append(self._ping())
        self._waiting.extend(ops)
        self._waiting.append(self._ping())
        self._wants_write = True

    def _ping(self) -> _Own:
        self._token += 1
        token = b"%b%d" % (self._salt, self._token)
        return _Own(b"", [_PING % (len(token), token)], b"$", len(token), len(token), expected=token)

    def step(self) -> None:
        """Send and receive what can be without waiting."""
        if self._state != "open":
            try:
                self._open()
            except _WOULD_BLOCK as wait:
                self._wants_write = isinstance(wait, ssl.SSLWantWriteError | BlockingIOError)
                return
        while True:
            self._send()
            if not self._receive():
                return

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _greet(self) -> None:
        """AUTH and READONLY go out in front of the first commands, in the same packet."""
        greeting = []
        if self._login.password:
            who = [self._login.user] if self._login.user else []
            greeting.append(command("AUTH", *who, self._login.password))
        if self.replica:
            greeting.append(command("READONLY"))
        self._waiting.extend(_Own(b"", buffers, b"+", expected=b"OK") for buffers in greeting)

    def _open(self) -> None:
        if self._state == "connecting":
            failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, os.strerror(failed))
            try:
                self._socket.getpeername()
            except OSError:
                raise BlockingIOError from None
            self._state = "shaking"
            if self._login.context is not None:
                self._socket = self._login.context.wrap_socket(
                    self._socket, server_hostname=self.address.host, do_handshake_on_connect=False
                )
                self._replies = Replies(self._socket.recv_into)
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.do_handshake()
        self._state = "open"

    def _send(self) -> None:
        while True:
            self._fill()
            self._wants_write = bool(self._out)
            if not self._out:
                return
            try:
                self._sent(self._write())
            except _WOULD_BLOCK as wait:
                self._wants_write = not isinstance(wait, ssl.SSLWantReadError)
                return

    def _fill(self) -> None:
        """Put on its way what the window has room for; small buffers are joined."""
        small: list[Buffer] = []
        waiting, due = self._waiting, self._due
        while waiting and (not self._weight or self._weight + waiting[0].weight <= WINDOW_NBYTES):
            op = waiting.popleft()
            self._weight += op.weight
            due.append(op)
            for buffer in op.buffers:
                if len(buffer) <= INLINE_MAX_NBYTES:
                    small.append(buffer)
                    continue
                if small:
                    self._out.append(memoryview(b"".join(small)))
                    small = []
                self._out.append(memoryview(buffer))
        if small:
            self._out.append(memoryview(b"".join(small)))

    def _write(self) -> int:
        if isinstance(self._socket, ssl.SSLSocket):
            few, nbytes = [], 0
            while self._out and nbytes + len(self._out[0]) <= _TLS_RECORD_NBYTES:
                few.append(self._out.popleft())
                nbytes += len(few[-1])
            if few:
                self._out.appendleft(memoryview(b"".join(few)))
            return self._socket.send(self._out[0])
        if len(self._out) == 1:
            return self._socket.send(self._out[0])
        return self._socket.sendmsg([self._out[at] for at in range(min(_BUFFERS_AT_ONCE, len(self._out)))])

    def _sent(self, nbytes: int) -> None:
        while nbytes and nbytes >= len(self._out[0]):
            nbytes -= len(self._out.popleft())
        if nbytes:
            self._out[0] = self._out[0][nbytes:]

    def _receive(self) -> bool:
        """Read until nothing is left. True: a reply has made room to send more."""
        freed = False
        while True:
            freed |= self._take_replies()
            if freed and self._waiting:
                return True
            if not self._due:
                return False
            try:
                self._replies.receive()
            except _WOULD_BLOCK:
                return False

    def wait_for_more(self) -> int:
        """What to poll for, which then waits for a good part of a body, not for each packet.

        Not with TLS, which may have taken a part of what is missing already.
        """
        wanted = max(1, min(self._replies.missing_nbytes, _WAKE_NBYTES))
        if wanted != self._wakes_at and self._login.context is None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            self._wakes_at = wanted
        return self.events

    def _take_replies(self) -> bool:
        freed, due = False, self._due
        while due:
            op = due[0]
            if op.usual is not None:
                for body in self._replies.usual(one.usual for one in due):
                    op = due.popleft()
                    self._weight -= op.weight
                    freed = True
                    op.reply = body
                if not due:
                    break
                op = due[0]
            reply = self._replies.next(op.kinds, op.nbytes, op.nbytes_max, op.target)
            if isinstance(reply, Pending):
                break
            due.popleft()
            self._weight -= op.weight
            freed = True
            op.reply = reply
            if isinstance(op, _Own):
                self._check(op, reply)
        return freed

    def _check(self, op: _Own, reply: Reply) -> None:
        if isinstance(reply, Refusal):
            if reply.code in _DENIALS or reply.text.startswith("ERR AUTH"):
                raise Denied(f"{self.address} does not accept the credentials: {reply.text}")
            raise Broken(f"{self.address}: {reply.text}")
        if reply != op.expected:
            raise Broken(f"{self.address} answers to another call")
