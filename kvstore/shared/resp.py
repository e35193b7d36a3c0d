r"""RESP2, the protocol of Valkey and Redis, for values of megabytes: a body is received into the memory that keeps it.

    command = "*" parts "\r\n" ("$" length "\r\n" bytes "\r\n")...
    reply   = "+" status | "-" error | ":" integer | "$" length bytes | "$-1"        each with "\r\n"

Each reply is awaited with the kinds and the length that it may have. One that differs, an array or any other type
breaks the connection (`Broken`): nothing is allocated on the word of a server, and after it no byte can be placed.
Not thread-safe: one connection. No I/O but the `recv_into` it is given; no time.
"""

import ctypes
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvstore.shared import Buffer

LINE_MAX_NBYTES = 4096
"""Of a status, an error or a length. Real ones are below 200 bytes."""
INLINE_MAX_NBYTES = 1024
"""A body up to this long (a head, a token) is taken from the line buffer, a longer one is received into its own."""
_BUFFER_NBYTES = 1 << 16
SKIP_MAX_NBYTES = 1 << 26
"""A body of another length than was asked for is read and dropped up to this; a longer one costs the connection."""

_DIGITS_MAX = len(str(1 << 63))

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_new_bytearray.restype = ctypes.py_object


def room(nbytes: int) -> bytearray:
    """A bytearray that is not cleared: `bytearray(n)` writes all of it once more."""
    made: bytearray = _new_bytearray(None, nbytes)
    return made


class Broken(Exception):
    """What came is not the reply that was due. The connection is of no further use."""


class Closed(Broken):
    """The stream ended. What came before is right."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error reply. code: its first word, as MOVED or NOPERM."""

    text: str

    @property
    def code(self) -> str:
        """Its first word."""
        return self.text.partition(" ")[0]


class Misfit:
    """A body of another length than was asked for: read to its end and dropped."""


Reply = bytes | bytearray | int | None | Refusal | Misfit
MISFIT: Final = Misfit()


class Pending:
    """No complete reply is there yet."""


PENDING: Final = Pending()


def command(*parts: bytes | str | int) -> list[Buffer]:
    """A command without large values, in one buffer."""
    out = [b"*%d" % len(parts)]
    for part in parts:
        word = part if isinstance(part, bytes) else str(part).encode()
        out += (b"$%d" % len(word), word)
    out.append(b"")
    return [b"\r\n".join(out)]


def chunked(parts: list[list[Buffer]]) -> list[Buffer]:
    """A command whose parts are buffers one behind the other; a large one is not copied."""
    out: list[Buffer] = []
    small = bytearray(b"*%d\r\n" % len(parts))
    for part in parts:
        small += b"$%d\r\n" % sum(len(buffer) for buffer in part)
        for buffer in part:
            if len(buffer) > INLINE_MAX_NBYTES:
                out += (small, buffer)
                small = bytearray()
            else:
                small += buffer
        small += b"\r\n"
    out.append(small)
    return out


class Replies:
    """Parses what one connection receives. recv_into: of a non-blocking socket; it raises BlockingIOError."""

    def __init__(self, recv_into: Callable[[memoryview], int]) -> None:
        self._recv_into = recv_into
        self._buffer = bytearray(_BUFFER_NBYTES)
        self._view = memoryview(self._buffer)
        self._low = self._high = 0
        self._body: bytearray | int = 0
        self._target = memoryview(b"")
        self._missing = 0
        self._skipping = False
        self._tail = False
        self.nbytes = 0
        """Received so far: whether there is progress."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come beyond the replies that were taken."""
        return self._low == self._high and not self._tail

    @property
    def missing_nbytes(self) -> int:
        """What is still to come of the body that is being received."""
        return self._missing

    @property
    def is_amid_body(self) -> bool:
        """Whether the beginning of a long body has come."""
        return self._tail

    def usual(self, kinds: Iterable[re.Pattern[bytes] | None]) -> list[bytes]:
        """The bodies of the next replies, as far as each is a whole one of its kind: its group. `next` the rest."""
        bodies: list[bytes] = []
        if self._tail:
            return bodies
        buffer, low, high = self._buffer, self._low, self._high
        for kind in kinds:
            found = kind.match(buffer, low, high) if kind is not None else None
            if found is None:
                break
            low = found.end()
            bodies.append(found[1] or b"")
        self._low = low
        return bodies

    def next(
        self, kinds: bytes, nbytes: int = 0, nbytes_max: int = 0, target: Callable[[], memoryview] | None = None
    ) -> Reply | Pending:
        """The next reply, or PENDING if more has to be received first. Raises Broken.

        kinds: of b"+:$" those that may come; an error may always. nbytes to nbytes_max: the length that a body may
        have. target: gives at least nbytes_max bytes that a body is received into; the reply is its length then.
        """
        if self._tail:
            return self._finish_body()
        end = self._buffer.find(b"\r\n", self._low, self._high)
        if end < 0:
            if self._high - self._low > LINE_MAX_NBYTES:
                raise Broken("a line without an end")
            return PENDING
        kind, line = self._buffer[self._low : self._low + 1], bytes(self._buffer[self._low + 1 : end])
        if len(line) > LINE_MAX_NBYTES:
            raise Broken("a line that is too long")
        if kind != b"-" and (not kind or kind not in kinds):
            raise Broken(f"a reply of type {bytes(kind)!r}, due was one of {kinds!r}")
        number = _integer(line) if kind in b":$" else 0
        if kind == b"$" and number != -1:
            return self._begin_body(number, end + 2, nbytes <= number <= nbytes_max, target)
        self._low = end + 2
        if kind == b"-":
            return Refusal(line.decode("ascii", "replace"))
        if kind == b"+":
            return line
        return number if kind == b":" else None

    def receive(self) -> None:
        """Read once. Raises BlockingIOError where there is nothing, Closed at the end of the stream, OSError."""
        if self._missing:
            got = self._recv_into(self._target[-self._missing :] if not self._skipping else self._scratch())
            self._missing -= got
        else:
            if self._low == self._high:
                self._low = self._high = 0
            elif self._high == _BUFFER_NBYTES:
                kept = self._high - self._low
                self._buffer[:kept] = self._buffer[self._low : self._high]
                self._low, self._high = 0, kept
            got = self._recv_into(self._view[self._high :])
            self._high += got
        if not got:
            raise Closed("the server closed the connection")
        self.nbytes += got

    def _scratch(self) -> memoryview:
        self._low = self._high = 0
        return self._view[: self._missing]

    def _begin_body(
        self,
        number: int,
        start: int,
        fits: bool,  # noqa: FBT001 - as worked out
        target: Callable[[], memoryview] | None,
    ) -> Reply | Pending:
        if number < 0 or (not fits and number > SKIP_MAX_NBYTES):
            raise Broken(f"a body of {number} bytes, which were not asked for")
        if number <= INLINE_MAX_NBYTES:
            if self._high - start < number + 2:
                return PENDING
            body = bytes(self._buffer[start : start + number])
            self._low = start + number
            self._end_of_body()
            if fits and target is not None:
                target()[:number] = body
                return number
            return body if fits else MISFIT
        have = min(number, self._high - start)
        self._skipping = not fits
        self._body = number
        if fits:
            if target is None:
                self._body = room(number)
                self._target = memoryview(self._body)
            else:
                self._target = target()[:number]
            self._target[:have] = self._view[start : start + have]
        self._low = start + have
        self._missing, self._tail = number - have, True
        return self._finish_body()

    def _finish_body(self) -> Reply | Pending:
        if self._missing or self._high - self._low < len(b"\r\n"):
            return PENDING
        self._end_of_body()
        body, self._body, self._target, self._tail = self._body, 0, memoryview(b""), False
        return MISFIT if self._skipping else body

    def _end_of_body(self) -> None:
        if self._buffer[self._low : self._low + 2] != b"\r\n":
            raise Broken("a body that does not end where its length says")
        self._low += 2


def _integer(line: bytes) -> int:
    digits = line if line.isdigit() else line.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > _DIGITS_MAX:
        raise Broken(f"not a number: {line[:40]!r}")
    return int(line)
