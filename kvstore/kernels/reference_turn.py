"""The arithmetic of nf4-kv2's means in plain torch: the reference, whose bytes every kernel must write.

RoPE turns each pair of a key's channels by an angle a token. What all keys share turns with it, so its mean over 64
tokens is near zero where the pair is fast. Here a pair is turned back first, then averaged; the mean is stored as it is
at the group's first token, and turned forward one token at a time. Angles are stored as tan(w/2): sine and cosine are
then one division, on every machine alike. Each step is one IEEE float32 operation in a stated order.
The functions have the signatures of a kernel (`kernels.KvKernel`). Pure, any thread.
"""

import numpy as np
import torch

from kvstore.kernels.cpu import Along, Phases, Rotary, Rows, Turns
from kvstore.kernels.reference_content import distances, energies, missed
from kvstore.kernels.reference_kv import (
    GROUP,
    RotatedBlocks,
    decode_rotated,
    encode_rotated,
    rotate,
)

EIGHT = 8
"""Channels that share the exponent of their means: one bias of hundreds costs its neighbours alone their precision."""
LARGEST = 127.25
"""Steps that the largest mean of eight has at most. A quarter over 127 is 127 as well: so it is found again where only
rounding made the mean larger."""
MEAN_TOP = 246
"""The largest exponent: 127 * 2**(246 - 127) is finite."""
LAG_SUMS = 8


def seen(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The rows that `rows` names, as a view (outer, tokens, inner, d)."""
    width = rows.inner * rows.d
    return x.as_strided((rows.outer, rows.tokens, rows.inner, rows.d), (rows.stride, width, rows.d, 1))


def groups_of(rows: Rows) -> list[tuple[int, int]]:
    """Where each group of tokens begins and ends."""
    last = rows.groups - 1
    return [(g * GROUP, rows.tokens if g == last else (g + 1) * GROUP) for g in range(rows.groups)]


def paired(x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two channels of each turning pair. x: (..., d). Returns (..., channels / 2) twice."""
    half = rotary.channels // 2
    turning = x[..., : rotary.channels]
    return (turning[..., ::2], turning[..., 1::2]) if rotary.interleaved else (turning[..., :half], turning[..., half:])


def angles(tangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sine of w, and the chord 2 - 2 cos w, where tangents are tan(w/2)."""
    one = torch.ones_like(tangents)
    inverse = one / (one + tangents * tangents)
    return (tangents + tangents) * inverse, tangents * tangents * 4.0 * inverse


def lag_sums(x: torch.Tensor, rows: Rows, rotary: Rotary, sampled: int, lags: tuple[int, ...]) -> torch.Tensor:
    """Of each pair over the first `sampled` groups: energy without a still mean, energy, sums of z[t] conj z[t-lag].

    Returns float32 (outer, inner, pairs, 8): the sums as real and imaginary parts, lag by lag.
    """
    both = paired(seen(x, rows).to(torch.float32), rotary)
    found = torch.zeros(*both[0][:, 0].shape, LAG_SUMS, dtype=torch.float32, device=x.device)
    for start, stop in groups_of(rows)[:sampled]:
        re, im = both[0][:, start:stop], both[1][:, start:stop]
        a, b, whole = (torch.zeros_like(re[:, 0]) for _ in range(3))
        for t in range(stop - start):
            a, b = a + re[:, t], b + im[:, t]
            whole += re[:, t] * re[:, t] + im[:, t] * im[:, t]
        found[..., 0] += whole - (a * a + b * b) / torch.full_like(a, stop - start)
        found[..., 1] += whole
        for at, lag in enumerate(lags):
            a, b = torch.zeros_like(a), torch.zeros_like(b)
            for t in range(lag, stop - start):
                a += re[:, t] * re[:, t - lag] + im[:, t] * im[:, t - lag]
                b += im[:, t] * re[:, t - lag] - re[:, t] * im[:, t - lag]
            found[..., 2 + 2 * at] += a
            found[..., 3 + 2 * at] += b
    return found


def kv_phases(
    x: torch.Tensor, rows: Rows, rotary: Rotary, how: Phases
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What keys show of how they turn, from `lag_sums`: energy e without a still mean, energy E, sums L of three lags.

    On the CPU, each sum in the order of pairs or heads: power float64 (outer, inner): of min(e, |E - whole |L3||) over
    the pairs of a head; pooled float64 (outer, pairs, 3, 2): of L / power over heads; shown bool (outer, pairs):
    whether some head's |L3| > seen E and whole |L3| - (E - e) > worth power; heads int32 (outer,): how many show it of
    a pair.
    """
    sums = lag_sums(x, rows, rotary, how.sampled, tuple(how.lags)).cpu().to(torch.float64)
    still, whole = sums[..., 0], sums[..., 1]
    square = sums[..., -2] * sums[..., -2] + sums[..., -1] * sums[..., -1]
    last = torch.from_numpy(np.sqrt(square.numpy()))  # torch's may be off by a unit in the last place
    turned = (whole - last * how.whole).abs()
    power = torch.zeros(rows.outer, rows.inner, dtype=torch.float64, device="cpu")
    for least in torch.where(still < turned, still, turned).unbind(-1):
        power += least
    power = torch.where(power > 1e-30, power, 1e-30)
    shown = (last > whole * how.seen) & (last * how.whole - (whole - still) > power[..., None] * how.worth)
    pooled = torch.zeros(sums[:, 0, :, 2:].shape, dtype=torch.float64, device="cpu")
    for head in range(rows.inner):
        pooled += sums[:, head, :, 2:] / power[:, head, None, None]
    heads = shown.any(dim=2).sum(dim=1).to(torch.int32)
    return power, pooled.view(*pooled.shape[:2], -1, 2), shown.any(dim=1), heads


def kv_sums(
    x: torch.Tensor, rows: Rows, rotary: Rotary, tangents: torch.Tensor | None, *, content: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sums over each group as it stands and turned back, and the energy that turning means take beyond still ones.

    tangents: float32 (outer, pairs), or None. Returns float32 (outer, groups, inner, d) twice (the first again without
    tangents), (outer, inner, pairs), which without tangents is not to be read, and where asked for `kv_content`.
    """
    values = seen(x, rows).to(torch.float32)
    still = torch.zeros(rows.outer, rows.groups, rows.inner, rows.d, dtype=torch.float32, device=x.device)
    for g, (start, stop) in enumerate(groups_of(rows)):
        for t in range(start, stop):
            still[:, g] += values[:, t]
    gains = torch.zeros(rows.outer, rows.inner, rotary.channels // 2, dtype=torch.float32, device=x.device)
    found = energies(values, rotary) if content else None
    if tangents is None:
        return still, still, gains, found
    turned = torch.zeros_like(still)
    for g, (start, stop) in enumerate(groups_of(rows)):
        own = paired(still[:, g], rotary)
        both = _turned_back(paired(values[:, start:stop], rotary), tangents)
        for to, total in zip(paired(turned[:, g], rotary), both, strict=True):
            to.copy_(total)
        more = both[0] * both[0] + both[1] * both[1] - (own[0] * own[0] + own[1] * own[1])
        gains += more / torch.full_like(more, stop - start)
    return still, turned, gains, found


def _turned_back(pairs: tuple[torch.Tensor, torch.Tensor], tangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of one group over its tokens, each turned back to the first. pairs: (outer, n, inner, pairs) twice."""
    re, im = pairs
    sine, chord = (part[:, None] for part in angles(tangents))
    cosine = torch.ones_like(chord) - chord * 0.5
    c, s = torch.ones_like(cosine), torch.zeros_like(sine)
    a, b = torch.zeros_like(re[:, 0]), torch.zeros_like(re[:, 0])
    for t in range(re.shape[1]):
        a += re[:, t] * c + im[:, t] * s
        b += im[:, t] * c - re[:, t] * s
        c, s = c * cosine - s * sine, c * sine + s * cosine
    return a, b


def bits_of(turning: torch.Tensor, pairs: int) -> torch.Tensor:
    """Which pairs turn, from bytes (..., ceil(pairs/8)), low bits first. Returns bool (..., pairs)."""
    at = torch.arange(8, device=turning.device, dtype=torch.uint8)
    return ((turning[..., None] >> at) & 1).flatten(-2)[..., :pairs].bool()


def bytes_of(mask: np.ndarray) -> np.ndarray:
    """The bytes that `bits_of` reads."""
    return np.packbits(mask, axis=-1, bitorder="little")


def kv_code_means(
    rows: Rows, turns: Turns | None, still: torch.Tensor, turned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of 8 bits under a power of two for each 8 channels, of the frame that each pair takes.

    Returns codes int8 (outer, groups, inner, d), exponents uint8 (outer, groups, inner, ceil(d/8)), and the means.
    """
    total = still
    if turns is not None:
        total = still.clone()
        mask = bits_of(turns.turning, turns.rotary.channels // 2)[:, None]
        for to, other in zip(paired(total, turns.rotary), paired(turned, turns.rotary), strict=True):
            to.copy_(torch.where(mask, other, to))
    counts = torch.tensor([stop - start for start, stop in groups_of(rows)], dtype=torch.float32, device="cpu")
    mean = total * (1.0 / counts).to(total.device)[None, :, None, None]
    eights = torch.nn.functional.pad(mean, (0, -rows.d % EIGHT)).view(*total.shape[:3], -1, EIGHT)
    most = eights.abs().amax(dim=-1)
    step = (most / torch.full_like(most, LARGEST)).view(torch.int32)
    exponent = (step >> 23) + ((step & 0x7FFFFF) != 0).to(torch.int32)
    exponent = torch.where(step < 0x00800000, torch.zeros_like(exponent), exponent).clamp_(max=MEAN_TOP)
    inverse = torch.where(exponent > 0, (254 - exponent) << 23, torch.zeros_like(exponent)).view(torch.float32)
    scaled = torch.nan_to_num(eights * inverse[..., None], nan=-127.0)
    codes = torch.round(scaled.clamp(-127, 127)).to(torch.int8)
    codes, scales = codes.flatten(-2)[..., : rows.d].contiguous(), exponent.to(torch.uint8)
    return codes, scales, kv_expand_eights(rows, codes, scales)


def kv_expand_eights(rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Means as floats (outer, groups, inner, d)."""
    steps = (scales.to(torch.int32) << 23).view(torch.float32)
    return codes.to(torch.float32) * steps.repeat_interleave(EIGHT, dim=-1)[..., : rows.d]


def unrolled(rows: Rows, means: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    """The mean of each token, float32 (outer, tokens, inner, d)."""
    groups = groups_of(rows)
    if turns is None:
        return torch.cat([means[:, g : g + 1].expand(-1, b - a, -1, -1) for g, (a, b) in enumerate(groups)], dim=1)
    step, chord = _steps(means, turns)
    out = means.new_empty(rows.outer, rows.tokens, rows.inner, rows.d)
    for g, (start, stop) in enumerate(groups):
        m, by = means[:, g], step[:, g]
        for t in range(start, stop):
            out[:, t] = m
            m = m + by
            by = by - chord[:, 0] * m
    return out


def _steps(means: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, torch.Tensor]:
    """From each mean to the next token's, and the chord by which that step bends: 0 where nothing turns."""
    mask = bits_of(turns.turning, turns.rotary.channels // 2)[:, None]
    sine, chord = (part[:, None, None] for part in angles(turns.tangents))
    sine = torch.where(mask, sine, torch.zeros_like(sine))
    chord = torch.where(mask, chord, torch.zeros_like(chord))
    step, bend = torch.zeros_like(means), torch.zeros_like(means[:, :1])
    re, im = paired(means, turns.rotary)
    to_re, to_im = paired(step, turns.rotary)
    half = chord * 0.5
    to_re.copy_(-(re * half) - im * sine)
    to_im.copy_(re * sine - im * half)
    for to in paired(bend, turns.rotary):
        to.copy_(chord.expand_as(to))
    return step, bend


def kv_encode(
    x: torch.Tensor, rows: Rows, means: torch.Tensor | None, turns: Turns | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, tops and errors as `reference_kv.encode_rotated` gives. Raises CodecError where not finite."""
    values = seen(x, rows).to(torch.float32)
    if means is not None:
        values = values - unrolled(rows, means, turns)
    blocks = encode_rotated(rotate(values.contiguous(), rows.size).reshape(-1), rows.block)
    return blocks.codes, blocks.scales, blocks.tops, blocks.error


def kv_decode(
    coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    means: torch.Tensor | None,
    rows: Rows,
    out: torch.Tensor,
    turns: Turns | None = None,
) -> None:
    """Rows of out from codes, scales and tops, whose lengths the caller has checked."""
    codes, scales, tops = coded
    n = rows.outer * rows.tokens * rows.inner * rows.d
    flat = decode_rotated(RotatedBlocks(codes, scales, tops, scales), rows.block, rows.size)[:n]
    values = rotate(flat, rows.size).view(rows.outer, rows.tokens, rows.inner, rows.d)
    seen(out, rows).copy_(values if means is None else values + unrolled(rows, means, turns))


def kv_content(x: torch.Tensor, rows: Rows, *rotaries: Rotary) -> torch.Tensor:
    """`reference_content.energies` of rows of x for each pairing. Returns float64 (pairings, outer, inner, 2)."""
    return torch.stack([energies(seen(x, rows), rotary) for rotary in rotaries])


def kv_distance(x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Squared distance of two tensors, head by head. Returns float64 (outer, inner)."""
    return distances(seen(x, rows), seen(y, rows))


def kv_missed(rows: Rows, error: torch.Tensor) -> torch.Tensor:
    """`reference_content.missed`."""
    return missed(error, rows)


def kv_along(x: torch.Tensor, rows: Rows, how: Along) -> tuple[torch.Tensor, torch.Tensor]:
    """How each token of a slab lies to the means of its heads, taken over every `every`-th token from `first` on.

    Returns float32 (outer, tokens) twice: the squared distance from all of them together, and what the token's key
    lacks of a mean, along it, in standard deviations of that head where that is most: of heads whose deviation is below
    `sure` and where it is over `most`, else 0.
    """
    values = seen(x, rows).to(torch.float32)
    mean = torch.zeros(rows.outer, rows.inner, rows.d, dtype=torch.float32, device=x.device)
    sampled = range(how.first, rows.tokens, how.every)
    for t in sampled:
        mean += values[:, t]
    mean = (mean * float(np.float32(1.0) / np.float32(len(sampled))))[:, None]
    off = values - mean
    distance = torch.zeros(rows.outer, rows.tokens, dtype=torch.float32, device=x.device)
    for head in _in_eights(off * off).unbind(-1):
        distance += head
    energy = _in_eights(mean * mean).clamp(min=1e-30)
    lacks = 1.0 - _in_eights(values * mean) / energy
    spread = lacks[:, how.first :].double().std(dim=1, keepdim=True).to(torch.float32)
    counts = (spread < how.sure) & (lacks > how.most)
    return distance, torch.where(counts, lacks / spread.clamp(min=1e-6), 0.0).amax(dim=2)


def _in_eights(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension: eight of them, channel by channel, and these one by one."""
    eights = torch.nn.functional.pad(x, (0, -x.shape[-1] % EIGHT)).view(*x.shape[:-1], -1, EIGHT)
    lanes = torch.zeros_like(eights[..., 0, :])
    for at in range(eights.shape[-2]):
        lanes = lanes + eights[..., at, :]
    total = lanes[..., 0].clone()
    for at in range(1, EIGHT):
        total += lanes[..., at]
    return total
