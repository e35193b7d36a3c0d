"""nf4-kv: NF4 for keys and values with little harm to answers. At most 4.37 bits a value on 256-token chunks.

Keys are centred per channel over 64 tokens (means in 8 bits), keys and values rotated by a Hadamard
transform along head_dim, scales searched; the first tokens of a prefix, to which attention always
returns, and outlying tokens elsewhere are kept in 16 bits and left out of all statistics.
Invariant: the bytes are those of `reference_kv`, whichever kernel wrote them. Pure, any thread.
Leaves out: the arithmetic (`reference_kv`) and which tensors may be touched (`codecs.encode_entry`).
The format and its figures: docs/codecs.md.
"""

from math import prod

import torch

from kvstore.codecs import receipt
from kvstore.codecs.hints import Hints
from kvstore.codecs.nf4 import require_finite, require_part
from kvstore.codecs.planes import Part, standing_apart
from kvstore.codecs.rotated import Plane, RotatedRows, Written, checked_blocks, checked_kept, missed_of
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import kv_kernel, reference_content, reference_kv
from kvstore.kernels.cpu import STILL


class NF4KV(RotatedRows[Plane]):
    """NF4 of centred and rotated rows: the default codec of K/V entries of versions before."""

    name = "nf4-kv"
    _form = Plane
    _means = ("mean", "mean_scale")

    def _kept(self, rows: torch.Tensor, part: Part, hints: Hints) -> tuple[int, ...]:
        return standing_apart(rows, part, hints)

    def _encode_plane(self, rows: torch.Tensor, plane: Plane, prefix: str, into: Written) -> float | None:
        return _encode_plane(rows, plane, prefix, into.parts)

    def _decode_plane(self, encoded: EncodedTensor, plane: Plane, prefix: str, out: torch.Tensor) -> None:
        _decode_plane(encoded, plane, prefix, out)

    def _check_means(self, encoded: EncodedTensor, plane: Plane, prefix: str) -> None:
        _checked_means(encoded, plane, prefix)


def _encode_plane(rows: torch.Tensor, plane: Plane, prefix: str, parts: dict[str, torch.Tensor]) -> float | None:
    """Add one plane's parts, kept tokens aside; returns its receipt, or None where only decoding can tell it."""
    kernel = kv_kernel(rows)
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


def _encode_reference(
    coded: torch.Tensor, plane: Plane, prefix: str, parts: dict[str, torch.Tensor]
) -> reference_kv.RotatedBlocks:
    if plane.groups:
        codes, scales = reference_kv.group_means(coded)
        parts[f"{prefix}mean"], parts[f"{prefix}mean_scale"] = codes, scales
        coded = coded - reference_kv.expand_means(codes, scales, plane.coded)
    rotated = reference_kv.rotate(coded, reference_kv.rotation_size(plane.d))
    return reference_kv.encode_rotated(rotated.reshape(-1), plane.block)


def _decode_plane(encoded: EncodedTensor, plane: Plane, prefix: str, out: torch.Tensor) -> None:
    """Fill rows (outer, tokens, inner, d), contiguous, from one plane's parts."""
    blocks = checked_blocks(encoded, plane, prefix)
    direct = plane.leading
    if plane.kept:
        kept = checked_kept(encoded, plane, prefix)
        if direct:  # a slice: an index costs 40 us
            out[:, : len(plane.kept)].copy_(kept)
        else:
            out[:, list(plane.kept)] = kept.to(out.dtype)
    coded = out[:, len(plane.kept) :] if direct else out.new_empty(plane.outer, plane.coded, plane.inner, plane.d)
    mean = _checked_means(encoded, plane, prefix)
    kernel = kv_kernel(out)
    if kernel is not None:
        rows = plane.rows(plane.tokens if direct else plane.coded)
        means = None if mean is None else kernel.kv_expand(rows, *mean)
        kernel.kv_decode((blocks.codes, blocks.scales, blocks.tops), means, rows, coded)
    else:
        size = reference_kv.rotation_size(plane.d)
        flat = reference_kv.decode_rotated(blocks, plane.block, size)[: coded.numel()]
        values = reference_kv.rotate(flat, size).view(coded.shape)
        coded.copy_(values if mean is None else values + reference_kv.expand_means(*mean, plane.coded))
    if not direct:
        out[:, plane.others(out.device)] = coded


def _checked_means(encoded: EncodedTensor, plane: Plane, prefix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (outer, groups, inner, d) and scales (outer, groups, inner) of the means; None where there are none."""
    shape = (plane.outer, plane.groups, plane.inner)
    if not plane.groups:
        return None
    codes = require_part(encoded, f"{prefix}mean", torch.int8, prod(shape) * plane.d)
    scales = require_part(encoded, f"{prefix}mean_scale", torch.float32, prod(shape))
    return codes.view(*shape, plane.d), require_finite(encoded, "mean_scale", scales).view(shape)
