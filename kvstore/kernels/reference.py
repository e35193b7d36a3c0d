"""NF4 blocks in plain torch: the reference, whose bytes every kernel must write, and the fallback.

Values are taken flat, row-major, in blocks of 64; the last block may be short. Works on any device, in
chunks that stay in a core's cache. Every float operation is a single IEEE float32 operation in a fixed
order, so that C++ and Triton can repeat it exactly. Pure functions, any thread.
Source: Dettmers et al. 2023; bitsandbytes 0.50's CPU path, whose bits these are.
"""

import torch

from kvstore.kernels import cuda_kernel
from kvstore.kernels.tables import SCALE_LUT_SIZE, table

BLOCK = 64
NESTED_BLOCK = 256
MIN_SCALE = 1e-38
"""Replaces a zero scale before dividing; a short last block also stores it, as bitsandbytes does."""

STEPS = 4064
"""Steps from 0 to 1 of a normalized value, for the receipt: whole numbers add up alike in every order."""

_CHUNK_NUMEL = 1 << 16
"""256 KiB of float32: with masks and codes it fits the 512 KiB L2 of the smallest target core."""


def codes_of(z: torch.Tensor) -> torch.Tensor:
    """NF4 codes of normalized values: the number of thresholds below each. z: float32. Returns uint8, same shape."""
    codes = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
    above = torch.empty(z.shape, dtype=torch.bool, device=z.device)
    as_count = above.view(torch.uint8)
    for threshold in table("thresholds", torch.device("cpu")).tolist():
        torch.gt(z, threshold, out=above)
        codes += as_count
    return codes


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the high nibble. codes: uint8 (n,), n even. Returns uint8 (n/2,)."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a flat tensor.

    x: float32, float16 or bfloat16 (n,). Returns codes uint8 ((n+1)//2,) and absmax float32
    (ceil(n/64),), not finite where the values are not.
    """
    n = x.numel()
    full = n - n % BLOCK
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty((n + BLOCK - 1) // BLOCK, dtype=torch.float32, device=x.device)
    kernel = cuda_kernel(x)
    if kernel is not None and full:
        kernel.quantize(x[:full], codes[: full // 2], absmax[: full // BLOCK], table("thresholds", x.device))
    for start in range(0, 0 if kernel is not None else full, _CHUNK_NUMEL):
        stop = min(full, start + _CHUNK_NUMEL)
        blocks = x[start:stop].to(torch.float32).view(-1, BLOCK)
        scale = absmax[start // BLOCK : stop // BLOCK]
        torch.amax(blocks.abs(), dim=1, out=scale)
        z = blocks * (1.0 / scale.clamp(min=MIN_SCALE))[:, None]
        # No clamp to [-1, 1]: rounding may leave z just above 1, whose code is 15 either way.
        codes[start // 2 : stop // 2] = packed(codes_of(z.view(-1)))
    if full < n:
        tail = x[full:].to(torch.float32)
        absmax[-1] = tail.abs().max().clamp(min=MIN_SCALE)
        z = torch.nn.functional.pad(tail / absmax[-1], (0, n % 2))
        codes[full // 2 :] = packed(codes_of(z))
    return codes, absmax


def sums(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The sums that make up each block's error. x: flat (n,); codes, absmax: as `quantize` returns them.

    Returns int32 (3, b): sum((u-l)^2), sum((u-l)*l) and sum(u^2) of u = round(4064 z), z the normalized values and
    l = round(4064 level) their codes' levels.
    """
    n, levels = x.numel(), torch.round(table("code", x.device) * STEPS).to(torch.int32)
    found = torch.empty(3, absmax.numel(), dtype=torch.int32, device=x.device)
    full = n - n % BLOCK
    for start in range(0, n, _CHUNK_NUMEL):
        stop = min(n, start + _CHUNK_NUMEL)
        scale = absmax[start // BLOCK : (stop + BLOCK - 1) // BLOCK].clamp(min=MIN_SCALE)
        inverse = 1.0 / scale
        values = x[start:stop].to(torch.float32)
        z = values * inverse.repeat_interleave(BLOCK)[: stop - start]
        if stop > full:
            z[full - start :] = values[full - start :] / scale[-1]
        byte = codes[start // 2 : (stop + 1) // 2].to(torch.int32)
        level = levels[torch.stack((byte >> 4, byte & 15), dim=1).view(-1)[: stop - start]]
        u = torch.round(z * STEPS).to(torch.int32)
        for at, product in enumerate(((u - level) * (u - level), (u - level) * level, u * u)):
            padded = torch.nn.functional.pad(product, (0, -product.numel() % BLOCK)).view(-1, BLOCK)
            found[at, start // BLOCK : start // BLOCK + scale.numel()] = padded.sum(dim=1, dtype=torch.int32)
    return found


def squares(absmax: torch.Tensor, found: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Squared error and energy of all values, times 4064^2. found: of `sums`; decoded: the scales as they come back.

    Returns float64 (2,): of x = u * scale and its decoded l * decoded, sum((x - l*decoded)^2) and sum(x^2).
    """
    scale = absmax.clamp(min=MIN_SCALE).double()
    off, (error, cross, energy) = decoded.double() - scale, found.double()
    missed = scale * scale * error - 2 * scale * off * cross + off * off * (energy - 2 * cross - error)
    return torch.stack((missed.sum(), (scale * scale * energy).sum()))


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Level times scale, rounded to nearest even into out.

    codes: uint8 ((n+1)//2,); absmax: float32 (ceil(n/64),); out: flat (n,), float32, float16 or bfloat16.
    """
    n = out.numel()
    kernel, done = cuda_kernel(out), 0
    if kernel is not None and n >= BLOCK:
        done = n - n % BLOCK
        kernel.dequantize(codes[: done // 2], absmax[: done // BLOCK], table("code", out.device), out[:done])
    # A byte's two float32 levels are looked up as one float64: an eight-byte copy, no arithmetic on it.
    pair = table("pair", codes.device).view(torch.float64).view(-1)
    for start in range(done, n, _CHUNK_NUMEL):
        stop = min(n, start + _CHUNK_NUMEL)
        index = codes[start // 2 : (stop + 1) // 2].to(torch.int32)
        levels = torch.index_select(pair, 0, index).view(torch.float32)[: stop - start]
        full = (stop - start) // BLOCK * BLOCK
        scale = absmax[start // BLOCK : (stop + BLOCK - 1) // BLOCK]
        levels[:full].view(-1, BLOCK).mul_(scale[: full // BLOCK, None])
        levels[full:].mul_(scale[-1:])
        out[start:stop].copy_(levels)
    return out


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Double quantization: scales about their mean, in the dynamic 8-bit map, in blocks of 256.

    absmax: float32 (b,). Returns codes uint8 (b,), nested absmax float32 (ceil(b/256),) and the mean.
    The mean is `torch.mean`'s, as bitsandbytes takes it.
    """
    offset = absmax.mean()
    b = absmax.numel()
    short = -b % NESTED_BLOCK
    centred = torch.nn.functional.pad(absmax - offset, (0, short)).view(-1, NESTED_BLOCK)
    nested = centred.abs().amax(dim=1)
    # A group of equal scales has nested 0: 0/0 is then taken as code 0, which decodes to the mean.
    z = (centred * (1.0 / nested)[:, None]).clamp(-1.0, 1.0).nan_to_num_(-1.0)
    # In float64 and rounded once, as the fused multiply-add of the compiled original does.
    position = ((z + 1.0) * 0.5).double() * (SCALE_LUT_SIZE - 1) + 0.5
    lut = table("scale_lut", absmax.device)
    codes = lut[position.float().to(torch.int32).clamp_(0, SCALE_LUT_SIZE - 1)]
    return codes.view(-1)[:b].clone(), nested, float(offset)


def dequantize_scales(codes: torch.Tensor, nested: torch.Tensor, offset: float) -> torch.Tensor:
    """Scales from their double-quantized form. Returns float32 (b,), bit-equal to bitsandbytes."""
    levels = table("scale_map", codes.device)[codes.to(torch.int32)]
    scale = nested.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return levels * scale + offset
