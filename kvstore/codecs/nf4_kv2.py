"""nf4-kv2: nf4-kv whose means of keys turn as RoPE turns them. At most 4.4 bits a value on 256-token chunks.

A model with a bias in its key projection has most of |K| in a part that all keys share. On RoPE pairs that turn within
64 tokens no still mean takes it away, and the Hadamard transform spreads it over the content; a mean in the turning
frame does (`turning`). Short chunks have no means and no 16-bit tokens where those cost more than they save, and what
was decoded is encoded into the same bytes again (`_again`).
Invariant: the bytes are those of `reference_turn`, whichever kernel wrote them. Pure, any thread.
The format and its figures: docs/codecs.md. Its blocks are those of `nf4_kv`, and so is how they are stored (`parts`).
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from kvstore.codecs import receipt
from kvstore.codecs.hints import NO_HINTS, Hints, token_axis_of
from kvstore.codecs.nf4_kv import in_halves, missed_of
from kvstore.codecs.parts import JOINED, Due, Part, Plane, RowsCodec, Stored, planes_of, standing_apart
from kvstore.codecs.sinks import sinks_of
from kvstore.codecs.turning import Means, means_of
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import KvKernel, kv_kernel, reference_kv, reference_turn
from kvstore.kernels.cpu import STILL, Rotary, Rows, Turns
from kvstore.kernels.tables import table

MEANS_MIN = 13
"""Tokens that share a mean, at least: 9 bits a channel are 0.7 bits a value then."""
KEPT_MIN, KEPT_ALL = 32, 33
"""Tokens of a chunk that keeps one in 16 bits, at least (0.65 bits a value with means), and of one that keeps all
that stand apart."""
_TANGENT_MAX = 1e6
_DECODED = 0.003
"""Of a block's energy: an error below is that of values that were decoded from four bits before; fresh: 0.0075."""
_BLOCKS_LOOKED_AT = 256
_ROUNDS = 4

_LEVEL_SQUARES = table("pair", torch.device("cpu")).square().sum(dim=1).numpy()
"""Of the two levels that a byte of codes stands for."""

Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes, scales, tops, and the squared error of each block."""


@dataclass(frozen=True, slots=True)
class Plane2(Plane):
    """Kept tokens that lead are not coded; one elsewhere is, so that positions stay."""

    means_min = MEANS_MIN
    codes_inside = True
    tops_joined = True

    @property
    def lead(self) -> int:
        """How many of the first tokens are kept."""
        return self.tokens - self.coded

    def means_due(self, turning: Rotary | None) -> dict[str, Due]:
        """One part: codes, exponents, which pairs turn, and which of the tables behind them each slab has."""
        n, eights = self.outer * self.groups * self.inner, -(-self.d // reference_turn.EIGHT)
        pairs = 0 if turning is None else turning.channels // 2
        turns = (self.outer * self.inner * -(-pairs // 8), 4 * self.outer, 4 * pairs) if pairs else ()
        pieces = (n * self.d, n * eights, *turns)
        return {"mean": Due((torch.uint8,), pieces, repeated=bool(pairs), most=(1, reference_turn.MEAN_TOP))}

    def turning_in(self, channels: object, interleaved: object) -> Rotary | None:
        """An even number of channels, of no more than there are, and how they are paired."""
        if channels is None and interleaved is None:
            return None
        if isinstance(channels, bool) or not isinstance(channels, int) or not 2 <= channels <= self.d or channels % 2:
            raise CodecError(f"nf4-kv2 turns an even number of channels, 2 to {self.d}, not {channels!r:.40}")
        if not isinstance(interleaved, bool):
            raise CodecError(f"nf4-kv2: interleaved is true or false, not {interleaved!r:.40}")
        return Rotary(channels, interleaved)


class NF4KV2(RowsCodec[Plane2]):
    """NF4 of rotated rows, keys without their mean in the turning frame: the default codec of K/V entries."""

    name = "nf4-kv2"
    lossy = True
    form = Plane2

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor of finite values.

        x: float32, float16 or bfloat16, any shape with at least one value. Parts: docs/codecs.md. The
        attribute relative_error is the receipt (`receipt`). Raises CodecError for another dtype, for values that are
        not finite or whose squares are not, and for those that would not come back finite.
        """
        x = x.detach()
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if spec.dtype not in LOSSY_ALLOWED or x.numel() == 0:
            raise CodecError(f"nf4-kv2 holds non-empty tensors of {sorted(LOSSY_ALLOWED)}, not {spec}")
        role, token_axis = receipt.role_in(name, x, hints), token_axis_of(x.shape, hints)
        attrs: dict[str, object] = {"role": role, "token_axis": token_axis}
        parts: dict[str, torch.Tensor] = {}
        errors: list[float | None] = []
        content: dict[str, torch.Tensor] = {}
        for prefix, part, rows in planes_of(x, role, token_axis):
            plane = Plane2.of(part, rows.shape, kept_of(rows, part, hints))
            attrs[f"{prefix}kept"] = ",".join(map(str, plane.kept))
            errors.append(_encode_plane(rows, plane, prefix, parts, attrs, content))
        if role == "packed":
            for suffix in JOINED:
                parts[suffix] = torch.cat((parts[suffix], parts.pop(f"v.{suffix}")))
        parts["scale"] = torch.cat((parts["scale"], parts.pop("scale_top").view(torch.uint8)))
        encoded = EncodedTensor(spec, self.name, parts, attrs)
        known = [error for error in errors if error is not None]
        if len(known) == len(errors):
            return receipt.with_receipt(encoded, max(known))
        return receipt.sealed(self, name, x, encoded, hints, content)

    def fill(self, stored: Stored[Plane2], out: torch.Tensor) -> None:
        """Fill the rows (outer, tokens, inner, d), contiguous, of one plane. Raises CodecError as `means`."""
        plane, kept = stored.plane, stored.kept
        kernel, where, lead = _arithmetic(out), plane.where, plane.lead
        means, turns = None, None
        if plane.groups:
            codes, scales, turns = self.means(stored)
            means = kernel.kv_expand_eights(where, codes, scales)
        coded = out[:, lead:] if lead else out
        kernel.kv_decode((stored.codes, stored.scales, stored.tops), means, where, coded, turns)
        if kept is not None:  # slices: an index costs 40 us
            out[:, :lead].copy_(kept[:, :lead])
            for at in range(lead, len(plane.kept)):
                out[:, plane.kept[at]].copy_(kept[:, at])

    def means(self, stored: Stored[Plane2]) -> tuple[torch.Tensor, torch.Tensor, Turns | None]:
        """The means: codes (outer, groups, inner, d), exponents (outer, groups, inner, ceil(d/8)), and which turn."""
        plane, (codes, scales, *turning) = stored.plane, stored.means
        shape = (plane.outer, plane.groups, plane.inner)
        turns = None
        if stored.turning is not None:
            bits, at, tables = turning
            tables = tables.clone().view(torch.float32).view(-1, stored.turning.channels // 2)
            tangents = _checked_angles(at.clone().view(torch.int32), tables)
            turns = Turns(stored.turning, tangents, bits.clone().view(plane.outer, plane.inner, -1))
        return codes.view(torch.int8).view(*shape, plane.d), scales.view(*shape, -1), turns


def kept_of(rows: torch.Tensor, part: Part, hints: Hints) -> tuple[int, ...]:
    """The tokens to keep in 16 bits: a prompt's first, outlying keys as nf4-kv has them, and `sinks_of` keys."""
    tokens = rows.shape[1]
    if tokens < KEPT_MIN:
        return ()
    if part != "key":
        return standing_apart(rows, part, hints)
    if hints.prefix_start is not False:
        return sinks_of(rows, _arithmetic(rows), start=True)
    kept = standing_apart(rows, part, hints)
    return tuple(sorted({*kept, *sinks_of(rows, _arithmetic(rows), start=False)})) if tokens >= KEPT_ALL else kept[:1]


def _arithmetic(rows: torch.Tensor) -> "KvKernel | ModuleType":
    return kv_kernel(rows.device) or reference_turn


def _encode_plane(
    rows: torch.Tensor,
    plane: Plane2,
    prefix: str,
    parts: dict[str, torch.Tensor],
    attrs: dict[str, object],
    content: dict[str, torch.Tensor],
) -> float | None:
    """Add the parts of one plane; returns its receipt, or None where only decoding can tell it.

    content: gets what the receipt is a fraction of, where that was counted on all that is coded.
    """
    if plane.kept:
        parts[f"{prefix}kept"] = in_halves(plane.kept_rows(rows))
    kernel = _arithmetic(rows)
    coded, stride = rows[:, plane.lead :], plane.tokens
    leading = plane.lead == len(plane.kept)
    if not leading:
        coded, stride = _without_outliers(coded, plane), plane.coded
    where = plane.rows(stride)
    # Where the sums of coding are to tell the error, each block must lie in one head.
    telling = rows.dtype == torch.float32 and plane.role != "plain" and plane.d % plane.block == 0
    paired = plane.role == "key" and (telling or plane.groups)
    rotary = receipt.rotary_of(coded, kv_kernel(rows.device)) if paired else STILL
    means = means_of(coded, where, rotary, kernel, content=telling or leading) if plane.groups else None
    energies = None if means is None else means.energies
    if energies is not None and leading:
        content[prefix] = energies
    blocks = _coded(kernel, coded, where, means)
    if means is not None and _decoded_before(blocks, plane.block):
        means, blocks = _again(kernel, coded, where, rotary, (means, blocks))
    codes, scales, tops, error = blocks
    parts[prefix] = codes
    parts[f"{prefix}scale"], parts[f"{prefix}scale_top"] = scales, tops
    if means is not None:
        _add_means(means, prefix, parts, attrs)
    if not telling:
        return None
    if energies is None:
        energies = kernel.kv_content(coded, where, rotary)[0]
    for token in plane.kept[plane.lead :]:  # coded too, and decoded from its 16 bits
        error.view(plane.outer, plane.coded, -1)[:, token - plane.lead] = 0.0
    missed = missed_of(rows, plane, parts.get(f"{prefix}kept"), error, kernel)
    return receipt.from_sums(missed, energies, plane.coded * plane.d)


def _coded(kernel: "KvKernel | ModuleType", coded: torch.Tensor, where: Rows, means: Means | None) -> Coded:
    floats, turns = (None, None) if means is None else (means.floats, means.turns)
    found: Coded | None = kernel.kv_encode(coded, where, floats, turns)
    if found is None:
        raise CodecError(reference_kv.REFUSED)
    return found


def _without_outliers(coded: torch.Tensor, plane: Plane2) -> torch.Tensor:
    """The coded tokens, each kept one replaced by its neighbour: it is decoded from its 16 bits, and moves no mean."""
    out = [token - plane.lead for token in plane.kept[plane.lead :]]
    source = list(range(plane.coded))
    for token in out:
        near = [t for t in (*range(token - 1, -1, -1), *range(token + 1, plane.coded)) if t not in out]
        source[token] = near[0]
    return coded.index_select(1, torch.tensor(source, device=coded.device))


def _add_means(means: Means, prefix: str, parts: dict[str, torch.Tensor], attrs: dict[str, object]) -> None:
    """All that is said of means in one part: each part of a tensor costs as much as 864 bytes."""
    made = [means.codes, means.scales]
    if means.turns is not None:
        rotary, tangents, turning = means.turns
        of, tables = _tables(tangents.cpu().numpy(), turning.flatten(1).any(dim=1).cpu().numpy())
        made += [turning, of.to(turning.device), tables.to(turning.device)]
        attrs[f"{prefix}rotary"], attrs[f"{prefix}interleaved"] = rotary.channels, rotary.interleaved
    parts[f"{prefix}mean"] = torch.cat([some.contiguous().view(-1).view(torch.uint8) for some in made])


def _tables(tangents: np.ndarray, turning: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Which table each slab has, int32 (outer,), and the tables in order: those of slabs that turn, bool (outer,).

    tangents: float32 (outer, pairs). A slab where nothing turns names the first: nobody reads it.
    """
    rows = [row.tobytes() for row in tangents]
    first = {rows[at]: at for at in reversed(np.flatnonzero(turning).tolist())}
    chosen = sorted(first.values(), key=lambda at: tangents[at].tolist())
    found = {rows[at]: which for which, at in enumerate(chosen)}
    of = np.array([found[row] if on else 0 for row, on in zip(rows, turning.tolist(), strict=True)], np.int32)
    return torch.from_numpy(of), torch.from_numpy(tangents[chosen])


def _decoded_before(blocks: Coded, block: int) -> bool:
    """Whether most blocks fit their values far better than four bits fit fresh ones: those were decoded before."""
    codes, scales, tops, error = (part.cpu().numpy() for part in blocks)
    at = np.linspace(0, error.size - 1, min(error.size, _BLOCKS_LOOKED_AT)).astype(np.int64)
    code, top = scales[at].astype(np.int32), tops[at // reference_kv.SCALE_GROUP].astype(np.int32)
    squares = _LEVEL_SQUARES[codes.reshape(-1, block // 2)[at]].sum(axis=1)
    energy = np.square(reference_kv.scale_values(code, top)) * squares
    fitting = (error[at] < _DECODED * energy) & (energy > 0)
    return bool(2 * np.count_nonzero(fitting) > np.count_nonzero(energy))


def _again(
    kernel: "KvKernel | ModuleType", coded: torch.Tensor, where: Rows, rotary: Rotary, first: tuple[Means, Coded]
) -> tuple[Means, Coded]:
    """Means and blocks of values that were decoded before: those that they were decoded from, so that nothing drifts.

    Decoded values are means plus levels. Without the levels only the means are left, and what they were coded as can be
    read off them, which no average over the tokens allows: levels have an average of their own.
    """
    best, found = float(first[1][3].sum(dtype=torch.float64)), first
    still = Rows(where.outer, where.tokens, where.inner, where.d, where.tokens * where.inner * where.d, where.size)
    still.block = where.block
    levels = torch.empty(where.outer, where.tokens, where.inner, where.d, dtype=torch.float32, device=coded.device)
    left = Rows(*(getattr(still, name) for name in ("outer", "tokens", "inner", "d", "stride", "size", "block")))
    left.groups = where.groups
    blocks = first[1]
    for _ in range(_ROUNDS):
        kernel.kv_decode(blocks[:3], None, still, levels)
        means = means_of(coded.to(torch.float32) - levels, left, rotary, kernel, like=first[0])
        blocks = _coded(kernel, coded, where, means)
        error = float(blocks[3].sum(dtype=torch.float64))
        if error >= best:
            break
        best, found = error, (means, blocks)
    return found


def _checked_angles(of: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The tangents of each slab (outer, pairs), from the index of its table."""
    first, last = torch.aminmax(of)
    if int(first) < 0 or int(last) >= len(tables):
        raise CodecError(f"nf4-kv2: a slab names none of {len(tables)} tables of angles")
    least, most = torch.aminmax(tables)  # NaN where one is
    if not (float(least) >= -_TANGENT_MAX and float(most) <= _TANGENT_MAX):
        raise CodecError(f"nf4-kv2: tangents of half angles lie within {_TANGENT_MAX:g}")
    return tables.index_select(0, of)
