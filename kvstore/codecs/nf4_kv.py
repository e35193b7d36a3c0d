"""nf4-kv: NF4 for keys and values with little harm to answers. At most 4.37 bits a value on 256-token chunks.

Keys are centred per channel over 64 tokens (means in 8 bits), keys and values rotated by a Hadamard
transform along head_dim, scales searched; the first tokens of a prefix, to which attention always
returns, and outlying tokens elsewhere are kept in 16 bits and left out of all statistics.
Invariant: the bytes are those of `reference_kv`, whichever kernel wrote them. Pure, any thread.
Leaves out: the arithmetic (`reference_kv`) and which tensors may be touched (`codecs.encode_entry`).
The format and its figures: docs/codecs.md.
"""

from math import isfinite

import torch

from kvstore.codecs import receipt
from kvstore.codecs.hints import NO_HINTS, Hints, token_axis_of
from kvstore.codecs.parts import JOINED, Plane, RowsCodec, Stored, planes_of, standing_apart
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import KvKernel, kv_kernel, reference_content, reference_kv
from kvstore.kernels.cpu import STILL


class NF4KV(RowsCodec[Plane]):
    """NF4 of centred and rotated rows: the default codec of K/V entries."""

    name = "nf4-kv"
    lossy = True
    form = Plane

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor of finite values.

        x: float32, float16 or bfloat16, any shape with at least one value. Parts: docs/codecs.md. The
        attribute relative_error is the receipt (`receipt`). Raises CodecError for another dtype, for values that are
        not finite or whose squares are not, and for those that would not come back finite.
        """
        x = x.detach()
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if spec.dtype not in LOSSY_ALLOWED or x.numel() == 0:
            raise CodecError(f"nf4-kv holds non-empty tensors of {sorted(LOSSY_ALLOWED)}, not {spec}")
        role, token_axis = receipt.role_in(name, x, hints), token_axis_of(x.shape, hints)
        attrs: dict[str, object] = {"role": role, "token_axis": token_axis}
        parts: dict[str, torch.Tensor] = {}
        errors: list[float | None] = []
        for prefix, part, rows in planes_of(x, role, token_axis):
            plane = Plane.of(part, rows.shape, standing_apart(rows, part, hints))
            attrs[f"{prefix}kept"] = ",".join(map(str, plane.kept))
            errors.append(_encode_plane(rows, plane, prefix, parts))
        if role == "packed":
            for suffix in JOINED:
                parts[suffix] = torch.cat((parts[suffix], parts.pop(f"v.{suffix}")))
        encoded = EncodedTensor(spec, self.name, parts, attrs)
        known = [error for error in errors if error is not None]
        if len(known) == len(errors):
            return receipt.with_receipt(encoded, max(known))
        return receipt.sealed(self, name, x, encoded, hints)

    def fill(self, stored: Stored[Plane], out: torch.Tensor) -> None:
        """Fill the rows (outer, tokens, inner, d), contiguous, of one plane. Raises CodecError as `means`."""
        plane, kept = stored.plane, stored.kept
        direct = plane.leading
        if kept is not None:
            if direct:  # a slice: an index costs 40 us
                out[:, : len(plane.kept)].copy_(kept)
            else:
                out[:, list(plane.kept)] = kept.to(out.dtype)
        coded = out[:, len(plane.kept) :] if direct else out.new_empty(plane.outer, plane.coded, plane.inner, plane.d)
        mean = self.means(stored) if plane.groups else None
        kernel = kv_kernel(out.device)
        if kernel is not None:
            rows = plane.where if direct else plane.rows(plane.coded)
            means = None if mean is None else kernel.kv_expand(rows, *mean)
            kernel.kv_decode((stored.codes, stored.scales, stored.tops), means, rows, coded)
        else:
            blocks = reference_kv.RotatedBlocks(stored.codes, stored.scales, stored.tops, stored.scales)
            flat = reference_kv.decode_rotated(blocks, plane.block, plane.size)[: coded.numel()]
            values = reference_kv.rotate(flat, plane.size).view(coded.shape)
            coded.copy_(values if mean is None else values + reference_kv.expand_means(*mean, plane.coded))
        if not direct:
            out[:, plane.others(out.device)] = coded

    def means(self, stored: Stored[Plane]) -> tuple[torch.Tensor, torch.Tensor]:
        """The means: codes (outer, groups, inner, d) and scales (outer, groups, inner)."""
        plane, (codes, scales) = stored.plane, stored.means
        shape = (plane.outer, plane.groups, plane.inner)
        return codes.view(*shape, plane.d), scales.view(shape)


def _encode_plane(rows: torch.Tensor, plane: Plane, prefix: str, parts: dict[str, torch.Tensor]) -> float | None:
    """Add the parts of one plane; returns its receipt, or None where only decoding can tell it."""
    if plane.kept:
        parts[f"{prefix}kept"] = in_halves(plane.kept_rows(rows))
    kernel = kv_kernel(rows.device)
    if plane.leading and kernel is not None:
        coded, stride = rows[:, len(plane.kept) :], plane.tokens
    elif plane.leading:
        coded, stride = rows[:, len(plane.kept) :].contiguous(), plane.coded
    else:
        coded, stride = rows[:, plane.others(rows.device)], plane.coded
    # Where the sums of coding are to tell the error, each block must lie in one head.
    telling = rows.dtype == torch.float32 and plane.role != "plain" and plane.d % plane.block == 0
    rotary = receipt.rotary_of(coded, kernel) if telling and plane.role == "key" else STILL
    energies = None
    if kernel is not None:
        where, means = plane.rows(stride), None
        if plane.groups:
            parts[f"{prefix}mean"], parts[f"{prefix}mean_scale"], means, energies = kernel.kv_means(
                coded, where, rotary if telling else None
            )
        found = kernel.kv_encode(coded, where, means)
        if found is None:
            raise CodecError(reference_kv.REFUSED)
        blocks = reference_kv.RotatedBlocks(*found)
        if telling and energies is None:
            energies = kernel.kv_content(coded, where, rotary)[0]
    else:
        blocks = _encode_reference(coded.to(torch.float32), plane, prefix, parts)
        if telling:
            energies = reference_content.energies(coded, rotary)
    parts[prefix] = blocks.codes
    parts[f"{prefix}scale"], parts[f"{prefix}scale_top"] = blocks.scales, blocks.tops
    if not telling or energies is None:
        return None
    missed = missed_of(rows, plane, parts.get(f"{prefix}kept"), blocks.error, kernel)
    return receipt.from_sums(missed, energies, plane.coded * plane.d)


def missed_of(
    rows: torch.Tensor, plane: Plane, kept: torch.Tensor | None, error: torch.Tensor, kernel: KvKernel | None
) -> torch.Tensor:
    """The squared error of each head (outer, inner): of its blocks (`error`), and of its kept tokens."""
    where = plane.rows(plane.coded)
    missed = reference_content.missed(error, where) if kernel is None else kernel.kv_missed(where, error)
    missed /= where.size
    if kept is not None:
        missed += receipt.distances(plane.kept_rows(rows), kept.to(rows.dtype), kernel)
    return missed


def _encode_reference(
    coded: torch.Tensor, plane: Plane, prefix: str, parts: dict[str, torch.Tensor]
) -> reference_kv.RotatedBlocks:
    if plane.groups:
        codes, scales = reference_kv.group_means(coded)
        parts[f"{prefix}mean"], parts[f"{prefix}mean_scale"] = codes, scales
        coded = coded - reference_kv.expand_means(codes, scales, plane.coded)
    rotated = reference_kv.rotate(coded, plane.size)
    return reference_kv.encode_rotated(rotated.reshape(-1), plane.block)


def in_halves(kept: torch.Tensor) -> torch.Tensor:
    """Kept rows in 16 bits: as they are, or float32 as float16, or as bfloat16 out of float16's range."""
    largest = float(kept.abs().max())
    if not isfinite(largest):
        raise CodecError(reference_kv.REFUSED)
    if kept.dtype != torch.float32:
        return kept.contiguous()
    # From 2**-10 up, what float16 loses of smaller values is below its error on the largest.
    return kept.to(torch.float16 if 2.0**-10 <= largest < 65504 else torch.bfloat16)
