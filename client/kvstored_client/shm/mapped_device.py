"""A daemon's segment in a GPU's memory, mapped: only to be read, by copies within the GPU and by kernels.

It is what `shm.mapping.MappedSegment` is for memory of the host, but that no byte of it can be read here. Where its
blocks' generations are is the table that came with it. Its memory is the daemon's for as long as that lives, and this
process's, too, until the last block and tensor over it is gone.
"""

import os
import sys
import weakref
from contextlib import suppress
from typing import Any

from kvstore.device import Driver, DriverError
from kvstore.hit import TensorInfo
from kvstore.shm.layout import TABLE_SHIFT, table_nbytes
from kvstored_client.shm.mapping import MappedSegment


class MappedDevice:
    """One segment. address: on the device. words, shift: a block's generation is word `start >> shift`."""

    writable = False
    shift = TABLE_SHIFT

    def __init__(self, driver: Driver, device: int, memory: int, table: int, nbytes: int) -> None:
        """memory, table: descriptors, which stay the caller's. Raises DriverError, and as MappedSegment."""
        self._driver = driver
        self.device = device
        self.nbytes = nbytes
        self._table = MappedSegment(table, table_nbytes(nbytes), writable=False)
        self.words = self._table.words
        mapped = driver.map(device, memory, nbytes)
        weakref.finalize(self, _unmap, driver, mapped, os.getpid()).atexit = False
        self.address: int = mapped.address

    def tensor(self, at: int, spec: TensorInfo, nbytes: int, owner: object) -> Any:
        """The tensor whose bytes begin there, over this memory. It keeps the mapping and `owner`."""
        torch: Any = sys.modules["torch"]
        dtype = getattr(torch, spec.dtype)
        if not nbytes:
            return torch.empty(spec.shape, dtype=dtype, device=self._driver.where(self.device))
        flat = self._driver.tensor(self.device, self.address + at, nbytes, (self, owner))
        return flat.view(dtype).reshape(spec.shape)


def _unmap(driver: Driver, mapped: Any, process: int) -> None:
    if os.getpid() == process:  # else it is the parent's
        with suppress(DriverError):
            driver.unmap(mapped)
