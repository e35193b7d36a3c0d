"""The arithmetic of nf4-kv in plain torch: the reference, whose bytes every kernel must write.

A tensor is seen as rows of head_dim values, `(outer, tokens, inner, head_dim)`. Keys are centred per
channel over about 64 tokens; then rows are rotated by an unnormalized Hadamard transform and coded in
NF4 blocks whose scale is searched. Every float operation is one IEEE float32 operation in a stated
order and the search is in integers, so that C++ and Triton repeat it exactly. Pure, any thread.
Rejected: the mean over 32 tokens with blocks of 64 (same bits, KL 10% worse over nine texts); log2 and
exp2 for scales (no two libraries round them alike).
Source: QuaRot (Ashkboos et al. 2024) for the rotation, KIVI (Liu et al. 2024) for keys by channel,
StreamingLLM (Xiao et al. 2024) for the first tokens; the combination and its figures are in docs/codecs.md.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kvstore.errors import CodecError
from kvstore.kernels.reference import codes_of, packed
from kvstore.kernels.tables import table

GROUP = 64
"""Tokens that share a mean. A last group has 32 to 95."""
MIN_CENTRED = 8
KEY_BLOCK = 32
VALUE_BLOCK = 64
"""Errors of keys do nearly all the harm, so the bits of finer scales go to keys."""
SCALE_GROUP = 256
"""Scales that share a top exponent; also the tile of the kernels: 256 blocks are 32 or 64 KiB."""
MAX_ROTATION = 128
CLIPS = (0.8, 0.85, 0.9, 0.95, 1.0)
"""Tried scales, as fractions of the block's largest magnitude. Below 0.8 three thresholds fall into one
bucket of 16 steps, which the AVX2 search does not look up; 0.7 and 0.75 would gain 0.01 dB."""
MIN_MAGNITUDE = 1e-15
"""A block whose largest magnitude is below is coded as zeros: its squares would near underflow."""
ZERO_CODE = 7
REFUSED = "nf4-kv holds finite values whose squares are finite; keep these raw"

_SCALE_SHIFT = 17
"""Bits dropped from a float32 scale: 6 of mantissa stay. With 5 the KL of one text in four grew by a fifth."""
FINE = 192
"""Scale codes in single steps (three powers of two down from the top); the 63 below take four steps each
(four more powers of two), so that one large block does not blunt the scales beside it."""
_LARGEST_SCALE = float.fromhex("0x1.fep127")
"""Larger scales would round to infinity; NaN also fails the comparison."""


def rotation_size(head_dim: int) -> int:
    """The Hadamard size for rows of head_dim: the largest power of two that divides it, at most 128."""
    return min(head_dim & -head_dim, MAX_ROTATION)


def group_count(tokens: int) -> int:
    """How many means a run of tokens has: groups of 64, a rest below 32 joining the last one.

    None below 8 tokens, where a mean would cost a bit a value or more.
    """
    return max(1, (tokens + GROUP // 2) // GROUP) if tokens >= MIN_CENTRED else 0


def rotate(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Unnormalized Hadamard transform of each run of `size` values: its own inverse times `size`.

    rows: float32 (..., d), d divisible by size. Stage h = 1, 2, 4, ... replaces values j and j + h by
    their sum and difference.
    """
    shape = rows.shape
    y = rows.reshape(-1)
    h = 1
    while h < size:
        pairs = y.view(-1, 2, h)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1).view(-1)
        h *= 2
    return y.view(shape)


def group_means(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel means of each group of tokens, in 8 bits.

    x: float32 (outer, tokens, inner, d). Returns codes int8 (outer, groups, inner, d) and scales
    float32 (outer, groups, inner); a mean is code times scale. Sums run over tokens in order.
    """
    outer, tokens, inner, d = x.shape
    groups = group_count(tokens)
    means = torch.empty(outer, groups, inner, d, dtype=torch.float32, device=x.device)
    for g in range(groups):
        start, stop = g * GROUP, tokens if g == groups - 1 else (g + 1) * GROUP
        total = torch.zeros(outer, inner, d, dtype=torch.float32, device=x.device)
        for t in range(start, stop):
            total += x[:, t]
        means[:, g] = total * float(torch.tensor(1.0, device="cpu") / (stop - start))
    largest = means.abs().amax(dim=3)
    # A tensor over a tensor: on CUDA torch takes x / 127.0 as x times the rounded reciprocal.
    scale = largest / torch.full_like(largest, 127.0)
    scale = torch.where(scale < 1e-37, torch.zeros_like(scale), scale)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    codes = torch.round(means * inverse[..., None]).clamp_(-127, 127).to(torch.int8)
    return codes, scale


def expand_means(codes: torch.Tensor, scale: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mean of each token's group. Returns float32 (outer, tokens, inner, d)."""
    groups = codes.shape[1]
    means = codes.to(torch.float32) * scale[..., None]
    group = (torch.arange(tokens, device=codes.device) // GROUP).clamp_(max=groups - 1)
    return means[:, group]


@lru_cache(maxsize=16)
def search_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Level times 127 of the code of u/127 under each clip, for u = -127 ... 127; and the clips. Never to be written.

    Returns int16 (len(CLIPS), 255) and float32 (len(CLIPS),).
    """
    cpu = torch.device("cpu")
    u = torch.arange(-127, 128, dtype=torch.float64, device="cpu")
    levels = torch.round(table("code", cpu).double() * 127).to(torch.int16)
    rows = [torch.bucketize(u, table("thresholds", cpu).double() * (127 * clip)) for clip in CLIPS]
    return levels[torch.stack(rows)].to(device), torch.tensor(CLIPS, dtype=torch.float32, device=device)


def best_clips(blocks: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The clip whose levels point most nearly along each block.

    blocks: float32 (b, size); absmax: float32 (b,), at least MIN_MAGNITUDE. Each value is taken as an
    integer u = round(127 x / absmax); for each clip A = sum(u L), B = sum(L L) over its levels L; the
    largest A*A/B wins, the first of equals. Returns float32 (b,).
    """
    # A tensor over a tensor: torch takes 127.0 / x as 127 times the rounded reciprocal.
    u = torch.round(blocks * (torch.full_like(absmax, 127.0) / absmax)[:, None]).clamp_(-127, 127)
    index = u.to(torch.int32) + 127
    best = torch.full_like(absmax, -1.0)
    clips = torch.zeros_like(absmax)
    for clip, levels in zip(CLIPS, search_tables(blocks.device)[0], strict=True):
        level = levels[index].to(torch.float32)
        # Integers below 2**24 in float32: exact in any order of summation.
        a, b = (u * level).sum(dim=1), (level * level).sum(dim=1)
        score = a * a / b
        better = score > best
        best = torch.where(better, score, best)
        clips = torch.where(better, torch.full_like(clips, clip), clips)
    return clips


def code_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as bytes: steps down from their group's top, in float32 bits rounded to 6 bits of mantissa.

    scales: float32 (b,), not negative. Returns codes uint8 (b,): 255 - s for s < 192 steps, below that
    63 - (s - 192) / 4 but at least 1, and 0 for a zero scale; and tops int16 (ceil(b/256),): bits >> 17 of
    the code 255.
    """
    b = scales.numel()
    bits = (scales.view(torch.int32) + (1 << (_SCALE_SHIFT - 1))) >> _SCALE_SHIFT
    padded = torch.nn.functional.pad(bits, (0, -b % SCALE_GROUP)).view(-1, SCALE_GROUP)
    tops = padded.amax(dim=1)
    steps = tops[:, None] - padded
    codes = torch.where(steps < FINE, 255 - steps, 63 - ((steps - FINE + 2) >> 2)).clamp_(min=1)
    codes = torch.where(padded == 0, torch.zeros_like(codes), codes)
    return codes.view(-1)[:b].to(torch.uint8), tops.to(torch.int16)


def decode_scales(codes: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    """Scales from their bytes. Returns float32 (b,); what would lie below 0 is 0."""
    return scales_under(codes, tops.repeat_interleave(SCALE_GROUP)[: codes.numel()])


def scales_under(codes: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    """Scales from their bytes, each under a top of its own."""
    code = codes.to(torch.int32)
    steps = torch.where(code >= 256 - FINE, 255 - code, FINE + ((63 - code) << 2))
    bits = (tops.to(torch.int32) - steps).clamp_(min=0) << _SCALE_SHIFT
    return torch.where(code == 0, torch.zeros_like(bits), bits).view(torch.float32)


def scale_values(codes: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """`scales_under` of a few, in numpy, which is faster there. codes, tops: int32. Returns float32."""
    steps = np.where(codes >= 256 - FINE, 255 - codes, FINE + ((63 - codes) << 2))
    bits: np.ndarray = np.where(codes == 0, 0, np.maximum(tops - steps, 0) << _SCALE_SHIFT)
    return bits.astype(np.int32).view(np.float32)


@dataclass(frozen=True, slots=True)
class RotatedBlocks:
    """Coded rows: codes uint8 (b*block/2,), scales uint8 (b,), tops int16 (ceil(b/256),).

    error: float32 (b,), the squared error of each block in the rotated domain.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tops: torch.Tensor
    error: torch.Tensor


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two) by adding its halves until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def encode_rotated(rotated: torch.Tensor, block: int) -> RotatedBlocks:
    """Code rotated values in blocks of `block`; a short last block is padded with zeros.

    rotated: float32 (n,). A block's scale is x.x / x.L and not the least-squares x.L / L.L: the error is
    then at a right angle to x, so a query along a key sees no shrinking, and the 0.7% of the 8-bit scale
    costs nothing measurable. Raises CodecError where a value or a scale is not finite.
    """
    blocks = torch.nn.functional.pad(rotated, (0, -rotated.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    if not bool(torch.isfinite(absmax).all()):
        raise CodecError(REFUSED)
    small = absmax < MIN_MAGNITUDE
    absmax = torch.where(small, torch.ones_like(absmax), absmax)
    codes = codes_of(blocks * (1.0 / (absmax * best_clips(blocks, absmax)))[:, None])
    codes[small] = ZERO_CODE
    levels = table("code", blocks.device)[codes.to(torch.int32)]
    energy, cross, size = tree_sum(blocks * blocks), tree_sum(blocks * levels), tree_sum(levels * levels)
    energy[small], cross[small], size[small] = 0.0, 1.0, 0.0
    return under_tops(packed(codes.view(-1)), torch.stack((energy, cross, size)))


def under_tops(codes: torch.Tensor, sums: torch.Tensor) -> RotatedBlocks:
    """Coded blocks with their scales as bytes and their errors.

    codes: uint8 (b*block/2,), kept as they are; sums: float32 (3, b), x.x, x.L and L.L of each block. Raises
    CodecError where a scale is not finite.
    """
    energy, cross, size = sums
    exact = energy / cross
    if not bool((exact < _LARGEST_SCALE).all()):
        raise CodecError(REFUSED)
    scale_codes, tops = code_scales(exact)
    scale = decode_scales(scale_codes, tops)
    error = energy - scale * cross - scale * (cross - scale * size)
    return RotatedBlocks(codes, scale_codes, tops, error.clamp_(min=0.0))


def decode_rotated(coded: RotatedBlocks, block: int, size: int) -> torch.Tensor:
    """Rotated values times 1/size, so that rotating them once more gives the rows. Returns float32 (b*block,)."""
    pair = table("pair", coded.codes.device).view(torch.float64).view(-1)
    levels = torch.index_select(pair, 0, coded.codes.to(torch.int32)).view(torch.float32).view(-1, block)
    scales = decode_scales(coded.scales, coded.tops) * (1.0 / size)
    return (levels * scales[:, None]).view(-1)
