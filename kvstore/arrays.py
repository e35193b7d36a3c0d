"""Tensors in and out without choosing a library: torch tensors and numpy arrays, bfloat16 included.

Never imports torch: a tensor can only be handed in by a process that has imported it already, so
`sys.modules` is the place to ask. What is handed out follows `framework`: "torch", "numpy", or "auto", which is
torch where the process has imported it and numpy otherwise. numpy has no bfloat16 or float8 of its own: those
arrays carry the ml_dtypes types of the same names.
All bytes are dense, row-major and little-endian.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import ml_dtypes
import numpy as np

from kvstore.boundary import blamed
from kvstore.dtypes import BY_NAME, TensorSpec
from kvstore.errors import EntryTooLarge, InvalidEntry

Framework = Literal["auto", "torch", "numpy"]

TENSORS_MAX = 256
"""Attention needs 2, the largest hybrid models about 130 state tensors; 256 keeps a record's header under 64 KiB."""
RANK_MAX = 8
NAME_MAX_NBYTES = 64
ATTRS_MAX_NBYTES = 4 << 10
"""Of a tensor's attributes as JSON: codecs write 0.2 KiB, and `layers` 8 times as much."""
ENTRY_MAX_NBYTES = 4 << 30
"""A ceiling over all settings: sizes are added up in 64 bits long before, but nobody means 4 GiB under one key."""

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("kvstored stores little-endian bytes and runs on little-endian machines only")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name, None) or getattr(np, "bool_" if name == "bool" else name))
    for name in BY_NAME
}
_NUMPYS_OWN = frozenset(name for name in BY_NAME if not hasattr(ml_dtypes, name))
_NAME_OF_NUMPY = {dtype: name for name, dtype in _NUMPY.items()}
_NAME_OF_TORCH: dict[Any, str] = {}
"""Filled as dtypes come: torch may not be imported yet. Making the words of one takes longer than looking them up."""
_spec = lru_cache(maxsize=1024)(TensorSpec)
"""Chunks of one model are alike: one spec for them is not made again, and known at sight where it is compared."""


def _torch() -> Any:
    return sys.modules.get("torch")


def is_torch(x: object) -> bool:
    """Whether x is a torch tensor."""
    torch = _torch()
    return torch is not None and isinstance(x, torch.Tensor)


def resolve_framework(framework: str) -> str:
    """A `Framework` made definite: "torch" or "numpy"."""
    if framework == "auto":
        return "torch" if _torch() is not None else "numpy"
    if framework not in ("torch", "numpy"):
        raise InvalidEntry(f"framework must be auto, torch or numpy, got {framework!r}")
    return framework


def check_name(name: object) -> str:
    """A tensor's name. Raises InvalidEntry unless it is 1 to 64 bytes of printable text."""
    if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
        raise InvalidEntry(f"a tensor's name is printable text and not __metadata__, got {name!r:.80}")
    if not 1 <= len(name.encode()) <= NAME_MAX_NBYTES:
        raise InvalidEntry(f"a tensor's name has 1 to {NAME_MAX_NBYTES} bytes, got {len(name.encode())}")
    return name


def check_specs(specs: Mapping[str, TensorSpec], limit_nbytes: int = ENTRY_MAX_NBYTES) -> int:
    """Check names, dtypes, shapes and sizes before anything is allocated. Returns the bytes in all.

    Raises InvalidEntry, or EntryTooLarge over 256 tensors or `limit_nbytes`, with the value and the limit.
    """
    if not specs:
        raise InvalidEntry("an entry has at least 1 tensor, got 0")
    if len(specs) > TENSORS_MAX:
        raise EntryTooLarge(f"an entry has at most {TENSORS_MAX} tensors, got {len(specs)}")
    total = 0
    for name, spec in specs.items():
        check_name(name)
        if spec.dtype not in BY_NAME:
            raise InvalidEntry(f"tensor {name!r}: unknown dtype {spec.dtype!r:.40}")
        if len(spec.shape) > RANK_MAX:
            raise InvalidEntry(f"tensor {name!r}: at most {RANK_MAX} dimensions, got {len(spec.shape)}")
        # Each dimension, not only the product: a zero beside 2**62 makes the product harmless and the shape not.
        bad = next((d for d in spec.shape if not 0 <= d <= ENTRY_MAX_NBYTES), None)
        if bad is not None:
            raise InvalidEntry(f"tensor {name!r}: a dimension is 0 to {ENTRY_MAX_NBYTES}, got {bad}")
        total += spec.nbytes
        if total > limit_nbytes:
            raise EntryTooLarge(f"an entry has at most {limit_nbytes} bytes, got {total} by tensor {name!r}")
    return total


class CheckedSpecs(dict[str, TensorSpec]):
    """The specs of an entry's tensors, checked when made: whoever is given one does not check again.

    Raises as `check_specs`. nbytes: of all tensors. Not to be changed.
    """

    __slots__ = ("nbytes",)

    def __init__(self, specs: Mapping[str, TensorSpec], limit_nbytes: int = ENTRY_MAX_NBYTES) -> None:
        super().__init__(specs)
        self.nbytes = check_specs(self, limit_nbytes)


def describe(name: str, x: object) -> TensorSpec:
    """Dtype and shape of a torch tensor or numpy array. Raises InvalidEntry for anything else.

    Refused are tensors on the meta device, fake, sparse, quantized and nested ones, and masked arrays.
    """
    try:
        return _described(name, x)
    except Exception as error:  # noqa: BLE001 - a subclass may answer anything, and raise anything
        raise blamed(error, InvalidEntry, "tensor") from None


def describe_all(tensors: Mapping[str, object]) -> tuple[tuple[str, TensorSpec], ...]:
    """(name, dtype and shape) of each tensor, as `describe`."""
    try:
        return tuple([(name, _described(name, x)) for name, x in tensors.items()])
    except Exception as error:  # noqa: BLE001 - the boundary, as above
        raise blamed(error, InvalidEntry, "tensor") from None


def _described(name: str, x: object) -> TensorSpec:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.layout is not torch.strided or x.is_quantized or x.is_nested:
            raise InvalidEntry(f"tensor {name!r}: only dense tensors can be stored, got {x.layout}")
        # A subclass that answers operations itself (FakeTensor, DTensor) is no memory of these numbers.
        own = type(x) is not torch.Tensor and type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if x.is_meta or own:
            raise InvalidEntry(f"tensor {name!r}: {type(x).__name__} on {x.device} holds no numbers here")
        dtype = _NAME_OF_TORCH.get(x.dtype) or _NAME_OF_TORCH.setdefault(x.dtype, str(x.dtype).removeprefix("torch."))
        shape = tuple(x.shape)
    elif isinstance(x, np.ma.MaskedArray):
        raise InvalidEntry(f"tensor {name!r}: a masked array's mask cannot be stored; fill it")
    elif isinstance(x, np.ndarray):
        found = _NAME_OF_NUMPY.get(x.dtype)  # asked of every tensor: a dtype in another order takes 3 us to make
        dtype = found or _NAME_OF_NUMPY.get(x.dtype.newbyteorder("="), str(x.dtype))
        shape = x.shape
    else:
        raise InvalidEntry(f"tensor {name!r}: expected a torch tensor or a numpy array, got {type(x).__name__}")
    if dtype not in BY_NAME:
        raise InvalidEntry(f"tensor {name!r}: dtype {dtype} cannot be stored")
    return _spec(dtype, shape)


def as_bytes(x: Any) -> Bytes:
    """The bytes of a tensor or array that `describe` accepted, as a flat uint8 array.

    Shares memory with x where x is dense, on the CPU and little-endian; a copy otherwise. Raises InvalidEntry where the
    tensor has no memory after all: freed, or made inside a transformation of functions (`vmap`, `grad`).
    """
    try:
        return _bytes_of(x)
    except Exception as error:  # noqa: BLE001 - the boundary, as above
        raise blamed(error, InvalidEntry, "tensor") from None


def bytes_in_place(x: Any) -> Bytes | None:
    """`as_bytes` of what can be read and written as it lies; None for a tensor that is strided or on another device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor) and not (x.is_contiguous() and x.is_cpu):
        return None
    return as_bytes(x)


def check_storage(x: Any) -> None:
    """Raise InvalidEntry for a torch tensor whose memory was freed under it: reading it would end the process."""
    count = x.numel()
    if not count:
        return
    held_nbytes = x.untyped_storage().nbytes()
    reach = x.storage_offset() + count if x.is_contiguous() else _reach(x)
    if held_nbytes < reach * x.element_size():
        raise InvalidEntry(f"tensor of shape {tuple(x.shape)} has a storage of {held_nbytes} bytes")


def _reach(x: Any) -> int:
    """Elements of the storage up to and with the last one of x."""
    steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset() + sum(steps) + 1)


def _bytes_of(x: Any) -> Bytes:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if type(x) is not torch.Tensor:
            x = x.as_subclass(torch.Tensor)
        check_storage(x)
        if x.requires_grad or not x.is_cpu or x.is_conj() or x.is_neg() or not x.is_contiguous():
            x = x.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        if _NAME_OF_TORCH.get(x.dtype) in _NUMPYS_OWN:  # in half the time
            return x.numpy().reshape(-1).view(np.uint8)  # type: ignore[no-any-return]
        return x.reshape(-1).view(torch.uint8).numpy()  # type: ignore[no-any-return]
    if type(x) is not np.ndarray:
        x = np.asarray(x)  # a matrix stays two-dimensional whatever it is asked
    dense = x.flags.c_contiguous and x.dtype.isnative
    native = x if dense else np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    return native.reshape(-1).view(np.uint8)


def write_bytes(x: Any, data: Bytes, copy: Callable[[Bytes, Bytes], None] = np.copyto) -> None:
    """data[:] = the bytes of a tensor or array, as `as_bytes` has them; what is strided is copied only once.

    copy: for dense bytes, (target, source). Raises InvalidEntry as `as_bytes`, and for a tensor of another size.
    """
    try:
        dense = None if _strided_into(x, data) else _bytes_of(x)
    except Exception as error:  # noqa: BLE001 - the boundary, as above
        raise blamed(error, InvalidEntry, "tensor") from None
    if dense is not None:
        _check_size(dense.size, data.size)
        copy(data, dense)


def _strided_into(x: Any, data: Bytes) -> bool:
    """Fill `data` from a strided tensor in this process's memory; False: it is none."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if type(x) is not torch.Tensor or x.is_contiguous() or not x.is_cpu:
            return False
        check_storage(x)
        _check_size(x.nbytes, data.size)
        torch.frombuffer(data, dtype=x.dtype).resize_(x.shape).copy_(x.detach())
    else:
        if type(x) is not np.ndarray or x.flags.c_contiguous:
            return False
        _check_size(x.nbytes, data.size)
        np.copyto(data.view(x.dtype.newbyteorder("=")).reshape(x.shape), x)
    return True


def _check_size(nbytes: int, due_nbytes: int) -> None:
    if nbytes != due_nbytes:
        raise InvalidEntry(f"a tensor changed its size while it was put: {nbytes} bytes, not {due_nbytes}")


def from_bytes(spec: TensorSpec, data: Bytes, framework: str) -> Any:
    """A torch tensor or numpy array over `data` (flat uint8, just the right length), sharing its memory.

    One of torch's is a view of no other tensor: with its last reference it lets go of the memory.
    """
    if framework != "torch":
        return data.view(_NUMPY[spec.dtype]).reshape(spec.shape)
    torch = sys.modules.get("torch") or _import_torch()
    dtype = getattr(torch, spec.dtype)
    if data.size == 0:
        return torch.empty(spec.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=dtype).resize_(spec.shape)  # of as many elements: nothing moves


def _import_torch() -> Any:
    # Only for a caller who asked for torch by name and has not imported it yet.
    import torch

    return torch


def fresh(
    specs: Mapping[str, TensorSpec], sizes: Iterable[int], framework: str
) -> tuple[dict[str, Bytes], dict[str, Any]]:
    """(bytes to fill, the tensors over them) by name, in new memory. sizes: the bytes of each."""
    data = {name: np.empty(nbytes, dtype=np.uint8) for name, nbytes in zip(specs, sizes, strict=True)}
    return data, {name: from_bytes(spec, data[name], framework) for name, spec in specs.items()}


def copy_into(target: Any, source: Any) -> None:
    """target[...] = source, both of one shape and type; each may be a torch tensor or a numpy array, strided or not."""
    if is_torch(target):
        target.copy_(source if is_torch(source) else from_bytes(describe("", target), as_bytes(source), "torch"))
    elif is_torch(source):
        np.copyto(target, from_bytes(describe("", source), as_bytes(source), "numpy"))
    else:
        np.copyto(target, source)


def same_kind(x: Any, y: Any) -> bool:
    """Whether two arrays have one shape and one type, each of either framework."""
    return describe("", x) == describe("", y)


def joined(parts: list[Any], axis: int) -> Any:
    """A copy of the arrays, one behind the other along an axis."""
    whole = join(parts, axis)
    if whole is parts[0]:
        return whole.clone() if is_torch(whole) else whole.copy()
    return whole


def join(parts: list[Any], axis: int) -> Any:
    """The arrays one behind the other along an axis: the single array itself, or a copy."""
    if len(parts) == 1:
        return parts[0]
    if is_torch(parts[0]):
        return _torch().cat(parts, dim=axis)
    return np.concatenate(parts, axis=axis)
