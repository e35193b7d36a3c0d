"""Chunks that go right into the paged blocks of an engine: decoded and scattered on the GPU by one launch a request.

    Paged     where one tensor of a chunk goes
    Scatter   the packed tensors of one request on their way to such places

The parts cross the bus in one batch with all that the launch has to be told (`kernels.paging`). Whatever goes wrong on
the device is left to the host, whose verdict counts: the bits are the same. A Scatter belongs to one call. Imports no
torch: whoever has a tensor on a GPU has done so.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore import arrays
from kvstore.device import Driver
from kvstore.device.copies import Batch
from kvstore.dtypes import TensorSpec
from kvstore.errors import InvalidEntry
from kvstore.packed import PackedTensor
from kvstore.shm.layout import aligned
from kvstored_client.device.landing import told

if TYPE_CHECKING:
    from kvstore.kernels.paging import Job, Where


@dataclass(frozen=True, slots=True, eq=False)
class Paged:
    """Places for a tensor (layers, tokens, heads, head_dim). layers: (blocks, tokens of a block, heads, head_dim) each.

    places: of each of its blocks; -1: that one is not wanted.
    """

    spec: TensorSpec
    layers: Sequence[Any]
    places: Sequence[int]

    @property
    def is_cuda(self) -> bool:
        """Whether they are on a GPU."""
        return bool(self.layers[0].is_cuda)

    @property
    def device(self) -> Any:
        """The one they are on."""
        return self.layers[0].device

    def write(self, dense: Any) -> None:
        """Write the blocks of such a tensor, which may be on the host, by what the device's stream is to do."""
        blocks = dense.view(len(self.layers), len(self.places), *self.layers[0].shape[1:])
        for at, place in enumerate(self.places):
            if place >= 0:
                for layer, x in zip(self.layers, blocks[:, at], strict=True):
                    layer[place].copy_(x)

    def where(self) -> "Where | None":
        """The buffers as a launch is told of them; None: their layers are not alike, or channels are not dense."""
        from kvstore.kernels.paging import Where

        first = self.layers[0]
        strides = first.stride()
        if strides[-1] != 1 or any(x.stride() != strides or x.dtype != first.dtype for x in self.layers):
            return None
        block_tokens, inner, d = first.shape[1:]
        return Where(first.dtype, len(self.layers), block_tokens, inner, d, strides[:3])


class Scatter:
    """The packed tensors of one request, to paged blocks."""

    def __init__(self, driver: Driver, pairs: Sequence[tuple[Paged, PackedTensor]]) -> None:
        """pairs: (places on a GPU, packed tensor in host memory)."""
        self._driver = driver
        self._left: list[tuple[Any, Any]] = []
        self._due: dict[Any, list[tuple[Paged, PackedTensor, Job]]] = {}
        self._launches: list[tuple[Where, Any, list[tuple[Paged, PackedTensor]], int]] = []
        for pair in pairs:
            self._take(*pair)

    def _take(self, target: Paged, packed: PackedTensor) -> None:
        from kvstore.codecs.packing import encoded_of
        from kvstore.codecs.paged import job_of

        try:
            if target.spec != packed.spec:
                raise InvalidEntry(f"packed {packed.spec}, for blocks of {target.spec}")
            where, job = target.where(), job_of(encoded_of(packed))
        except Exception as error:  # noqa: BLE001 - the boundary: the host says whether it is damaged
            told(error)
            where, job = None, None
        if where is None or job is None:
            self._left.append((target, packed))
        else:
            self._due.setdefault((target.device.index or 0, where), []).append((target, packed, job))

    def bring(self, batch: Batch) -> None:
        """Add the copies of all parts, and of what is told of them, to a batch."""
        for (device, where), some in self._due.items():
            try:
                self._launches.append(self._brought(batch, device, where, some))
            except Exception as error:  # noqa: BLE001 - no memory, by whatever name
                told(error)
                self._left += [(target, packed) for target, packed, _ in some]

    def _brought(
        self, batch: Batch, device: int, where: "Where", some: list[tuple[Paged, PackedTensor, "Job"]]
    ) -> tuple["Where", Any, list[tuple[Paged, PackedTensor]], int]:
        torch: Any = sys.modules["torch"]
        sources: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for target, packed, job in some:
            parts = {suffix: arrays.as_bytes(part) for suffix, part in packed.parts.items()}
            tables = job.tables(target.places, [layer.data_ptr() for layer in target.layers])
            sources.append((parts, {field: table.reshape(-1).view(np.uint8) for field, table in tables.items()}))
        rows_nbytes = 8 * len(some) * _fields()
        nbytes = rows_nbytes + sum(aligned(x.size) for both in sources for own in both for x in own.values())
        room = torch.empty(aligned(rows_nbytes) + nbytes, dtype=torch.uint8, device=self._driver.where(device))
        at, rows, there = aligned(rows_nbytes), [], []
        for (target, packed, job), both in zip(some, sources, strict=True):
            addresses: list[dict[Any, int]] = []
            brought: dict[str, Any] = {}
            for own in both:
                addresses.append({})
                for name, source in own.items():
                    place = room[at : at + source.size]
                    batch.bring(device, place, source)
                    addresses[-1][name] = room.data_ptr() + at
                    if own is both[0]:
                        spec = arrays.describe(name, packed.parts[name])
                        brought[name] = place.view(getattr(torch, spec.dtype)).reshape(spec.shape)
                    at += aligned(source.size)
            rows.append(job.row(*addresses))
            there.append((target, PackedTensor(packed.spec, packed.encoding, brought, packed.attrs)))
        batch.bring(device, room[:rows_nbytes], np.stack(rows).reshape(-1).view(np.uint8))
        return where, room[:rows_nbytes].view(torch.int64), there, max(job.programs for _, _, job in some)

    def decode(self) -> list[tuple[Any, Any]]:
        """Decode and scatter what was brought, once the batch has run. Those left to the host.

        Returns when all that was begun is done.
        """
        for where, rows, there, groups in self._launches:
            try:
                self._launch(where, rows, there, groups)
            except Exception as error:  # noqa: BLE001 - Triton raises whatever its compiler does; also CodecError
                told(error)
                self._left += [(target, _on_host(packed)) for target, packed in there]
            finally:  # kernels that were begun still read what was brought
                driver, device = self._driver, there[0][0].device.index or 0
                driver.synchronize(driver.record(driver.current(device)))
        return self._left

    def _launch(self, where: "Where", rows: Any, there: list[tuple[Paged, PackedTensor]], groups: int) -> None:
        if rows.is_cuda:
            from kvstore.kernels.cuda_paged import decode
            from kvstore.kernels.paging import Work

            decode(Work(where, rows, len(there), groups))
            return
        from kvstore.codecs.packing import decoded

        for target, packed in there:  # the reference, where what stands for a device is host memory
            self._over(target).write(decoded(packed))

    def _over(self, target: Paged) -> Paged:
        device = target.device.index or 0
        layers = []
        for layer in target.layers:
            nbytes = (1 + sum((n - 1) * step for n, step in zip(layer.shape, layer.stride(), strict=True))) * (
                layer.element_size()
            )
            flat = self._driver.tensor(device, layer.data_ptr(), nbytes, layer).view(layer.dtype)
            layers.append(flat.as_strided(layer.shape, layer.stride()))
        return Paged(target.spec, layers, target.places)


def _fields() -> int:
    from kvstore.kernels.paging import Field

    return len(Field)


def _on_host(packed: PackedTensor) -> PackedTensor:
    return PackedTensor(
        packed.spec, packed.encoding, {suffix: part.cpu() for suffix, part in packed.parts.items()}, packed.attrs
    )
