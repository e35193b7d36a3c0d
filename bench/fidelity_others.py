"""Forms of KV caches that others use, as bench/fidelity.py compares them: K and V in, K and V and bits a value out.

Each is written from its public description, for its figures and not for speed: what is decoded, and all side data
counted. K and V are (layers, tokens, heads, dim), tokens and dim multiples of 32.
"""

import math
from functools import cache

import torch

Coded = tuple[torch.Tensor, torch.Tensor, float]
"""K and V after a codec, and bits a value."""


def bitsandbytes_nf4(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """NF4 of bitsandbytes with nested scales."""
    import bitsandbytes.functional as bnb

    def both(x: torch.Tensor) -> torch.Tensor:
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        return bnb.dequantize_4bit(packed, state).view_as(x)

    return both(k), both(v), 4 + 8 / 64 + 32 / (64 * 256)


def one_scale(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """NF4 levels under one scale for the whole tensor: the naive design."""
    from kvstore.kernels.reference import codes_of
    from kvstore.kernels.tables import table

    def both(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max()
        return table("code", x.device)[codes_of(x / scale).int()] * scale

    return both(k), both(v), 4.0


def kivi_int4(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """Asymmetric int4 as KIVI has it: keys a channel over 32 tokens, values a token over 32 channels, fp16 scales."""

    def quantized(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True).half().float(), x.amax(dim, keepdim=True).half().float()
        step = ((high - low) / 15).half().float().clamp(min=1e-8)
        return torch.round((x - low) / step).clamp(0, 15) * step + low

    layers, tokens, heads, d = k.shape
    keys = quantized(k.view(layers, tokens // 32, 32, heads, d), 2).view_as(k)
    return keys, quantized(v.view(layers, tokens, heads, d // 32, 32), 4).view_as(v), 4 + 32 / 32


def fp8(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """E4M3 under one float32 scale for each layer and head, as engines keep an fp8 cache at its best."""

    def both(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    return both(k), both(v), 8.0


def nvfp4(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """NVFP4: E2M1 in blocks of 16 along head_dim under E4M3 scales, and one float32 scale for each layer."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middles = (levels[1:] + levels[:-1]) / 2

    def both(x: torch.Tensor) -> torch.Tensor:
        whole = x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)[..., None] / (6 * 448)
        blocks = x.unflatten(-1, (-1, 16))
        scale = (blocks.abs().amax(dim=-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
        z = blocks / scale.clamp(min=1e-12)
        return (levels[torch.bucketize(z.abs(), middles)] * z.sign() * scale).flatten(-2)

    return both(k), both(v), 4 + 8 / 16


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Runs of the largest power of two that divides the last dimension, transformed; its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    y, step = x.unflatten(-1, (-1, size)), 1
    while step < size:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y, step = torch.stack((a + b, a - b), dim=-2).flatten(-3), step * 2
    return y.flatten(-2) / math.sqrt(size)


def q4_0_rotated(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """llama.cpp's q4_0, blocks of 32 under a float16 scale, of rows turned by a Hadamard transform."""

    def both(x: torch.Tensor) -> torch.Tensor:
        blocks = hadamard(x).unflatten(-1, (-1, 32))
        most = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
        scale = (most / -8).half().float()
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return hadamard(((blocks * inverse + 8.5).floor().clamp(0, 15) - 8).mul(scale).flatten(-2))

    return both(k), both(v), 4 + 16 / 32


@cache
def gaussian_levels(bits: int) -> torch.Tensor:
    """The levels that serve a normal distribution best (Lloyd and Max)."""
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    levels = torch.erfinv(torch.linspace(-1, 1, 2**bits + 2, dtype=torch.float64)[1:-1]) * math.sqrt(2)
    for _ in range(500):
        of = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, of, weight)
        levels = torch.zeros_like(levels).index_add_(0, of, weight * x) / mass
    return levels.float()


def turboquant(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """TurboQuant's form for least squared error: rows turned at random, Lloyd-Max levels, a float16 norm a row."""
    levels = gaussian_levels(4)
    middles = (levels[1:] + levels[:-1]) / 2
    d = k.shape[-1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(7)))[0]

    def both(x: torch.Tensor) -> torch.Tensor:
        turned = x @ rotation
        scale = (turned.norm(dim=-1, keepdim=True)).half().float() / math.sqrt(d)
        coded = levels[torch.bucketize(turned / scale.clamp(min=1e-12), middles)]
        return coded * scale @ rotation.T

    return both(k), both(v), 4 + 16 / d
