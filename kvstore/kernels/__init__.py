"""Which kernel answers for a tensor: compiled C++ on the CPU, Triton on CUDA, else the torch reference.

Every kernel gives the reference's bytes (`codecs.blocks`, `codecs.kv_blocks`), so a choice here is only
one of speed, and a missing kernel never means a broken codec.
"""

from importlib import import_module
from types import ModuleType

import torch

from kvstore.kernels.cpu import CpuKernel, kernels

_BEST = next(reversed(kernels()), None)


def cpu_kernel(x: torch.Tensor) -> CpuKernel | None:
    """The compiled kernel where it is installed and x lies on the CPU."""
    return _BEST if x.device.type == "cpu" else None


def cuda_kernel(x: torch.Tensor) -> ModuleType | None:
    """`kernels.cuda` where the tensor lies on CUDA and Triton is installed."""
    if x.device.type != "cuda":
        return None
    try:
        return import_module("kvstore.kernels.cuda")
    except ImportError:
        return None
