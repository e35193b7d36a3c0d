# Triton is installed only beside CUDA, and reads the source of its functions, not their types.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"
# ruff: noqa: ANN001, ANN202, N803
"""NF4 in Triton: the reference's bytes on CUDA. Never imported without a CUDA tensor in hand.

Written against `kernels.reference`, the oracle of tests/kvstore/kernels/test_cuda.py, which runs wherever a GPU is, and
of tests/kvstore/kernels/test_triton.py, which runs these kernels in Triton's interpreter and compiles them for a GPU.
No GPU has run them yet. nf4-kv is `cuda_kv`.
"""

import torch
import triton
import triton.language as tl

_BLOCKS = 16
"""NF4 blocks a program: 1,024 values, 8 for each thread of four warps."""
EXACT = {"enable_fp_fusion": False}
"""A product contracted into a sum rounds once instead of twice: other bytes."""


@triton.jit
def _codes(z, thresholds):
    count = tl.zeros(z.shape, dtype=tl.int32)
    for i in tl.static_range(15):
        count += (z > tl.load(thresholds + i)).to(tl.int32)
    return count


@triton.jit
def _encode(x, codes, absmax, thresholds, blocks, B: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    pair = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (block < blocks)[:, None]
    first = tl.load(x + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    # As integers, so that NaN counts as the largest, as in the C++ kernel.
    bits = tl.maximum(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, second.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, scale, mask=block < blocks)
    # div_rn: plain division may be approximate on CUDA.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.maximum(scale, 1e-38))[:, None]
    packed = (_codes(first * inverse, thresholds) << 4) | _codes(second * inverse, thresholds)
    tl.store(codes + pair, packed.to(tl.uint8), mask=inside)


@triton.jit
def _rounded(value, out):
    """To nearest even in out's type. bfloat16 by hand: Triton's interpreter truncates it."""
    if out.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def _decode(codes, absmax, levels, out, blocks, B: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    pair = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (block < blocks)[:, None]
    byte = tl.load(codes + pair, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + block, mask=block < blocks, other=0.0)[:, None]
    tl.store(out + 2 * pair, _rounded(tl.load(levels + (byte >> 4)) * scale, out), mask=inside)
    tl.store(out + 2 * pair + 1, _rounded(tl.load(levels + (byte & 15)) * scale, out), mask=inside)


def quantize(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, thresholds: torch.Tensor) -> None:
    """Full blocks of 64. x: flat (64 b,); codes: uint8 (32 b,); absmax: float32 (b,); all on one CUDA device."""
    blocks = absmax.numel()
    with torch.cuda.device(x.get_device()):
        _encode[(triton.cdiv(blocks, _BLOCKS),)](x, codes, absmax, thresholds, blocks, B=_BLOCKS, **EXACT)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, out: torch.Tensor) -> None:
    """Full blocks of 64. codes: uint8 (32 b,); absmax: float32 (b,); out: flat (64 b,); all on one CUDA device."""
    blocks = absmax.numel()
    with torch.cuda.device(out.get_device()):
        _decode[(triton.cdiv(blocks, _BLOCKS),)](codes, absmax, levels, out, blocks, B=_BLOCKS, **EXACT)
