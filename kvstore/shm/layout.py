"""The layout of tensors in shared memory: one block per entry. No torch: clients use it too.

    block := generation (u64, little-endian) | unused to 64 bytes | tensor | padding to 64 | tensor | ...

A block's generation is unique within the daemon's life and is overwritten before the room is used again. So if the
generation is unchanged after a copy out of the block, the copy is of the requested entry.

In a device's memory the block is the same, but for its generation, which lies in a table in shared memory: there it can
be read after a copy without another one, and is written before the room is used again.

A segment, or its table, that the daemon has closed begins with CLOSED instead: no block will lie in it again, and
whoever still maps it keeps its pages from the system.
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from kvstore.dtypes import TensorSpec

ALIGN = 64
"""A cache line, and the alignment of the widest vector loads."""
HEADER_NBYTES = ALIGN
TABLE_SHIFT = 6
"""Of a segment in a device's memory generations lie in a table beside it: word n is that of a block from n * 64 on."""
CLOSED = (1 << 64) - 1
"""The first word of a closed segment. Generations count up from one."""


def aligned(nbytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-nbytes // ALIGN) * ALIGN


def table_nbytes(nbytes: int) -> int:
    """Of the table beside a segment of so many bytes: whole pages, of which those are there that were written to."""
    return -(-((nbytes >> TABLE_SHIFT) + 1) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def layout(specs: Mapping[str, TensorSpec]) -> tuple[Mapping[str, tuple[int, int]], int]:
    """(start, nbytes) of each tensor from its block's start, and the bytes of the whole block. Not to be changed."""
    return layout_of(tuple(specs.items()))


@lru_cache(maxsize=256)
def layout_of(specs: tuple[tuple[str, TensorSpec], ...]) -> tuple[Mapping[str, tuple[int, int]], int]:
    """`layout`, of the items of a mapping."""
    names, sizes = [name for name, _ in specs], [spec.nbytes for _, spec in specs]
    return dict(zip(names, spans(sizes), strict=True)), HEADER_NBYTES + sum(map(aligned, sizes))


def spans(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(start, nbytes) of tensors of these sizes, one behind the other, from their block's start."""
    at = HEADER_NBYTES
    for nbytes in sizes:
        yield at, nbytes
        at += -(-nbytes // ALIGN) * ALIGN
