"""Notices that a model's tensors have changed, and says what they hold.

A tensor's content is an XXH3-128 over its bytes, computed once and again only when it may have changed. It may have
changed where, at a call,
- it is another tensor, or its memory, type, shape, strides or torch's own count of writes (`_version`) is another;
- it has at most SMALL elements and any of them differs, or it has more and one of SAMPLES elements over it differs;
- one of its blocks differs from what it was: BUDGET_NBYTES of all blocks are read at each call, in turn.
The first two find a change at the next call. What torch does not count (writes through `.data`, in inference mode, by
another process) and what touches few elements of a large tensor is found by the third: at the next call in a model of
up to BUDGET_NBYTES, in a larger one after at most size / BUDGET_NBYTES calls.
Holds no tensor alive. Not thread-safe.
"""

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from kvstore import arrays

SMALL = 8192
"""Elements of a LoRA matrix of rank 8 in a model 1,024 wide. 120 such tensors are compared in 0.5 ms."""
SAMPLES = 16
"""Each is a miss of the processor's caches. A change of half of a tensor's elements is missed once in 65,536 times."""
BLOCK_NBYTES = 2 << 20
BUDGET_NBYTES = 4 << 20
"""About 0.5 ms with memory of 10 GB/s."""
LEAST_NBYTES = 64 << 10
"""What reading any block counts for at least: a call into torch and XXH3 costs as much as reading this."""

_JOINED = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
})  # fmt: skip
"""Types whose elements are compared at each call; others (float8, complex) are read in turn only."""

Plan = tuple[int, int]
"""How many elements of a tensor are compared at each call, and the distance between them in elements."""
Named = dict[int, torch.Tensor]
"""Tensors by their id()."""


class Unreadable(Exception):
    """A tensor whose bytes cannot be read: offloaded, sparse or of an unknown kind. The message says which."""


@dataclass(eq=False)
class _Record:
    """What is known of one tensor. blocks: their digests, None where not read yet. sample: bytes of some elements."""

    tensor: "weakref.ref[torch.Tensor]"
    stamp: tuple[Any, ...]
    plan: Plan
    sample: bytes
    blocks: list[str | None]
    content: str | None = None


class Weights:
    """The contents of a set of tensors, kept up to date at little cost."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._turn: list[tuple[int, int]] = []
        self._at = 0

    @torch.no_grad()
    def look(self, tensors: Named, *, read: bool = True) -> frozenset[int]:
        """The ids of those tensors that are new or may have changed since the last look. read: blocks in turn, too."""
        stamps = {key: _stamp(x) for key, x in tensors.items()}
        new = {key for key, stamp in stamps.items() if not self._is_known(key, tensors[key], stamp)}
        plans = {key: _plan(x) if key in new else self._records[key].plan for key, x in tensors.items()}
        samples = _samples(tensors, plans)
        found = new | {key for key in tensors.keys() - new if self._records[key].sample != samples[key]}
        if found or len(tensors) != len(self._records):
            kept = {key: record for key, record in self._records.items() if key in tensors}
            self._records = {**kept, **{key: _record(tensors[key], stamps[key], samples[key]) for key in found}}
            self._turn = [(key, i) for key, record in self._records.items() for i in range(len(record.blocks))]
            self._at = 0
        for key in self._read_in_turn(tensors) if read else ():
            self._records[key] = _record(tensors[key], stamps[key], samples[key])
            found.add(key)
        return frozenset(found)

    @torch.no_grad()
    def content(self, key: int, tensor: torch.Tensor) -> str:
        """A digest of the bytes of a tensor that was in the last look."""
        record = self._records[key]
        if record.content is None:
            data = _bytes(tensor)
            record.blocks = [known or _block(data, i) for i, known in enumerate(record.blocks)]
            record.content = str(xxhash.xxh3_128_hexdigest(";".join(map(str, record.blocks)).encode()))
        return record.content

    def _is_known(self, key: int, tensor: torch.Tensor, stamp: tuple[Any, ...]) -> bool:
        record = self._records.get(key)
        return record is not None and record.tensor() is tensor and record.stamp == stamp

    def _read_in_turn(self, tensors: Named) -> set[int]:
        """Read the next blocks. Returns the ids of tensors of which one is not what it was."""
        changed: set[int] = set()
        budget = BUDGET_NBYTES
        for _ in range(len(self._turn)):
            if budget <= 0:
                break
            key, i = self._turn[self._at]
            self._at = (self._at + 1) % len(self._turn)
            blocks, tensor = self._records[key].blocks, tensors[key]
            digest = _block(_bytes(tensor), i)
            if blocks[i] not in (None, digest):
                changed.add(key)
            blocks[i] = digest
            budget -= max(LEAST_NBYTES, min(BLOCK_NBYTES, tensor.numel() * tensor.element_size()))
        return changed


def check_readable(tensor: torch.Tensor, name: str) -> None:
    """Raises Unreadable where a tensor's bytes are not in memory, or not laid out by strides."""
    if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
        raise Unreadable(f"{name} is not in memory (offloaded)")
    if tensor.layout is not torch.strided:
        raise Unreadable(f"{name} is of the layout {tensor.layout}")


def _record(tensor: torch.Tensor, stamp: tuple[Any, ...], sample: bytes) -> _Record:
    blocks = max(1, -(-tensor.numel() * tensor.element_size() // BLOCK_NBYTES))
    return _Record(weakref.ref(tensor), stamp, _plan(tensor), sample, [None] * blocks)


def _stamp(tensor: torch.Tensor) -> tuple[Any, ...]:
    writes = None if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's name for the count of writes
    return (tensor.data_ptr(), writes, tensor.dtype, tensor.shape, tensor.stride())


def _plan(tensor: torch.Tensor) -> Plan:
    """How many elements to compare, and how far apart in memory; none of a type that torch cannot join as it is.

    Raises Unreadable for a tensor whose storage was taken away (FSDP resizes it to nothing).
    """
    if tensor.dtype not in _JOINED or not tensor.numel():
        return (0, 1)
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if (tensor.storage_offset() + span) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise Unreadable(f"a tensor of the shape {tuple(tensor.shape)} has no memory of that size")
    return (span, 1) if span <= SMALL else (SAMPLES, (span - 1) // (SAMPLES - 1))


def _samples(tensors: Named, plans: dict[int, Plan]) -> dict[int, bytes]:
    """For each tensor the bytes of all its elements, or of some."""
    here = {key: x for key, x in tensors.items() if x.device.type == "cpu"}
    return {
        **_samples_here(here, plans),
        **_samples_elsewhere({k: x for k, x in tensors.items() if k not in here}, plans),
    }


def _samples_here(tensors: Named, plans: dict[int, Plan]) -> dict[int, bytes]:
    """Of tensors in this machine's memory, by address: torch takes 10 us for each view and copy.

    Each tensor is alive and at the address where `_plan` found that its storage holds all of it.
    """
    found: dict[int, bytes] = {}
    sizes: dict[int, list[int]] = {}
    for key, x in tensors.items():
        count, step = plans[key]
        if step == 1:
            found[key] = ctypes.string_at(x.data_ptr(), count * x.element_size()) if count else b""
        else:
            sizes.setdefault(x.element_size(), []).append(key)
    for nbytes, keys in sizes.items():
        starts = np.array([tensors[key].data_ptr() for key in keys], np.int64)
        steps = np.array([plans[key][1] * nbytes for key in keys], np.int64)
        low = int(starts.min())
        span = int((starts + steps * (SAMPLES - 1)).max()) + nbytes - low
        memory = np.frombuffer(memoryview((ctypes.c_uint8 * span).from_address(low)), np.uint8)
        places = (starts - low)[:, None] + steps[:, None] * np.arange(SAMPLES)
        data = memory[places[:, :, None] + np.arange(nbytes)].tobytes()
        length = SAMPLES * nbytes
        found |= {key: data[i * length : (i + 1) * length] for i, key in enumerate(keys)}
    return found


def _samples_elsewhere(tensors: Named, plans: dict[int, Plan]) -> dict[int, bytes]:
    """Of tensors on other devices: one copy for each type and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    found = dict.fromkeys(tensors, b"")
    for key, x in tensors.items():
        if plans[key][0]:
            groups.setdefault((x.dtype, x.device), []).append(key)
    for (dtype, _), keys in groups.items():
        pieces = [torch.as_strided(tensors[k], plans[k][:1], plans[k][1:], tensors[k].storage_offset()) for k in keys]
        data = torch.cat(pieces).view(torch.uint8).cpu().numpy().tobytes()
        start = 0
        for key in keys:
            end = start + plans[key][0] * dtype.itemsize
            found[key] = data[start:end]
            start = end
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in order, as bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _block(data: torch.Tensor, i: int) -> str:
    piece = data[i * BLOCK_NBYTES : (i + 1) * BLOCK_NBYTES]
    return xxhash.xxh3_128_hexdigest(arrays.as_bytes(piece).data) if piece.numel() else ""
