# Triton is installed only beside CUDA, and reads the source of its functions, not their types.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: ANN001, ANN202, N803, PLR0913, PLR0917
"""nf4-kv2 in Triton, from its parts right into the paged blocks of an engine: one launch for all chunks of a request.

A program has the tokens that share a mean of one layer of one tensor, and goes through them in order, since a turning
mean is what the one before it became (`reference_turn.unrolled`). A token's values over all heads are one vector, each
with a code, a scale and a channel of its own. What is written is what `cuda_kv` writes and the reference decodes, bit
for bit; the description of the work is `kernels.paging`. Never imported without a CUDA tensor in hand.
tests/kvstore/kernels/test_triton.py runs it in Triton's interpreter and compiles it for GPUs. No GPU has run it.
"""

import torch
import triton
import triton.language as tl

from kvstore.kernels import paging, reference_kv
from kvstore.kernels.cuda import EXACT, _rounded
from kvstore.kernels.cuda_kv import _rotated
from kvstore.kernels.tables import table

_FINE = tl.constexpr(reference_kv.FINE)
_GROUP = tl.constexpr(reference_kv.GROUP)
_FIELDS = tl.constexpr(len(paging.Field))
_OUT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _bytes_at(job, field: tl.constexpr):
    return tl.load(job + field).to(tl.pointer_type(tl.uint8))


@triton.jit
def _kept_value(job, row, lane, inside, width):
    """Values of a row that was kept in 16 bits."""
    kept = tl.load(job + 7).to(tl.pointer_type(tl.int16))
    bits = tl.load(kept + row * width + lane, mask=inside, other=0)
    half = bits.to(tl.float16, bitcast=True).to(tl.float32)
    brain = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.where(tl.load(job + 16) > 0, brain, half)


@triton.jit
def _mean_at(job, row, head, channel, inner, d, inside):
    """Decoded means of channels. row: of a group of a layer."""
    codes, exponents = _bytes_at(job, 3), _bytes_at(job, 4)
    code = tl.load(codes + row * inner * d + head * d + channel, mask=inside, other=0).to(tl.int8, bitcast=True)
    eights = (d + 7) // 8
    exponent = tl.load(exponents + (row * inner + head) * eights + channel // 8, mask=inside, other=0)
    return code.to(tl.float32) * (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _turn(job, layer, row, mean, head, channel, inner, d, inside):
    """From each mean to the next token's, and the chord by which that step bends: `reference_turn._steps`."""
    pairs = tl.load(job + 15)
    interleaved = tl.load(job + 17) > 0
    at = channel.to(tl.int64)
    turns = inside & (at < 2 * pairs)
    many = tl.maximum(pairs, 1)
    second = tl.where(interleaved, (at & 1) == 1, at >= pairs)
    pair = tl.where(interleaved, at >> 1, at % many)
    beside = tl.where(interleaved, at ^ 1, tl.where(second, at - pairs, at + pairs))
    other = _mean_at(job, row, head, tl.where(turns, beside, at), inner, d, turns)
    bits = tl.load(_bytes_at(job, 5) + (layer * inner + head) * ((pairs + 7) >> 3) + (pair >> 3), mask=turns, other=0)
    bent = turns & (((bits.to(tl.int64) >> (pair & 7)) & 1) == 1)
    angles = tl.load(job + 6).to(tl.pointer_type(tl.float32)) + layer * 2 * pairs + pair
    sine = tl.load(angles, mask=bent, other=0.0)
    chord = tl.load(angles + pairs, mask=bent, other=0.0)
    half = chord * 0.5
    to_re = -(mean * half) - other * sine
    to_im = other * sine - mean * half
    step = tl.where(turns, tl.where(second, to_im, to_re), 0.0)
    return step, tl.where(turns, chord, 0.0)


@triton.jit
def _store(job, layer, token, value, lane, head, channel, inside, block_tokens, strides, OUT: tl.constexpr):
    block_stride, token_stride, head_stride = strides
    place = tl.load(tl.load(job + 9).to(tl.pointer_type(tl.int32)) + token // block_tokens).to(tl.int64)
    base = tl.load(tl.load(job + 10).to(tl.pointer_type(tl.int64)) + layer).to(tl.pointer_type(OUT))
    out = base + place * block_stride + (token % block_tokens) * token_stride + head * head_stride + channel
    tl.store(out, _rounded(value, out), mask=inside & (lane * 0 + place >= 0))


@triton.jit
def _decode_paged(
    jobs, levels, layers, most_groups, inner, d, block_tokens, block_stride, token_stride, head_stride,
    WIDTH: tl.constexpr, ROTATION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = program % most_groups
    layer = program // most_groups % layers
    job = jobs + program // most_groups // layers * _FIELDS
    codes, scales, tops = _bytes_at(job, 0), _bytes_at(job, 1), _bytes_at(job, 2)
    kept_rows = tl.load(job + 8).to(tl.pointer_type(tl.int16))
    coded, lead, groups, shift = tl.load(job + 11), tl.load(job + 12), tl.load(job + 13), tl.load(job + 14)
    kept = tl.load(job + 18)
    strides = (block_stride, token_stride, head_stride)
    width = inner * d
    lane = tl.arange(0, WIDTH)
    head, channel, inside = lane // d, lane % d, lane < width
    row = layer * groups + tl.minimum(group, tl.maximum(groups - 1, 0))
    centred = lane * 0 + groups > 0
    mean = _mean_at(job, row, head, channel, inner, d, inside & centred)
    by, chord = _turn(job, layer, row, mean, head, channel, inner, d, inside & centred)
    turning = lane * 0 + tl.load(job + 15) > 0
    for token in range(tl.where(group == 0, lead, 0)):
        value = _kept_value(job, layer * kept + token, lane, inside, width)
        _store(job, layer, token, value, lane, head, channel, inside, block_tokens, strides, OUT)
    start = group * _GROUP
    stop = tl.where(group == groups - 1, coded, tl.minimum(start + _GROUP, coded))
    stop = tl.where(group >= tl.where(groups > 0, groups, most_groups), start, stop)
    for t in range(start, stop):
        flat = (layer * coded + t) * width + lane
        block = flat >> shift
        top = tl.load(tops + 2 * (block >> 8), mask=inside, other=0).to(tl.int32)
        top |= tl.load(tops + 2 * (block >> 8) + 1, mask=inside, other=0).to(tl.int32) << 8
        code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        steps = tl.where(code >= 256 - _FINE, 255 - code, _FINE + ((63 - code) << 2))
        bits = tl.where(code == 0, 0, tl.maximum(top - steps, 0) << 17)
        scale = bits.to(tl.float32, bitcast=True) * (1.0 / (1 << ROTATION))
        byte = tl.load(codes + (flat >> 1), mask=inside, other=0).to(tl.int32)
        level = tl.load(levels + tl.where((flat & 1) == 1, byte & 15, byte >> 4))
        value = _rotated(level * scale, WIDTH, ROTATION)
        value = tl.where(centred, value + mean, value)
        found = lane * 0 + tl.load(kept_rows + lead + t).to(tl.int64)
        exact = _kept_value(job, layer * kept + tl.maximum(found, 0), lane, inside & (found >= 0), width)
        value = tl.where(found >= 0, exact, value)
        _store(job, layer, lead + t, value, lane, head, channel, inside, block_tokens, strides, OUT)
        mean = tl.where(turning, mean + by, mean)
        by = by - chord * mean


def decode(work: "paging.Work") -> None:
    """Have the stream that is current decode all of it, in one launch."""
    jobs, where = work.jobs, work.where
    levels = table("code", jobs.device)
    width = where.inner * where.d
    with torch.cuda.device(jobs.get_device()):
        _decode_paged[(work.count * where.layers * work.most_groups,)](
            jobs, levels, where.layers, work.most_groups, where.inner, where.d, where.block_tokens, *where.strides,
            WIDTH=triton.next_power_of_2(width), ROTATION=reference_kv.rotation_size(where.d).bit_length() - 1,
            OUT=_OUT[where.dtype], num_warps=4, **EXACT,
        )  # fmt: skip
