"""The compiled rANS coder through ctypes, without Python's lock. Same bytes as `codecs.rans`, some fifty times as fast.

None where the kernel is not installed or is older than this coder: then the reference does it.
Invariant: every length passed to C is that of the array that owns the memory. Any thread.
"""

import ctypes
from typing import Any

import numpy as np

from kvstore.errors import CodecError
from kvstore.kernels import cpu

Array = np.ndarray[Any, np.dtype[Any]]


def encode(symbols: Array, classes: Array, tables: tuple[Array, Array], lanes: int) -> bytes | None:
    """Symbols + 128, uint8 (rows, width), under classes uint8 (rows,). tables: counts and starts, uint16 (n, 256).

    Raises CodecError for a symbol of frequency 0.
    """
    if not _there():
        return None
    (rows, width), (symbols, classes, *given) = symbols.shape, map(np.ascontiguousarray, (symbols, classes, *tables))
    out = np.empty(2 * rows * width + 4 * lanes, np.uint8)
    written = ctypes.c_int64()
    status = cpu.LIBRARY.kvk_rans_encode(  # type: ignore[union-attr]  # `_there` has looked
        symbols.ctypes.data, rows, max(width, 1), classes.ctypes.data, len(given[0]),
        *(table.ctypes.data for table in given), lanes, out.ctypes.data, ctypes.byref(written),
    )  # fmt: skip
    if status != cpu.OK:
        raise CodecError("rans: a symbol has no frequency in its class")
    return out[out.size - written.value :].tobytes()


def decode(
    data: Array, shape: tuple[int, int], classes: Array, tables: tuple[Array, Array, Array], lanes: int
) -> Array | None:
    """Symbols + 128, uint8 (rows * width,). tables: counts, starts, slots. Raises CodecError for what is no stream."""
    if not _there():
        return None
    data, classes, *given = map(np.ascontiguousarray, (data, classes, *tables))
    out = np.empty(shape[0] * shape[1], np.uint8)
    status = cpu.LIBRARY.kvk_rans_decode(  # type: ignore[union-attr]  # `_there` has looked
        data.ctypes.data, data.size, *shape, classes.ctypes.data, len(given[0]),
        *(table.ctypes.data for table in given), lanes, out.ctypes.data,
    )  # fmt: skip
    if status != cpu.OK:
        raise CodecError(f"rans: {data.size} bytes are no stream of {out.size} symbols")
    return out


def _there() -> bool:
    return hasattr(cpu.LIBRARY, "kvk_rans_decode")
