"""A stand-in for CUDA tensors on a machine without a GPU: host memory that says it is on cuda:N.

It is not read or written but by a driver (`device.deferred`) or by torch's own copies, and those are counted: `COPIES`
by direction. What is "h2d" or "d2h" here is a copy by torch between pageable memory and the device; `FakeCuda.numbers`
is what the device holds, for tests to look at.
"""

from collections import Counter
from typing import Any

import torch

COPIES: Counter[str] = Counter()
_PLAIN = torch._C.DisableTorchFunctionSubclass


class FakeCuda(torch.Tensor):
    """A tensor on cuda:0."""

    index = 0

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def numbers(self) -> torch.Tensor:
        """The device's memory."""
        return super().as_subclass(torch.Tensor)

    def as_subclass(self, cls: Any) -> torch.Tensor:
        """Somebody reads the device's memory as if it were the host's."""
        COPIES["d2h"] += 1
        return self.numbers.clone().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "copy_":
            kind = ("h2d", "d2d") if isinstance(args[0], FakeCuda) else ("d2h", "d2h")
            COPIES[kind[isinstance(args[1], FakeCuda)]] += 1
            with _PLAIN():
                return func(*args, **kwargs)
        if name in ("to", "cpu"):
            target = next((x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (str, torch.device))), "cpu")
            if torch.device(target).type == "cpu":
                COPIES["d2h"] += 1
                return args[0].numbers.clone()
        if name == "contiguous" and not args[0].is_contiguous():
            COPIES["d2d"] += 1
        return super().__torch_function__(func, types, args, kwargs)


def on_gpu(x: torch.Tensor) -> FakeCuda:
    """A copy of a tensor on the device, strides and all."""
    return x.clone(memory_format=torch.preserve_format).as_subclass(FakeCuda)
