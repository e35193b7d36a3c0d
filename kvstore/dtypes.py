"""The element types of tensors: one table for the engine, the records and the wire. And a tensor's spec.

It holds names, sizes and codes only, so that a client without torch can import it.
`wire` numbers are frozen: add, never renumber. A type whose `safetensors` code is None travels in a
record as U8 bytes, with its real type in the record's metadata.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. name: as torch and ml_dtypes spell it; itemsize in bytes."""

    name: str
    itemsize: int
    wire: int
    safetensors: str | None


DTypeName = Literal[
    "float32", "float16", "bfloat16", "float64", "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex64",
    "complex128",
]  # fmt: skip
"""The names of all of them, for type checkers."""

_ALL = (
    DType("float32", 4, 1, "F32"),
    DType("float16", 2, 2, "F16"),
    DType("bfloat16", 2, 3, "BF16"),
    DType("float64", 8, 4, "F64"),
    DType("bool", 1, 5, "BOOL"),
    DType("uint8", 1, 6, "U8"),
    DType("int8", 1, 7, "I8"),
    DType("int16", 2, 8, "I16"),
    DType("uint16", 2, 9, "U16"),
    DType("int32", 4, 10, "I32"),
    DType("uint32", 4, 11, "U32"),
    DType("int64", 8, 12, "I64"),
    DType("uint64", 8, 13, "U64"),
    DType("float8_e4m3fn", 1, 14, "F8_E4M3"),
    DType("float8_e5m2", 1, 15, "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, 16, None),
    DType("float8_e5m2fnuz", 1, 17, None),
    DType("float8_e8m0fnu", 1, 18, None),
    DType("complex64", 8, 19, None),
    DType("complex128", 16, 20, None),
)

BY_NAME = {d.name: d for d in _ALL}
BY_WIRE = {d.wire: d for d in _ALL}
BY_SAFETENSORS = {d.safetensors: d for d in _ALL if d.safetensors}

FROM_SAFETENSORS = BY_SAFETENSORS | {
    code: BY_NAME[name]
    for code, name in {
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "C64": "complex64",
    }.items()
}
"""Codes that a file may have: safetensors has added codes since records of version 1 were frozen. They are read but
never written, because an older version of kvstored would refuse the file."""

LOSSY_ALLOWED = frozenset({"float32", "float16", "bfloat16"})
"""Types that a lossy codec may encode. float64 is not KV data: its bits are kept."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's element type (a name in `BY_NAME`) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense, row-major tensor."""
        return prod(self.shape) * BY_NAME[self.dtype].itemsize
