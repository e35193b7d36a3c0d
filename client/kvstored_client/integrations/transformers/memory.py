"""Memory for keys and values in RAM, used again: fresh memory is cleared by the kernel when it is first touched.

That takes as long as copying does: 47 MB (1,024 tokens of a small model) are copied in 3 ms to where they were copied
before, in 7 to fresh memory of huge pages, and in 15 to pages of 4 KiB.
A buffer comes back when nothing refers to it any more, so nobody's numbers are written over. One is kept of each size,
a power of two up to KEPT_MAX_NBYTES: less than twice that in a process. Larger ones go back to the system.
Thread-safe, without a lock: a buffer may come back in the middle of any statement.
"""

import weakref
from math import prod

import numpy as np
import numpy.typing as npt
import torch

KEPT_MAX_NBYTES = 256 << 20

_Buffer = npt.NDArray[np.uint8]
_kept: dict[int, list[_Buffer]] = {1 << n: [] for n in range(KEPT_MAX_NBYTES.bit_length())}


def empty_pair(
    size: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one size but for the last dimension, not cleared."""
    if device.type != "cpu":
        k, v = (torch.empty((*size, dim), dtype=dtype, device=device) for dim in dims)
        return k, v
    rows = prod(size)
    whole = torch.from_numpy(_empty(rows * sum(dims) * dtype.itemsize)).view(dtype)
    return whole[: rows * dims[0]].view(*size, dims[0]), whole[rows * dims[0] :].view(*size, dims[1])


def _empty(nbytes: int) -> _Buffer:
    """Bytes to fill. Of numpy: it asks for huge pages, torch does not."""
    if nbytes > KEPT_MAX_NBYTES:
        return np.empty(nbytes, np.uint8)
    size = 1 << max(0, nbytes - 1).bit_length()
    try:
        buffer = _kept[size].pop()
    except IndexError:
        buffer = np.empty(size, np.uint8)
    lent = buffer[:nbytes]
    weakref.finalize(lent, _give_back, buffer).atexit = False
    return lent


def _give_back(buffer: _Buffer) -> None:
    kept = _kept[buffer.size]
    kept.append(buffer)
    del kept[:-1]
