"""A tensor as a codec left it: what a caller gets, keeps and puts instead of its numbers. Light: imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, final

from kvstore.dtypes import TensorSpec
from kvstore.errors import InvalidEntry

ENCODINGS = ("nf4", "nf4-kv2", "nf4-kv", "int8")
"""Those that travel: a caller may get and put tensors in them, and decode them himself."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """One tensor in the parts that a codec made of it.

    spec: type and shape once decoded. encoding: one of `ENCODINGS`. parts: arrays by suffix, "" is the main one, of
    torch or numpy (docs/codecs.md says what they are). attrs: what else the codec needs, and the receipt.
    `kvstore.encode` makes them of tensors and `kvstore.decode` tensors of them.
    """

    spec: TensorSpec
    encoding: str
    parts: Mapping[str, Any]
    attrs: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(int(part.nbytes) for part in self.parts.values())

    @property
    def relative_error(self) -> float:
        """The receipt: |x - decoded| / |x| as measured when it was encoded; infinity where there is none."""
        measured = self.attrs.get("relative_error")
        if isinstance(measured, bool) or not isinstance(measured, int | float) or not measured >= 0:
            return inf
        return float(measured)

    def __repr__(self) -> str:
        shape = f"{self.spec.dtype} {tuple(self.spec.shape)}"
        told = f"{self.nbytes} bytes, relative_error={self.relative_error:.3g}"
        return f"PackedTensor({shape} as {self.encoding}, {told})"


def any_packed(tensors: Mapping[str, Any]) -> bool:
    """Whether one of them is packed."""
    return any(isinstance(x, PackedTensor) for x in tensors.values())


def arrays_in(tensors: Mapping[str, Any]) -> list[Any]:
    """All arrays of an entry, in order: a tensor, or the parts of a packed one."""
    found: list[Any] = []
    for x in tensors.values():
        found += x.parts.values() if isinstance(x, PackedTensor) else (x,)
    return found


def specs_of(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors of an entry once decoded, by name."""
    found = {}
    for name, x in tensors.items():
        spec = x.spec if isinstance(x, PackedTensor) else x
        found[name] = str(spec.dtype).removeprefix("torch."), tuple(spec.shape)
    return found


def refuse_both(out: object, *, packed: bool) -> None:
    """Raise InvalidEntry for a get that names tensors to fill and wants packed ones."""
    if packed and out is not None:
        raise InvalidEntry("packed tensors are not copied into out: decode them, or leave packed away")
