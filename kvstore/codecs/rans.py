"""rANS: small integers into nearly the fewest bits that their probabilities allow, and back.

The coder is the interleaved one of Giesen (2014): `lanes` states of 32 bits share one sequence of 16-bit words, and in
each step lane j codes symbol step * lanes + j. So a loop over lanes has no chain between its turns, in numpy or in
vectors. Probabilities are static: each row of symbols has a class, each class a table of 256 frequencies that sum to
4,096. Symbols are -127 to 127; -128 (`ESCAPE`) says that the value is stored elsewhere.

    stream := states words
    states := uint32[lanes]      the state of each lane where decoding begins
    words  := uint16[...]        in the order in which they are read: by step, then by lane

Decoding must end with every state at 65,536 and no word left over: a damaged stream seldom does. Pure, any thread.
"""

from functools import cached_property
from typing import Any

import numpy as np

from kvstore.errors import CodecError
from kvstore.kernels import host_kernel

BITS = 12
TOTAL = 1 << BITS
SYMBOLS = 256
ESCAPE = -128
LANES_MAX = 4096
SYMBOLS_A_LANE = 2048
"""Symbols that a lane codes at least: its state of 32 bits is then at most 1/64 bit of each."""
_LOW = 1 << 16
_NO_FREQUENCY = "rans: a symbol has no frequency in its class"

Array = np.ndarray[Any, np.dtype[Any]]


class Tables:
    """Frequencies of symbols by class. counts: uint16 (classes, 256), each row sums to 4,096; column 0 is `ESCAPE`."""

    def __init__(self, counts: Array) -> None:
        if (
            counts.dtype != np.uint16
            or counts.ndim != 2
            or counts.shape[1] != SYMBOLS
            or not 0 < len(counts) <= SYMBOLS
        ):
            raise CodecError(
                f"tables of frequencies are uint16 (1 to 256, {SYMBOLS}), not {counts.dtype} {counts.shape}"
            )
        if not bool((counts.sum(axis=1, dtype=np.int64) == TOTAL).all() & (counts[:, 0] > 0).all()):
            raise CodecError(f"a table's frequencies sum to {TOTAL}, and an escape has one")
        self.counts = np.ascontiguousarray(counts)
        ends = np.cumsum(counts, axis=1, dtype=np.int64)
        self.starts = np.ascontiguousarray((ends - counts).astype(np.uint16))

    @cached_property
    def slots(self) -> Array:
        """The symbol of each of the 4,096 slots of each class, as its column: uint8 (classes, 4096)."""
        columns = np.arange(SYMBOLS, dtype=np.uint8)
        return np.stack([np.repeat(columns, row) for row in self.counts])

    @cached_property
    def packed(self) -> Array:
        """Each slot for the kernel: its symbol, its frequency less 1, how far in it is. uint32 (classes, 4096)."""
        rows = np.arange(len(self.counts))[:, None]
        less = self.counts[rows, self.slots].astype(np.uint32) - 1
        inside = np.arange(TOTAL, dtype=np.uint32) - self.starts[rows, self.slots]
        return np.ascontiguousarray(self.slots | less << np.uint32(8) | inside << np.uint32(20))

    @cached_property
    def lengths(self) -> Array:
        """Bits of each symbol, float32 (classes, 256); infinity for a frequency of 0."""
        with np.errstate(divide="ignore"):
            found: Array = (BITS - np.log2(self.counts)).astype(np.float32)
        return found


def lanes_of(symbols: int) -> int:
    """How many lanes code so many symbols: a power of two."""
    return min(LANES_MAX, 1 << max(0, (symbols // SYMBOLS_A_LANE).bit_length() - 1))


def encode(symbols: Array, classes: Array, tables: Tables) -> bytes:
    """Rows of symbols int8 (rows, n) under their classes uint8 (rows,). Raises CodecError for one of frequency 0."""
    rows, width = symbols.shape
    kernel = host_kernel()
    if kernel is None:
        return _encoded(symbols, classes, tables)
    given = symbols.view(np.uint8) ^ 128, classes, tables.counts, tables.starts
    found = kernel.rans_encode(*given, lanes_of(rows * width))
    if found is None:
        raise CodecError(_NO_FREQUENCY)
    return found


def _encoded(symbols: Array, classes: Array, tables: Tables) -> bytes:
    """The reference, whose bytes the kernel writes."""
    rows, width = symbols.shape
    n = rows * width
    lanes = lanes_of(n)
    at = symbols.astype(np.int32) + (SYMBOLS // 2)
    at += classes.astype(np.int32)[:, None] * SYMBOLS
    flat = at.reshape(-1)
    counts, starts = tables.counts.reshape(-1)[flat], tables.starts.reshape(-1)[flat]
    if n and not int(counts.min()):
        raise CodecError(_NO_FREQUENCY)
    state = np.full(lanes, _LOW, np.uint64)
    words: list[Array] = []
    for first in range((n - 1) // lanes * lanes, -1, -lanes) if n else ():
        f = counts[first : first + lanes].astype(np.uint64)
        x = state[: f.size]
        full = x >= f << np.uint64(32 - BITS)
        words.append(x[full].astype("<u2"))
        np.right_shift(x, np.uint64(16), out=x, where=full)
        high, low = np.divmod(x, f)
        x[:] = (high << np.uint64(BITS)) + low + starts[first : first + lanes]
    return b"".join([state.astype("<u4").tobytes(), *(some.tobytes() for some in reversed(words))])


def decode(data: Array, rows: int, width: int, classes: Array, tables: Tables) -> Array:
    """Symbols int8 (rows, width) of a stream uint8 (nbytes,). classes: uint8 (rows,), of the tables'.

    Raises CodecError for a stream that `encode` did not write for so many symbols.
    """
    return (columns(data, rows, width, classes, tables) ^ np.uint8(128)).view(np.int8).reshape(rows, width)


def columns(data: Array, rows: int, width: int, classes: Array, tables: Tables) -> Array:
    """As `decode`, but symbols + 128, uint8 (rows * width,)."""
    kernel = host_kernel()
    if kernel is None:
        return _decoded(data, rows, width, classes, tables)
    found = kernel.rans_decode(data, (rows, max(width, 1)), classes, tables.packed, lanes_of(rows * width))
    if found is None:
        raise CodecError(f"rans: {data.size} bytes are no stream of {rows * width} symbols")
    return found


def _decoded(data: Array, rows: int, width: int, classes: Array, tables: Tables) -> Array:
    """The reference: symbols + 128, uint8 (rows * width,)."""
    n = rows * width
    lanes = lanes_of(n)
    if data.size < 4 * lanes or data.size % 2:
        raise CodecError(f"rans: {data.size} bytes for {n} symbols in {lanes} lanes")
    state = np.frombuffer(data[: 4 * lanes].tobytes(), "<u4").astype(np.uint32)
    words = np.frombuffer(data[4 * lanes :].tobytes(), "<u2").astype(np.uint32)
    out = np.empty(n, np.uint8)
    by_symbol = np.repeat(classes.astype(np.int32), width)
    slots, counts, starts = tables.slots.reshape(-1), tables.counts.reshape(-1), tables.starts.reshape(-1)
    read = 0
    for first in range(0, n, lanes):
        c = by_symbol[first : first + lanes]
        x = state[: c.size]
        slot = x & np.uint32(TOTAL - 1)
        column = slots[(c << BITS) | slot.astype(np.int32)]
        out[first : first + lanes] = column
        at = (c << 8) | column
        x[:] = counts[at] * (x >> np.uint32(BITS)) + slot - starts[at]
        wanting = np.flatnonzero(x < _LOW)
        if wanting.size:
            more = words[read : read + wanting.size]
            if more.size < wanting.size:
                raise CodecError(f"rans: the stream of {data.size} bytes ends before its {n} symbols do")
            x[wanting] = (x[wanting] << np.uint32(16)) | more
            read += wanting.size
    if read != words.size or not bool((state == _LOW).all()):
        raise CodecError(f"rans: the stream of {data.size} bytes is not one of {n} symbols")
    return out
