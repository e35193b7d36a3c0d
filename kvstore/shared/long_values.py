"""Values longer than a piece, cut: 22 MiB in one keep a server from all others for 12 ms, 4 MiB for 0.7.

    NAME            the first piece and, in 8 bytes, the length of the whole; what `heads` reads
    NAME:TAG:1...   the others; TAG is a digest of the first HEAD_NBYTES, so pieces of two uploads never meet

The first piece is stored last and removed first. Its length, a multiple of UNIT_NBYTES, is the length of all but the
last: hosts may differ in piece_nbytes. Pieces whose first is gone are never read, and expire. Pure: makes ops.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore.shared import HEAD_NBYTES, Buffer
from kvstore.shared.link import Op
from kvstore.shared.resp import chunked, command, room

UNIT_NBYTES = 1 << 16
TRAILER_NBYTES = 8
PIECES_AT_ONCE = 8
PIECES_MAX = 1 << 16
"""Of a value of 4 GiB in the shortest pieces."""
_HEAD_COMMAND = b"*4\r\n$8\r\nGETRANGE\r\n$%%d\r\n%%b\r\n$1\r\n0\r\n$2\r\n%d\r\n" % (HEAD_NBYTES - 1)
"""A lookup asks hundreds."""
HEAD_REPLY = re.compile(rb"\$(?:%d\r\n(.{%d})|0\r\n)\r\n" % (HEAD_NBYTES, HEAD_NBYTES), re.DOTALL)


def cut(buffers: Sequence[Buffer], piece_nbytes: int) -> list[list[Buffer]]:
    """The buffers of each piece, without a copy: all but the last have piece_nbytes.

    A value that is hardly longer than a piece is one: a first piece and its trailer are never longer than the whole.
    """
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    if sum(map(len, views)) <= piece_nbytes + TRAILER_NBYTES:
        return [list(views)]
    pieces: list[list[Buffer]] = [[]]
    free = piece_nbytes
    for view in views:
        rest = view
        while len(rest):
            if not free:
                pieces.append([])
                free = piece_nbytes
            pieces[-1].append(rest[:free])
            taken = len(pieces[-1][-1])
            rest, free = rest[taken:], free - taken
    return pieces


def piece_name(name: bytes, head: Buffer, n: int) -> bytes:
    """Of piece n >= 1 of the value with these first HEAD_NBYTES."""
    tag = hashlib.blake2b(head, digest_size=8).hexdigest()
    return b"%b:%b:%d" % (name, tag.encode(), n)


def may_be_long(nbytes: int) -> bool:
    """Whether what is so long may be a first piece."""
    return nbytes > UNIT_NBYTES and nbytes % UNIT_NBYTES == TRAILER_NBYTES


def _trailer(nbytes: int) -> bytes:
    return nbytes.to_bytes(TRAILER_NBYTES, "little")


class Whole:
    """Memory for a value, made when it begins to come: while a server looks for it, not before it is asked."""

    __slots__ = ("_nbytes", "value")

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.value: bytearray | None = None

    def __call__(self) -> memoryview:
        """Where it is received. A second server that is asked writes over what the first one has sent."""
        if self.value is None:
            self.value = room(self._nbytes)
        return memoryview(self.value)


def get_op(name: bytes, low: int, high: int, target: Callable[[], memoryview] | None, weight: int) -> Op:
    """A value of low to high bytes."""
    return Op(name, [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)], b"$", low, high, weight, target=target)


def set_op(name: bytes, value: Sequence[Buffer], how: Sequence[bytes | str | int]) -> Op:
    """The reply is b"OK", or None where NX finds it there."""
    options: list[list[Buffer]] = [[word if isinstance(word, bytes) else str(word).encode()] for word in how]
    nbytes = sum(len(buffer) for buffer in value)
    return Op(name, chunked([[b"SET"], [name], list(value), *options]), b"+$", weight=nbytes, writes=True)


def head_op(name: bytes) -> Op:
    """The first HEAD_NBYTES; b"" where there is nothing."""
    return Op(name, [_HEAD_COMMAND % (len(name), name)], b"$", 0, HEAD_NBYTES, usual=HEAD_REPLY)


def other_gets(first: Op, whole: bytearray | None) -> list[Op] | None:
    """What else a value consists of, once its first piece lies in `whole`. None: it cannot be this value's."""
    if whole is None:
        return None
    if first.reply == len(whole):
        return []
    if not isinstance(first.reply, int) or not may_be_long(first.reply):
        return None
    view = memoryview(whole)
    nbytes = first.reply - TRAILER_NBYTES
    if view[nbytes : first.reply] != _trailer(len(whole)):
        return None
    head = view[:HEAD_NBYTES]
    ops = []
    for n, start in enumerate(range(nbytes, len(whole), nbytes), start=1):
        part = view[start : start + nbytes]
        ops.append(get_op(piece_name(first.name, head, n), len(part), len(part), partial(_itself, part), len(part)))
    return ops


@dataclass(slots=True, eq=False)
class Upload:
    """A long value on its way. pieces: as `cut` made them."""

    name: bytes
    pieces: list[list[Buffer]]
    asked: list[Op] = field(default_factory=list)
    others: list[Op] = field(default_factory=list)

    @property
    def head(self) -> bytes:
        """Its first HEAD_NBYTES."""
        return b"".join(bytes(buffer) for buffer in _first(self.pieces[0], HEAD_NBYTES))

    def ask(self) -> list[Op]:
        """What tells whether another upload of it is there and whole: first its head and its length."""
        trailer = command("GETRANGE", self.name, -TRAILER_NBYTES, -1)
        self.asked = [
            head_op(self.name),
            Op(self.name, command("STRLEN", self.name), b":"),
            Op(self.name, trailer, b"$", 0, TRAILER_NBYTES),
        ]
        return self.asked

    def ask_others(self) -> list[Op]:
        """And then each of its other pieces."""
        head, length, trailer = (op.reply for op in self.asked)
        self.asked = []
        if isinstance(head, bytes) and isinstance(length, int) and isinstance(trailer, bytes) and may_be_long(length):
            nbytes, piece_nbytes = int.from_bytes(trailer, "little"), length - TRAILER_NBYTES
            names = [piece_name(self.name, head, n) for n in range(1, min(-(-nbytes // piece_nbytes), PIECES_MAX))]
            self.asked = [Op(name, command("EXISTS", name), b":") for name in names]
        return self.asked

    def first(self, how: Sequence[bytes | str | int]) -> Op:
        """What is sent last."""
        nbytes = sum(len(buffer) for piece in self.pieces for buffer in piece)
        return set_op(self.name, [*self.pieces[0], _trailer(nbytes)], how)

    def is_there(self) -> bool:
        """Whether all of that was found."""
        return bool(self.asked) and all(op.reply == 1 for op in self.asked)

    def send_others(self, ttl: Sequence[bytes | str | int]) -> list[Op]:
        """All pieces but the first."""
        head = self.head
        self.others = [set_op(piece_name(self.name, head, n), self.pieces[n], ttl) for n in range(1, len(self.pieces))]
        return self.others

    def is_sent(self) -> bool:
        """Whether they are stored."""
        return all(op.reply == b"OK" for op in self.others)


def unlink_rounds(name: bytes, head: bytes) -> Iterator[list[Op]]:
    """Ops that remove the other pieces of a value; the next are worth sending while each reply is 1."""
    for n in range(1, PIECES_MAX, PIECES_AT_ONCE):
        names = [piece_name(name, head, at) for at in range(n, n + PIECES_AT_ONCE)]
        yield [Op(piece, command("UNLINK", piece), b":", writes=True) for piece in names]


def _first(buffers: Sequence[Buffer], nbytes: int) -> Iterator[Buffer]:
    for buffer in buffers:
        yield buffer[:nbytes]
        nbytes -= min(nbytes, len(buffer))


def _itself(view: memoryview) -> memoryview:
    return view
