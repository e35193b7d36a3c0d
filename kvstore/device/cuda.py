"""The driver that is CUDA: streams and events of torch, registration and batch copies of cuda-bindings.

Written to the API of cuda-bindings 12.8 and later and of torch; no GPU was at hand, so it has not been run here. Needs
a driver of CUDA 12.8 for batch copies: with an older one runs are copied one by one, with the same results. A store's
memory is mapped by the driver's virtual memory calls, beside torch's allocator: what torch holds can be bounded alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from kvstore.device import DriverError, OutOfMemory

LOAD_PRIORITY = -1
"""Above the default: a load is waited for."""


@dataclass(frozen=True, eq=False)
class _Memory:
    """Memory of one allocation, mapped. size: with the rest of its last granule."""

    address: int
    nbytes: int
    handle: Any
    size: int


@dataclass(frozen=True, eq=False)
class _Over:
    """What a tensor over device memory holds on to."""

    __cuda_array_interface__: dict[str, Any]
    owner: object


class Cuda:
    """See `device.MemoryDriver`. Raises ImportError without torch or cuda-bindings, DriverError without a GPU."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver, runtime

        if not torch.cuda.is_available():
            raise DriverError("torch sees no GPU")
        self._torch: Any = torch
        self._cuda = runtime
        self._driver = driver
        self._posix = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._batches = hasattr(runtime, "cudaMemcpyBatchAsync")

    def _check(self, answer: tuple[Any, ...], what: str) -> None:
        if answer[0] != self._cuda.cudaError_t.cudaSuccess:
            raise DriverError(f"{what}: {answer[0].name}")

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Portable: for all contexts of this process. Memory that is mapped for reading needs to be said so."""
        flags = self._cuda.cudaHostRegisterPortable
        if read_only:
            flags |= self._cuda.cudaHostRegisterReadOnly
        self._check(self._cuda.cudaHostRegister(address, nbytes, flags), f"cudaHostRegister of {nbytes} bytes")

    def unregister(self, address: int) -> None:
        """Waits for copies that are under way."""
        self._check(self._cuda.cudaHostUnregister(address), "cudaHostUnregister")

    def stream(self, device: int) -> Any:
        """Beside torch's own streams."""
        return self._torch.cuda.Stream(device=device, priority=LOAD_PRIORITY)

    def current(self, device: int) -> Any:
        """The one of torch in this thread."""
        return self._torch.cuda.current_stream(device)

    def computing(self, device: int) -> AbstractContextManager[object]:
        """A stream of torch's pool."""
        context: AbstractContextManager[object] = self._torch.cuda.stream(self._torch.cuda.Stream(device=device))
        return context

    def copy(self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool) -> None:
        """One call of the driver's for all runs."""
        if not to:
            return
        with self._torch.cuda.device(stream.device):
            if self._batches and self._copy_batch(to, of, nbytes, stream, store=store):
                return
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
            for target, source, n in zip(to, of, nbytes, strict=True):
                self._check(self._cuda.cudaMemcpyAsync(target, source, n, kind, stream.cuda_stream), "cudaMemcpyAsync")

    def _copy_batch(
        self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool
    ) -> bool:
        """False, and nothing was begun: this driver has no batches."""
        cuda = self._cuda
        how = cuda.cudaMemcpyAttributes()
        order = cuda.cudaMemcpySrcAccessOrder
        # No stream writes to a segment that is read from: it may be read at any time until the event.
        how.srcAccessOrder = order.cudaMemcpySrcAccessOrderStream if store else order.cudaMemcpySrcAccessOrderAny
        answer = cuda.cudaMemcpyBatchAsync(list(to), list(of), list(nbytes), len(to), [how], [0], 1, stream.cuda_stream)
        errors = cuda.cudaError_t
        if answer[0] in (errors.cudaErrorNotSupported, errors.cudaErrorCallRequiresNewerDriver):
            self._batches = False
            return False
        self._check(answer, f"cudaMemcpyBatchAsync of {len(to)} runs")
        return True

    def record(self, stream: Any) -> Any:
        """An event without a time, which costs less."""
        return stream.record_event(self._torch.cuda.Event())

    def wait(self, stream: Any, event: Any) -> None:
        """On the device: this returns at once."""
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Without the GIL."""
        event.synchronize()

    def keep(self, tensor: Any, stream: Any) -> None:
        """For torch's caching allocator."""
        tensor.record_stream(stream)

    def memory(self, device: int) -> tuple[int, int]:
        """The first call makes this process's context there, which takes some hundred MiB: they are not free then."""
        count = self._torch.cuda.device_count()
        if device >= count:
            raise DriverError(f"torch sees {count} GPUs, the last one is cuda:{count - 1}")
        try:
            free, total = self._torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            raise DriverError(str(error)) from None
        return int(free), int(total)

    def allocate(self, device: int, nbytes: int) -> _Memory:
        """Mapped for this device alone. Not of torch's allocator, which would keep it after it is given back."""
        driver = self._driver
        with self._torch.cuda.device(device):
            made, size = self._kind_of(device, nbytes)
            flag = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            (handle,) = self._done(driver.cuMemCreate(size, made, 0), f"cuMemCreate of {size} bytes")
            return _Memory(self._mapped(handle, size, made.location, flag), nbytes, handle, size)

    def _kind_of(self, device: int, nbytes: int) -> tuple[Any, int]:
        """What is asked of the driver for memory there, and its size in whole granules."""
        driver = self._driver
        made = driver.CUmemAllocationProp()
        made.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        made.location.id = device
        may = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        if self._done(driver.cuDeviceGetAttribute(may, self._named(device)), "cuDeviceGetAttribute")[0]:
            made.requestedHandleTypes = self._posix
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        (granule,) = self._done(driver.cuMemGetAllocationGranularity(made, least), "cuMemGetAllocationGranularity")
        return made, -(-nbytes // granule) * granule

    def _named(self, device: int) -> Any:
        return self._done(self._driver.cuDeviceGet(device), "cuDeviceGet")[0]

    def _mapped(self, handle: Any, size: int, location: Any, flag: Any) -> int:
        """The address of memory that is mapped from now on; where it cannot be, the handle is released."""
        driver = self._driver
        with ExitStack() as undo:
            undo.callback(driver.cuMemRelease, handle)
            (address,) = self._done(driver.cuMemAddressReserve(size, 0, 0, 0), "cuMemAddressReserve")
            undo.callback(driver.cuMemAddressFree, address, size)
            self._done(driver.cuMemMap(address, size, 0, handle, 0), "cuMemMap")
            undo.callback(driver.cuMemUnmap, address, size)
            access = driver.CUmemAccessDesc()
            access.location = location
            access.flags = flag
            self._done(driver.cuMemSetAccess(address, size, [access], 1), "cuMemSetAccess")
            undo.pop_all()
        return int(address)

    def _done(self, answer: tuple[Any, ...], what: str) -> tuple[Any, ...]:
        results = self._driver.CUresult
        if answer[0] == results.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemory(what)
        if answer[0] != results.CUDA_SUCCESS:
            raise DriverError(f"{what}: {answer[0].name}")
        return answer[1:]

    def free(self, memory: _Memory) -> None:
        """Unmapped, so that a late access is an error and no other's bytes."""
        driver = self._driver
        self._done(driver.cuMemUnmap(memory.address, memory.size), "cuMemUnmap")
        self._done(driver.cuMemAddressFree(memory.address, memory.size), "cuMemAddressFree")
        self._done(driver.cuMemRelease(memory.handle), "cuMemRelease")

    def uuid(self, device: int) -> bytes:
        """Of the MIG instance, where there is one."""
        (found,) = self._done(self._driver.cuDeviceGetUuid(self._named(device)), "cuDeviceGetUuid")
        return bytes(found.bytes)

    def export(self, memory: _Memory) -> int:
        """A POSIX descriptor, which may travel over a unix socket. Refused where the device has none of that kind."""
        what = "cuMemExportToShareableHandle"
        return int(self._done(self._driver.cuMemExportToShareableHandle(memory.handle, self._posix, 0), what)[0])

    def map(self, device: int, descriptor: int, nbytes: int) -> _Memory:
        """For reading alone: where the driver grants no such access, nothing is mapped."""
        driver = self._driver
        with self._torch.cuda.device(device):
            made, size = self._kind_of(device, nbytes)
            what = "cuMemImportFromShareableHandle"
            flag = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
            (handle,) = self._done(driver.cuMemImportFromShareableHandle(descriptor, self._posix), what)
            return _Memory(self._mapped(handle, size, made.location, flag), nbytes, handle, size)

    def unmap(self, memory: _Memory) -> None:
        """As it is freed: the memory itself is its owner's."""
        self.free(memory)

    def where(self, device: int) -> Any:
        """By torch's name."""
        return self._torch.device("cuda", device)

    def tensor(self, device: int, address: int, nbytes: int, owner: object) -> Any:
        """By the interface with which libraries exchange arrays: torch takes the memory as it is."""
        interface = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        return self._torch.as_tensor(_Over(interface, owner), device=self.where(device))

    def computes(self, device: int) -> bool:  # noqa: ARG002 - all of them, or none
        """Whether Triton is installed. Whether it finds a compiler shows when it is used."""
        from importlib.util import find_spec

        return find_spec("triton") is not None

    def bound(self, device: int, nbytes: int) -> None:
        """Of torch's caching allocator."""
        total = self._torch.cuda.mem_get_info(device)[1]
        self._torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
