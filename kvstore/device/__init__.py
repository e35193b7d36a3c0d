"""What is asked of a GPU, and all that is: copies on streams and, for a tier in its memory, that memory.

    Driver        streams, events, copies, registered host memory; torch tensors over memory on the device
    MemoryDriver  the same with memory on the device
    copies        the copies of one request, in one batch
    cuda          both by CUDA; deferred: both without a GPU, for tests

Light: imports neither torch nor CUDA. Whoever wants `cuda` imports it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Driver(Protocol):
    """What is asked of CUDA. Streams and events are its own objects. Each raises DriverError for what CUDA refuses."""

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Page-lock host memory, so that it is copied at the bus's speed. read_only: it is mapped for reading."""
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`, before the memory is unmapped."""
        ...

    def stream(self, device: int) -> Any:
        """A new stream."""
        ...

    def current(self, device: int) -> Any:
        """The stream on which the calling thread's work for a device is."""
        ...

    def copy(self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool) -> None:
        """Have runs of bytes copied, in any order among themselves, after all that the stream was to do before.

        to, of: addresses on the host and the stream's device, registered or not. store: from the device to the host.
        """
        ...

    def computing(self, device: int) -> AbstractContextManager[object]:
        """Inside, the calling thread's work for a device is on a stream that others' work does not hold up."""
        ...

    def record(self, stream: Any) -> Any:
        """An event: over when the stream has done all that it was to do until now."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Have a stream do what comes next after an event."""
        ...

    def synchronize(self, event: Any) -> None:
        """Return once an event is over."""
        ...

    def keep(self, tensor: Any, stream: Any) -> None:
        """A tensor is used by a stream: its memory is not given to others before the stream is done with it."""
        ...

    def where(self, device: int) -> Any:
        """The `torch.device` on which tensors lie that are computed with there."""
        ...

    def tensor(self, device: int, address: int, nbytes: int, owner: object) -> Any:
        """The bytes from an address on as a flat uint8 tensor of torch's. owner: lives as long as the tensor."""
        ...

    def computes(self, device: int) -> bool:
        """Whether the codecs have kernels there, which write the bytes that the CPU's write."""
        ...

    def uuid(self, device: int) -> bytes:
        """The device's name to every process of this host, 16 bytes: numbers of devices are each process's own."""
        ...

    def map(self, device: int, descriptor: int, nbytes: int) -> Any:
        """Another process's memory on a device, by what it exported, only to be read. The descriptor is not kept.

        Memory as `MemoryDriver.allocate` returns it. It lives until all that map it have let go of it.
        """
        ...

    def unmap(self, memory: Any) -> None:
        """Let go of what was mapped: nothing that was started with it is under way any more."""
        ...


class DriverError(Exception):
    """CUDA refused a call."""


class OutOfMemory(DriverError):
    """The device has no memory left for this."""


class MemoryDriver(Driver, Protocol):
    """A driver for whoever holds memory on a device. Any thread. Memory is its own object, with address and nbytes."""

    def memory(self, device: int) -> tuple[int, int]:
        """Bytes that are free now, and all. What this process's own use of the device costs is not free any more."""
        ...

    def allocate(self, device: int, nbytes: int) -> Any:
        """Memory of at least so many bytes, of any content. Raises OutOfMemory."""
        ...

    def free(self, memory: Any) -> None:
        """Give it back: nothing that was started with it is under way any more."""
        ...

    def export(self, memory: Any) -> int:
        """A new descriptor by which other processes map it. Whoever has one keeps the memory."""
        ...

    def bound(self, device: int, nbytes: int) -> None:
        """Have torch in this process hold at most so many bytes there; more is out of memory."""
        ...
