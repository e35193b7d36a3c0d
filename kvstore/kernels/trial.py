"""A trial of a kernel on this machine, once, before use: it must write the portable code's bytes.

Each instruction set has its own code, and no test machine has them all; a compiler or an emulator may err as well.
Wrong codes would be stored as good ones, so a kernel that fails is not used. It takes some 4 ms.
"""

import torch

from kvstore.kernels.cpu import DTYPES, CpuKernel, Rotary, Rows

TOKENS, HEADS, HEAD_DIM = 70, 2, 64
"""Two groups of means, the second one short."""


def agree(kernel: CpuKernel, portable: CpuKernel) -> bool:
    """Whether both give the same bytes for a sample: both codecs, both ways, each input type."""
    return all(_bytes(kernel, x) == _bytes(portable, x) for x in _samples())


def _samples() -> list[torch.Tensor]:
    """Values of magnitudes up to a million times apart, with a few outliers, some zeros, half of them negative."""
    at = torch.arange(TOKENS * HEADS * HEAD_DIM, dtype=torch.float32, device="cpu")
    x = torch.sin(at * at * 0.37) * torch.exp(4 * torch.sin(at * 0.011))
    x[::257] *= 100
    x[::251] = 0
    return [x.to(dtype) for dtype in DTYPES]


def _bytes(kernel: CpuKernel, x: torch.Tensor) -> list[bytes] | None:
    whole = Rows(1, TOKENS, HEADS, HEAD_DIM, x.numel(), HEAD_DIM, 64, 0)
    made: list[torch.Tensor] = [kernel.kv_content(x, whole, Rotary(HEAD_DIM, interleaved=True))]
    made.append(kernel.kv_distance(x, x.flip(0), whole))
    coded = kernel.nf4_encode(x)
    if coded is None:
        return None
    values = torch.empty_like(x)
    kernel.nf4_decode(coded[0], coded[1], values)
    made += [*coded, values]
    for size, block, groups in ((HEAD_DIM, 32, 2), (HEAD_DIM, 64, 0)):
        rows = Rows(1, TOKENS, HEADS, HEAD_DIM, x.numel(), size, block, groups)
        means = None
        if groups:
            codes, scales, means, content = kernel.kv_means(x, rows, Rotary(HEAD_DIM, interleaved=False))
            made += [codes, scales, means, *([] if content is None else [content])]
        rotated = kernel.kv_encode(x, rows, means)
        if rotated is None:
            return None
        values = torch.empty_like(x)
        kernel.kv_decode(rotated[:3], means, rows, values)
        made += [*rotated, values]
    return [part.view(torch.uint8).numpy().tobytes() for part in made]
