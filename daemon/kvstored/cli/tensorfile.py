"""safetensors files with numpy alone: the base install has neither torch nor the safetensors package.

Reading maps the file, so putting a large one needs no second copy in memory. Element types without a code in the
format (complex, some float8) are written as U8 with one more dimension, and their name is `kvstored.dtype.<tensor>` in
the file's metadata. `kvstore.entries.safetensors_header` parses the header: strictly, with a size limit.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kvstore import arrays
from kvstore.boundary import Blaming
from kvstore.dtypes import BY_NAME, FROM_SAFETENSORS
from kvstore.entries.safetensors_header import HEADER_MAX_NBYTES, Slot, open_regular, parse_header, write_header
from kvstore.errors import InvalidEntry, RecordCorrupt
from kvstore.hit import TensorInfo

_LENGTH_NBYTES = 8
_PIECE_NBYTES = 8 << 20
_DTYPE_FACT = "kvstored.dtype."

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, as read-only arrays over its mapped bytes. Raises InvalidEntry, OSError."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(_LENGTH_NBYTES), "little")
        if not 2 <= length <= HEADER_MAX_NBYTES:
            raise InvalidEntry(f"{path} is no safetensors file: its header says {length} bytes")
        file.seek(0)
        header = file.read(_LENGTH_NBYTES + length)
        nbytes = os.fstat(file.fileno()).st_size - len(header)
        try:
            slots, facts = parse_header(header, nbytes)
        except RecordCorrupt as error:
            raise InvalidEntry(f"{path} is no safetensors file kvstored takes: {error}") from None
        specs = {name: _spec(name, slot, facts) for name, slot in slots.items()}
        arrays.check_specs(specs)
        # Of the open file: another file may have its name by now.
        data: Bytes = (
            np.memmap(file, dtype=np.uint8, mode="r", offset=len(header), shape=(nbytes,))
            if nbytes
            else np.empty(0, np.uint8)
        )
    with Blaming(InvalidEntry, str(path)):
        return {
            name: arrays.from_bytes(spec, data[slots[name].begin : slots[name].end], "numpy")
            for name, spec in specs.items()
        }


def write_tensors(
    path: Path, tensors: Mapping[str, Any], facts: Mapping[str, str], moved: Callable[[int], None] | None = None
) -> int:
    """Write a file atomically. facts: its metadata. moved: called with bytes written. Returns the bytes."""
    slots: dict[str, Slot] = {}
    at = 0
    facts = dict(facts)
    for name, x in tensors.items():
        spec = arrays.describe(name, x)
        nbytes = arrays.check_specs({name: spec})
        kind = BY_NAME[spec.dtype]
        shape = spec.shape if kind.safetensors else (*spec.shape, kind.itemsize)
        if not kind.safetensors:
            facts[_DTYPE_FACT + name] = kind.name
        slots[name] = Slot(kind.safetensors or "U8", shape, at, at + nbytes)
        at += nbytes
    header = write_header(slots, facts)
    _write_whole(path, [header, *(piece for x in tensors.values() for piece in _pieces(x))], moved)
    return len(header) + at


def _spec(name: str, slot: Slot, facts: Mapping[str, str]) -> TensorInfo:
    told = facts.get(_DTYPE_FACT + name)
    if told is None:
        return TensorInfo(FROM_SAFETENSORS[slot.dtype].name, slot.shape)
    kind = BY_NAME.get(told)
    if kind is None or slot.dtype != "U8" or slot.shape[-1:] != (kind.itemsize,):
        raise InvalidEntry(f"tensor {name!r}: its bytes are no {told!r:.40}")
    return TensorInfo(kind.name, slot.shape[:-1])


def _pieces(x: Any) -> Iterator[Bytes]:
    data = arrays.as_bytes(x)
    for start in range(0, data.size, _PIECE_NBYTES):
        yield data[start : start + _PIECE_NBYTES]


def _write_whole(path: Path, pieces: list[Any], moved: Callable[[int], None] | None) -> None:
    # A temporary file, renamed when complete: an interrupted `get -o` leaves the old file or none. Its mode stays 0600,
    # mkstemp's: from tensors prompts can be recovered, and whoever wants to share the file may say so.
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
                if moved is not None:
                    moved(len(piece))
        Path(scratch).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(scratch).unlink()
        raise
