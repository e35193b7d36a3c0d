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
        self._stamps: dict[int, tuple[Any, ...]] = {}
        self._samples: _Samples | None = None
        self._sampled: list[bytes] = []

    @torch.no_grad()
    def look(self, tensors: Named, *, read: bool = True) -> frozenset[int]:
        """The ids of those tensors that are new or may have changed since the last look. read: blocks in turn, too."""
        stamps = {key: _stamp(x) for key, x in tensors.items()}
        samples: dict[int, bytes] | None = None
        found: set[int] = set()
        if not self._is_as_it_was(tensors, stamps):
            found, samples = self._compared(tensors, stamps)
        for key in self._read_in_turn(tensors) if read else ():
            if samples is None:
                samples = _sampled(tensors, {key: record.plan for key, record in self._records.items()})
            self._records[key] = _record(tensors[key], stamps[key], samples[key])
            found.add(key)
        return frozenset(found)

    def _is_as_it_was(self, tensors: Named, stamps: dict[int, tuple[Any, ...]]) -> bool:
        """Whether these are the tensors of the last look, none of which may have changed: the usual case, and fast."""
        if self._samples is None or stamps != self._stamps:
            return False
        if not all(self._records[key].tensor() is x for key, x in tensors.items()):
            return False
        return self._samples.read() == self._sampled

    def _compared(self, tensors: Named, stamps: dict[int, tuple[Any, ...]]) -> tuple[set[int], dict[int, bytes]]:
        """The ids of tensors that are new or may have changed, whose records are made anew, and all samples."""
        self._samples = None
        new = {key for key, stamp in stamps.items() if not self._is_known(key, tensors[key], stamp)}
        plans = {key: _plan(x) if key in new else self._records[key].plan for key, x in tensors.items()}
        samples = _sampled(tensors, plans)
        found = new | {key for key in tensors.keys() - new if self._records[key].sample != samples[key]}
        if found or len(tensors) != len(self._records):
            kept = {key: record for key, record in self._records.items() if key in tensors}
            self._records = {**kept, **{key: _record(tensors[key], stamps[key], samples[key]) for key in found}}
            self._turn = [(key, i) for key, record in self._records.items() for i in range(len(record.blocks))]
            self._at = 0
        if all(x.device.type == "cpu" for x in tensors.values()):
            self._stamps, self._samples = stamps, _Samples(tensors, plans)
            self._sampled = self._samples.read()
            if self._samples.by_tensor(self._sampled) != samples:
                self._samples = None  # written to just now: the next look compares each one
        return found, samples

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


def _sampled(tensors: Named, plans: dict[int, Plan]) -> dict[int, bytes]:
    """For each tensor the bytes of all its elements, or of some."""
    here = _Samples({key: x for key, x in tensors.items() if x.device.type == "cpu"}, plans)
    elsewhere = {key: x for key, x in tensors.items() if x.device.type != "cpu"}
    return {**here.by_tensor(here.read()), **_samples_elsewhere(elsewhere, plans)}


class _Samples:
    """Of tensors in this machine's memory, by address: torch takes 10 us for each view and copy.

    Read only while each tensor is alive and at the address where `_plan` found that its storage holds all of it.
    """

    def __init__(self, tensors: Named, plans: dict[int, Plan]) -> None:
        self._whole: dict[int, tuple[int, int]] = {}
        self._some: list[tuple[list[int], int, Any, Any]] = []
        sizes: dict[int, list[int]] = {}
        for key, x in tensors.items():
            count, step = plans[key]
            if step == 1:
                self._whole[key] = (x.data_ptr() if count else 0, count * x.element_size())
            else:
                sizes.setdefault(x.element_size(), []).append(key)
        for nbytes, keys in sizes.items():
            starts = np.array([tensors[key].data_ptr() for key in keys], np.int64)
            steps = np.array([plans[key][1] * nbytes for key in keys], np.int64)
            low = int(starts.min())
            span = int((starts + steps * (SAMPLES - 1)).max()) + nbytes - low
            memory = np.frombuffer(memoryview((ctypes.c_uint8 * span).from_address(low)), np.uint8)
            places = (starts - low)[:, None] + steps[:, None] * np.arange(SAMPLES)
            self._some.append((keys, SAMPLES * nbytes, memory, places[:, :, None] + np.arange(nbytes)))

    def read(self) -> list[bytes]:
        """Their bytes now: those that are read whole, then the others."""
        whole = [ctypes.string_at(start, nbytes) if nbytes else b"" for start, nbytes in self._whole.values()]
        return [*whole, *(memory[places].tobytes() for _, _, memory, places in self._some)]

    def by_tensor(self, read: list[bytes]) -> dict[int, bytes]:
        """What was read, for each tensor."""
        found = dict(zip(self._whole, read, strict=False))
        for (keys, length, _, _), data in zip(self._some, read[len(self._whole) :], strict=True):
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
