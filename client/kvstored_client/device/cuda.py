"""The driver that is CUDA: streams and events of torch, registration and batch copies of cuda-bindings.

Written to the API of cuda-bindings 12.8 and later and of torch; no GPU was at hand, so it has not been run here. Needs
a driver of CUDA 12.8 for batch copies: with an older one runs are copied one by one, with the same results.
"""

from collections.abc import Sequence
from typing import Any

from kvstored_client.device import DriverError

LOAD_PRIORITY = -1
"""Above the default: a load is waited for."""


class Cuda:
    """See `device.Driver`. Raises ImportError without torch or cuda-bindings, DriverError without a GPU."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import runtime

        if not torch.cuda.is_available():
            raise DriverError("torch sees no GPU")
        self._torch: Any = torch
        self._cuda = runtime
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
