# Triton is installed only beside CUDA, and reads the source of its functions, not their types.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: ANN001, ANN202, N803, N806, PLR0913, PLR0917
"""nf4-kv in Triton: the reference's bytes on CUDA. Never imported without a CUDA tensor in hand.

Three kernels: means by channel, coding, decoding, each one pass over the tensor; scales become bytes in torch
(`reference_kv.under_tops`), whose groups of 256 are larger than a program's tile. Sums of floats are written out in the
reference's order, and products are never contracted into sums (`EXACT`): both would change bytes.
Written against `kernels.reference_kv`, the oracle of tests/kvstore/kernels/test_cuda.py, which runs wherever a GPU is,
and of tests/kvstore/kernels/test_triton.py, which runs these kernels in Triton's interpreter and compiles them for a
GPU. No GPU has run them yet.
"""

import torch
import triton
import triton.language as tl

from kvstore.kernels import reference_kv, reference_turn
from kvstore.kernels.cpu import Rotary, Rows, Turns
from kvstore.kernels.cuda import EXACT, _codes, _rounded
from kvstore.kernels.reference_content import energies
from kvstore.kernels.tables import table

TILE = 2048
"""Values a program: whole rotations and blocks, 16 for each thread of four warps."""
_FINE = tl.constexpr(reference_kv.FINE)
_CLIPS = tl.constexpr(len(reference_kv.CLIPS))
_GROUP = tl.constexpr(reference_kv.GROUP)
_MIN_MAGNITUDE = tl.constexpr(reference_kv.MIN_MAGNITUDE)
_ZERO_CODE = tl.constexpr(reference_kv.ZERO_CODE)
_NOT_FINITE = tl.constexpr(0x7F800000)
_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds to the nearest even integer, on every device alike."""


@triton.jit
def _rotated(x, N: tl.constexpr, STAGES: tl.constexpr):
    """N values, each run of 2**STAGES of them by the Hadamard transform: `reference_kv.rotate`."""
    for stage in tl.static_range(STAGES):
        first, second = tl.split(tl.permute(tl.reshape(x, [N >> (stage + 1), 2, 1 << stage]), [0, 2, 1]))
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 2, 1]), [N])
    return x


@triton.jit
def _tree(x, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """Sums of rows of 2**STAGES by adding halves: `reference_kv.tree_sum`."""
    for stage in tl.static_range(STAGES):
        first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, 1 << (STAGES - 1 - stage)]), [0, 2, 1]))
        x = first + second
    return tl.reshape(x, [ROWS])


@triton.jit
def _means(x, codes, scales, means, tokens, inner, d, stride, groups, D: tl.constexpr):
    """One group of tokens of one head a program, its tokens added in order."""
    program = tl.program_id(0).to(tl.int64)
    group, slab, head = program // inner % groups, program // inner // groups, program % inner
    channel = tl.arange(0, D)
    start = group * _GROUP
    stop = tl.where(group == groups - 1, tokens, start + _GROUP)
    total = tl.zeros([D], tl.float32)
    for token in range(start, stop):
        at = slab * stride + (token * inner + head) * d + channel
        total += tl.load(x + at, mask=channel < d, other=0.0).to(tl.float32)
    one = tl.full([D], 1.0, tl.float32)
    mean = total * tl.div_rn(one, one * (stop - start))
    most = tl.max(mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(one * most, one * 127.0)
    scale = tl.where(scale < 1e-37, 0.0, scale)
    scaled = mean * tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale, one)), 0.0)
    # Comparisons in this order put NaN in range too: what it converts to must be defined.
    scaled = tl.where(scaled > -127.0, tl.where(scaled < 127.0, scaled, 127.0), -127.0)
    code = (scaled + _TO_INTEGER) - _TO_INTEGER
    tl.store(codes + program * d + channel, code.to(tl.int8), mask=channel < d)
    tl.store(means + program * d + channel, code * scale, mask=channel < d)
    tl.store(scales + program + channel, scale, mask=channel == 0)


@triton.jit
def _mean_of(means, slab, within, width, groups, inside, GROUP: tl.constexpr):
    """The mean of each value's channel in its group of GROUP tokens."""
    group = tl.minimum(within // width // GROUP, groups - 1)
    return tl.load(means + (slab * groups + group) * width + within % width, mask=inside, other=0.0)


@triton.jit
def _best_clips(rows, absmax, search, clips):
    """`reference_kv.best_clips`: sums of integers, exact in any order."""
    by = tl.div_rn(tl.full(absmax.shape, 127.0, tl.float32), absmax)
    u = (rows * by[:, None] + _TO_INTEGER) - _TO_INTEGER
    u = tl.minimum(tl.maximum(u, -127.0), 127.0).to(tl.int32)
    best = tl.full(absmax.shape, -1.0, tl.float32)
    found = tl.zeros(absmax.shape, tl.float32)
    for i in tl.static_range(_CLIPS):
        level = tl.load(search + i * 255 + 127 + u).to(tl.int32)
        cross = tl.sum(u * level, axis=1).to(tl.float32)
        size = tl.sum(level * level, axis=1).to(tl.float32)
        # A block of zeros has no size: any score below the others' does.
        score = tl.div_rn(cross * cross, tl.where(size > 0, size, 1.0))
        found = tl.where(score > best, tl.load(clips + i), found)
        best = tl.where(score > best, score, best)
    return found


@triton.jit
def _encode(
    x, means, codes, sums, thresholds, levels, search, clips, slab_values, width, stride, groups, n, blocks,
    TILE: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile a program. ROTATION, BLOCK: powers of two. sums: energy, cross and size of each block, or inf."""
    ROWS: tl.constexpr = TILE >> BLOCK
    tile = tl.program_id(0).to(tl.int64)
    flat = tile * TILE + tl.arange(0, TILE)
    slab = flat // slab_values
    within = flat - slab * slab_values
    v = tl.load(x + slab * stride + within, mask=flat < n, other=0.0).to(tl.float32)
    if CENTRED:
        v = v - _mean_of(means, slab, within, width, groups, flat < n, GROUP)
    rows = tl.reshape(_rotated(v, TILE, ROTATION), [ROWS, 1 << BLOCK])
    most = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax, refused = most.to(tl.float32, bitcast=True), most >= _NOT_FINITE
    plain = refused | (absmax < _MIN_MAGNITUDE)
    absmax = tl.where(plain, 1.0, absmax)
    rows = tl.where(plain[:, None], 0.0, rows)
    by = absmax * _best_clips(rows, absmax, search, clips)
    code = _codes(rows * tl.div_rn(tl.full([ROWS], 1.0, tl.float32), by)[:, None], thresholds)
    code = tl.where(plain[:, None], _ZERO_CODE, code)
    first, second = tl.split(tl.reshape(code, [TILE // 2, 2]))
    pair = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    tl.store(codes + pair, ((first << 4) | second).to(tl.uint8), mask=pair < blocks * (1 << (BLOCK - 1)))
    level = tl.load(levels + code)
    block = tile * ROWS + tl.arange(0, ROWS)
    energy = tl.where(refused, float("inf"), _tree(rows * rows, ROWS, BLOCK))
    tl.store(sums + block, energy, mask=block < blocks)
    tl.store(sums + blocks + block, tl.where(plain, 1.0, _tree(rows * level, ROWS, BLOCK)), mask=block < blocks)
    tl.store(sums + 2 * blocks + block, tl.where(plain, 0.0, _tree(level * level, ROWS, BLOCK)), mask=block < blocks)


@triton.jit
def _decode(
    codes, scales, tops, means, levels, out, slab_values, width, stride, groups, n, blocks,
    TILE: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile a program: scales from their bytes (`reference_kv.decode_scales`), levels, rotation, means."""
    ROWS: tl.constexpr = TILE >> BLOCK
    tile = tl.program_id(0).to(tl.int64)
    block = tile * ROWS + tl.arange(0, ROWS)
    top = tl.load(tops + block // 256, mask=block < blocks, other=0).to(tl.int32)
    code = tl.load(scales + block, mask=block < blocks, other=0).to(tl.int32)
    steps = tl.where(code >= 256 - _FINE, 255 - code, _FINE + ((63 - code) << 2))
    bits = tl.where(code == 0, 0, tl.maximum(top - steps, 0) << 17)
    scale = bits.to(tl.float32, bitcast=True) * (1.0 / (1 << ROTATION))
    pair = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    byte = tl.load(codes + pair, mask=pair < blocks * (1 << (BLOCK - 1)), other=0).to(tl.int32)
    level = tl.reshape(tl.join(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15))), [ROWS, 1 << BLOCK])
    v = _rotated(tl.reshape(level * scale[:, None], [TILE]), TILE, ROTATION)
    flat = tile * TILE + tl.arange(0, TILE)
    slab = flat // slab_values
    within = flat - slab * slab_values
    if CENTRED:
        v = v + _mean_of(means, slab, within, width, groups, flat < n, GROUP)
    tl.store(out + slab * stride + within, _rounded(v, out), mask=flat < n)


def kv_means(
    x: torch.Tensor, rows: Rows, rotary: Rotary | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`reference_kv.group_means` of rows of x, the decoded means of each group, and with a rotary their
    `kv_content`.
    """
    shape = (rows.outer, rows.groups, rows.inner)
    codes = torch.empty(*shape, rows.d, dtype=torch.int8, device=x.device)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    means = torch.empty(*shape, rows.d, dtype=torch.float32, device=x.device)
    place = rows.tokens, rows.inner, rows.d, rows.stride, rows.groups
    with torch.cuda.device(x.get_device()):
        _means[(scales.numel(),)](
            x, codes, scales, means, *place, D=triton.next_power_of_2(rows.d), num_warps=1, **EXACT
        )
    return codes, scales, means, None if rotary is None else energies(reference_turn.seen(x, rows), rotary)


def kv_expand(rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decoded means of each group. codes: int8 (outer, groups, inner, d). Returns float32, that shape."""
    del rows
    return codes.to(torch.float32) * scales[..., None]


kv_content, kv_distance, kv_missed = reference_turn.kv_content, reference_turn.kv_distance, reference_turn.kv_missed
kv_along = reference_turn.kv_along
kv_phases, kv_sums = reference_turn.kv_phases, reference_turn.kv_sums
kv_code_means, kv_expand_eights = reference_turn.kv_code_means, reference_turn.kv_expand_eights
"""By torch on the device, operation by operation, so the reference's bytes; means that turn are unrolled by it, too."""


def _unrolled(rows: Rows, means: torch.Tensor | None, turns: Turns | None) -> tuple[torch.Tensor | None, int, int]:
    """Means, how many a slab has, and how many tokens share one: turning ones are each token's own."""
    if means is None or turns is None:
        return means, rows.groups, reference_kv.GROUP
    return reference_turn.unrolled(rows, means, turns), rows.tokens, 1


def kv_encode(
    x: torch.Tensor, rows: Rows, means: torch.Tensor | None, turns: Turns | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Codes, scales, tops and errors as `reference_kv.encode_rotated` gives; CodecError where not finite."""
    means, groups, group = _unrolled(rows, means, turns)
    n, blocks = _lengths(rows)
    codes = torch.empty(blocks * rows.block // 2, dtype=torch.uint8, device=x.device)
    sums = torch.empty(3, blocks, dtype=torch.float32, device=x.device)
    tables = (table("thresholds", x.device), table("code", x.device), *reference_kv.search_tables(x.device))
    mean = sums if means is None else means  # never read where there are none
    with torch.cuda.device(x.get_device()):
        _encode[(triton.cdiv(n, TILE),)](
            x, mean, codes, sums, *tables, *_place(rows, groups), n, blocks, **_sizes(rows, group)
        )
    coded = reference_kv.under_tops(codes, sums)
    return coded.codes, coded.scales, coded.tops, coded.error


def kv_decode(
    coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    means: torch.Tensor | None,
    rows: Rows,
    out: torch.Tensor,
    turns: Turns | None = None,
) -> None:
    """Rows of out from codes, scales and tops, whose lengths the caller has checked."""
    means, groups, group = _unrolled(rows, means, turns)
    n, blocks = _lengths(rows)
    levels = table("code", out.device)
    mean = levels if means is None else means  # never read where there are none
    with torch.cuda.device(out.get_device()):
        _decode[(triton.cdiv(n, TILE),)](
            *coded, mean, levels, out, *_place(rows, groups), n, blocks, **_sizes(rows, group)
        )


def _lengths(rows: Rows) -> tuple[int, int]:
    n = rows.outer * rows.tokens * rows.inner * rows.d
    return n, -(-n // rows.block)


def _place(rows: Rows, groups: int) -> tuple[int, int, int, int]:
    width = rows.inner * rows.d
    return rows.tokens * width, width, rows.stride, groups


def _sizes(rows: Rows, group: int) -> dict[str, object]:
    return {
        "TILE": TILE,
        "ROTATION": rows.size.bit_length() - 1,
        "CENTRED": rows.groups > 0,
        "GROUP": group,
        "BLOCK": rows.block.bit_length() - 1,
        **EXACT,
    }
