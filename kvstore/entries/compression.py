"""Compression of a record's data section: zstd, if a sample shows that it saves enough.

Level 1 without long distance: higher levels take two to ten times as long and save no more, negative ones save nothing
(docs/decisions/0006-zstd.md). Floats are grouped by byte first (all lowest bytes, then the next, ...): exponents
repeat, mantissas do not. Decompression is bounded before it starts: python-zstandard ignores `max_output_size` when a
frame states its size, so the size is read and compared first. Pure, any thread.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import zstandard

from kvstore.errors import RecordCorrupt

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

LEVEL = 1
SAMPLE_NBYTES = 64 << 10
SAMPLES = 4
COMPRESS_MIN_NBYTES = 4 << 10
"""A record within one disk block takes the whole block, compressed or not."""
GAIN_MIN = 0.15
"""Share of the bytes to save at least: below it decompression takes longer than the disk would."""
WINDOW_MAX_NBYTES = 8 << 20


class Compression(IntEnum):
    """How the data section is stored. Written in records: do not renumber."""

    NONE = 0
    ZSTD = 1
    ZSTD_SHUFFLE_2 = 2
    ZSTD_SHUFFLE_4 = 3


_SHUFFLE = {Compression.ZSTD: 1, Compression.ZSTD_SHUFFLE_2: 2, Compression.ZSTD_SHUFFLE_4: 4}
_LOCAL = threading.local()


def compress(
    chunks: Sequence[Bytes], itemsize: int, how: Compression | None = None
) -> tuple[Compression, Sequence[Bytes]]:
    """The data section as it should be stored: `chunks` themselves, or one frame.

    itemsize: bytes of the elements that most of the data is made of; 1 for codes, which are not tried.
    how: the method; None: decide by a sample.
    """
    chosen = _choose(chunks, itemsize) if how is None else how
    if chosen is Compression.NONE:
        return chosen, chunks
    data = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    frame = _compressor().compress(group_bytes(data, _SHUFFLE[chosen]).data)
    if how is None and len(frame) >= data.size:
        return Compression.NONE, chunks  # the samples were not typical: compression never makes a record larger
    return chosen, [np.frombuffer(frame, np.uint8)]


def decompress_into(out: Bytes, stored: Bytes, how: Compression) -> None:
    """Fill `out` from a frame of exactly its size. Raises RecordCorrupt, before allocating, for any other size."""
    try:
        frame = zstandard.get_frame_parameters(stored.data)
        if frame.content_size != out.size or frame.window_size > max(WINDOW_MAX_NBYTES, 2 * out.size):
            raise RecordCorrupt(f"zstd frame says {frame.content_size} bytes, the record {out.size}")
        raw = _decompressor().decompress(stored.data)
    except zstandard.ZstdError as error:
        raise RecordCorrupt(f"zstd: {error}") from None
    if len(raw) != out.size:
        raise RecordCorrupt(f"zstd frame gave {len(raw)} bytes, the record says {out.size}")
    ungroup_bytes(out, np.frombuffer(raw, np.uint8), _SHUFFLE[how])


def _choose(chunks: Sequence[Bytes], itemsize: int) -> Compression:
    """The method that saves at least GAIN_MIN on a few samples of the longest chunk."""
    longest = max(chunks, key=lambda chunk: chunk.size, default=None)
    if itemsize == 1 or longest is None or longest.size < COMPRESS_MIN_NBYTES:
        return Compression.NONE
    how = {2: Compression.ZSTD_SHUFFLE_2, 4: Compression.ZSTD_SHUFFLE_4}.get(itemsize, Compression.ZSTD)
    sample = _sample(longest)
    saved = 1 - len(_compressor().compress(group_bytes(sample, _SHUFFLE[how]).data)) / sample.size
    return how if saved >= GAIN_MIN else Compression.NONE


def _sample(data: Bytes) -> Bytes:
    if data.size <= SAMPLES * SAMPLE_NBYTES:
        return data
    step = (data.size - SAMPLE_NBYTES) // (SAMPLES - 1) // 16 * 16
    return np.concatenate([data[i * step : i * step + SAMPLE_NBYTES] for i in range(SAMPLES)])


def group_bytes(data: Bytes, width: int) -> Bytes:
    """Bytes grouped by their position in an element; an incomplete last element stays at the end."""
    if width == 1:
        return data
    whole = data.size // width * width
    planes = np.ascontiguousarray(data[:whole].reshape(-1, width).T).reshape(-1)
    return planes if whole == data.size else np.concatenate([planes, data[whole:]])


def ungroup_bytes(out: Bytes, data: Bytes, width: int) -> None:
    """Fill `out` with the bytes in their order before `group_bytes`."""
    whole = data.size // width * width
    if width == 1:
        np.copyto(out, data)
        return
    np.copyto(out[:whole].reshape(-1, width), data[:whole].reshape(width, -1).T)
    np.copyto(out[whole:], data[whole:])


def _compressor() -> zstandard.ZstdCompressor:
    """One per thread: contexts cost 100 us to make and are not thread-safe."""
    if not hasattr(_LOCAL, "compressor"):
        _LOCAL.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=True)
    compressor: zstandard.ZstdCompressor = _LOCAL.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_LOCAL, "decompressor"):
        _LOCAL.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    decompressor: zstandard.ZstdDecompressor = _LOCAL.decompressor
    return decompressor
