"""Packed tensors on their way to a GPU and from it: parts cross the bus, a quarter of the bytes; the GPU (de)codes.

Whatever goes wrong on the device (no compiler, no memory, a kernel that fails) is left to the host, whose verdict
counts: the bits are the same. The codecs are the store's own. A Landing belongs to one call. Imports no torch: whoever
has a tensor on a GPU has done so.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore import arrays
from kvstore.device import Driver
from kvstore.device.copies import Batch, Runs, Streams
from kvstore.errors import InvalidEntry
from kvstore.packed import PackedTensor
from kvstore.shm.layout import aligned

logger = logging.getLogger(__name__)

DENSE_MAX_NBYTES = 64 << 20
"""Decoded values on the device that are still to be copied to where they belong, beside one more tensor's."""
Pair = tuple[Any, Any]
"""A tensor to fill, and what it is filled from."""


class Landing:
    """The packed tensors of one request."""

    def __init__(self, driver: Driver, streams: Streams, pairs: Sequence[Pair]) -> None:
        """pairs: (tensor on a GPU, packed tensor in host memory)."""
        self._driver = driver
        self._streams = streams
        self._due = list(pairs)
        self._there: list[PackedTensor] | None = None

    def bring(self, batch: Batch) -> None:
        """Add the copies of all parts to a batch."""
        try:
            self._there = [self._brought(batch, target, packed) for target, packed in self._due]
        except Exception as error:  # noqa: BLE001 - no memory, by whatever name
            told(error)

    def _brought(self, batch: Batch, target: Any, packed: PackedTensor) -> PackedTensor:
        torch: Any = sys.modules["torch"]
        device = target.device.index or 0
        sources = {suffix: arrays.as_bytes(part) for suffix, part in packed.parts.items()}
        nbytes = sum(aligned(x.size) for x in sources.values())
        room = torch.empty(nbytes, dtype=torch.uint8, device=self._driver.where(device))
        at, parts = 0, {}
        for suffix, source in sources.items():
            spec, place = arrays.describe(suffix, packed.parts[suffix]), room[at : at + source.size]
            batch.bring(device, place, source)
            parts[suffix] = place.view(getattr(torch, spec.dtype)).reshape(spec.shape)
            at += aligned(source.size)
        return PackedTensor(packed.spec, packed.encoding, parts, packed.attrs)

    def decode(self) -> list[Pair]:
        """Decode what was brought, once the batch has run, and return when that is done. Those left to the host."""
        if self._there is None:
            return self._due
        try:
            scatter: list[Pair] = []
            for (target, _), packed in zip(self._due, self._there, strict=True):
                self._decode(target, packed, scatter)
                if sum(dense.nbytes for _, dense in scatter) > DENSE_MAX_NBYTES:
                    self._scatter(scatter)
            self._scatter(scatter)
        except Exception as error:  # noqa: BLE001 - Triton raises whatever its compiler does; also CodecError
            told(error)
            return self._due
        finally:  # kernels that were begun still read what was brought
            for device in {target.device.index or 0 for target, _ in self._due}:
                self._driver.synchronize(self._driver.record(self._driver.current(device)))
        return []

    def _decode(self, target: Any, packed: PackedTensor, scatter: list[Pair]) -> None:
        from kvstore.codecs.packing import decoded

        torch: Any = sys.modules["torch"]
        device, spec = target.device.index or 0, packed.spec
        if arrays.describe("", target) != spec:
            raise InvalidEntry(f"packed {spec}, to be decoded into {arrays.describe('', target)}")
        dtype = getattr(torch, spec.dtype)
        if target.is_contiguous():
            over = self._driver.tensor(device, target.data_ptr(), target.nbytes, target)
            decoded(packed, over.view(dtype).reshape(spec.shape))
            return
        dense = torch.empty(spec.shape, dtype=dtype, device=self._driver.where(device))
        scatter.append((target, decoded(packed, dense)))

    def _scatter(self, pairs: list[Pair]) -> None:
        """Copy what was decoded dense to its dense runs: on the device, in one batch."""
        if not pairs:
            return
        batch = Batch(self._driver, self._streams, {target.device.index or 0 for target, _ in pairs})
        for target, dense in pairs:
            batch.take_from(target.device.index or 0, dense.data_ptr(), target)
        batch.run()
        pairs.clear()


def encoded_there(driver: Driver, device: int, tensors: Mapping[str, Any], *, prefix_start: bool) -> dict[str, Any]:
    """The way back: dense tensors on a GPU encoded by its kernels, on a stream of their own. Returns when that is done.

    Raises whatever the device does, and CodecError.
    """
    from kvstore.codecs.packing import encode

    there = {}
    for name, x in tensors.items():
        flat = driver.tensor(device, x.data_ptr(), x.nbytes, x)
        there[name] = flat.view(x.dtype).reshape(x.shape)
    with driver.computing(device):
        made = encode(there, codec="nf4-kv2", prefix_start=prefix_start)
        driver.synchronize(driver.record(driver.current(device)))
    return made


def lands(x: Any) -> bool:
    """Whether a tensor on a GPU can be filled there with what was decoded there."""
    return Runs.of(x) is not None


def told(error: Exception) -> None:
    """Note that the device could not decode something, which the host does then. As text: an error keeps frames, and
    they keep what is leased.
    """
    logger.warning("decoded on the host, as the GPU did not: %s: %s", type(error).__name__, str(error))
