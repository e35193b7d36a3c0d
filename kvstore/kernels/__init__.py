"""Which kernel answers for a tensor: compiled C++ on the CPU, Triton on CUDA, else the torch reference.

Every kernel gives the reference's bytes (`codecs.blocks`, `codecs.kv_blocks`), so a choice here is only
one of speed, and a missing kernel never means a broken codec.
"""

import torch

from kvstore.kernels.cpu import CpuKernel, kernels

_BEST = next(reversed(kernels()), None)


def cpu_kernel(x: torch.Tensor) -> CpuKernel | None:
    """The compiled kernel where it is installed and x lies on the CPU."""
    return _BEST if x.device.type == "cpu" else None
