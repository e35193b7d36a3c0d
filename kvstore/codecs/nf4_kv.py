"""nf4-kv: NF4 for keys and values with little harm to answers. At most 4.37 bits a value on 256-token chunks.

Keys are centred per channel over 64 tokens (means in 8 bits), keys and values rotated by a Hadamard
transform along head_dim, scales searched; the first tokens of a prefix, to which attention always
returns, and outlying tokens elsewhere are kept in 16 bits and left out of all statistics.
Invariant: the bytes are those of `reference_kv`, whichever kernel wrote them. Pure, any thread.
Leaves out: the arithmetic (`reference_kv`) and which tensors may be touched (`codecs.encode_entry`).
The format and its figures: docs/codecs.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Self

import torch

from kvstore.codecs import receipt
from kvstore.codecs.hints import NO_HINTS, Hints, token_axis_of
from kvstore.codecs.nf4 import prepared_out, require_finite, require_names, require_part
from kvstore.codecs.planes import HALVES, Part, others, planes_of, standing_apart
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import KvKernel, kv_kernel, reference_content, reference_kv
from kvstore.kernels.cpu import STILL, Rows

_TOP_LIMIT = 0x7F800000 >> 17

JOINED = {"": torch.uint8, "scale": torch.uint8, "scale_top": torch.int16}
"""Parts of a packed tensor that hold those of its keys and then those of its values: each part costs its overhead."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One role's rows: (outer, tokens, inner, d) of the whole tensor, and which tokens are kept in 16 bits.

    coded: how many tokens are coded. groups: means that each of their outer slabs has.
    """

    role: Part
    outer: int
    tokens: int
    inner: int
    d: int
    kept: tuple[int, ...]
    coded: int
    groups: int

    @classmethod
    def of(cls, role: Part, rows: torch.Tensor, kept: tuple[int, ...]) -> Self:
        """The plane of rows (outer, tokens, inner, d)."""
        outer, tokens, inner, d = rows.shape
        coded = tokens - cls._left_out(kept)
        groups = reference_kv.group_count(coded) if role == "key" and coded >= cls._means_min() else 0
        return cls(role, outer, tokens, inner, d, kept, coded, groups)

    @staticmethod
    def _left_out(kept: tuple[int, ...]) -> int:
        """How many kept tokens are not coded."""
        return len(kept)

    @staticmethod
    def _means_min() -> int:
        """Coded tokens that have a mean, at least."""
        return 1

    @property
    def block(self) -> int:
        """Values a scale."""
        return reference_kv.KEY_BLOCK if self.role == "key" else reference_kv.VALUE_BLOCK

    @property
    def blocks(self) -> int:
        """Scales of the coded tokens; the last block may be padded."""
        return -(-self.outer * self.coded * self.inner * self.d // self.block)

    @property
    def leading(self) -> bool:
        """Whether the kept tokens are the first ones: then the rest is one view of the tensor."""
        return self.kept == tuple(range(len(self.kept)))

    def rows(self, stride_tokens: int) -> Rows:
        """The coded tokens for the kernel, slabs lying stride_tokens tokens apart."""
        size = reference_kv.rotation_size(self.d)
        stride = stride_tokens * self.inner * self.d
        return Rows(self.outer, self.coded, self.inner, self.d, stride, size, self.block, self.groups)

    def kept_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The kept tokens (outer, kept, inner, d), contiguous."""
        return (rows[:, : len(self.kept)] if self.leading else rows[:, list(self.kept)]).contiguous()

    def others(self, device: torch.device) -> torch.Tensor:
        """Indexes of the coded tokens. Returns int64 (coded,)."""
        return others(self.tokens, self.kept, device)


class NF4KV:
    """NF4 of centred and rotated rows: the default codec of K/V entries."""

    name = "nf4-kv"
    lossy = True

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
            plane = Plane.of(part, rows, standing_apart(rows, part, hints))
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

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out` (same dtype, shape and device, contiguous).

        Raises CodecError when parts, attributes and spec do not belong together.
        """
        role, token_axis = stored_role(encoded.attrs), stored_token_axis(encoded.attrs)
        if encoded.spec.dtype not in LOSSY_ALLOWED or prod(encoded.spec.shape) == 0:
            raise CodecError(f"nf4-kv decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {encoded.spec}")
        main = encoded.parts.get("")
        if main is None:
            raise CodecError("nf4-kv without codes")
        if 2 * sum(part.numel() for part in encoded.parts.values()) < prod(encoded.spec.shape):
            raise CodecError(f"nf4-kv has too few codes for {encoded.spec}")  # before memory is made for them
        out = prepared_out(encoded.spec, main.device, out)
        if role == "packed" and (out.dim() == 0 or out.shape[-1] % 2):
            raise CodecError(f"nf4-kv packs keys and values in an even last dimension, not {encoded.spec.shape}")
        planes = planes_of(out, role, token_axis)
        if role == "packed":
            encoded = split_packed(encoded, [rows for _prefix, _part, rows in planes])
        _checked_names(encoded, planes)
        for prefix, part, rows in planes:
            _decode_plane(encoded, part, prefix, rows)
            if role == "packed":
                half = out.shape[-1] // 2
                target = out[..., :half] if part == "key" else out[..., half:]
                target.copy_(rows.view(target.shape))
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding: on a tensor of that shape without memory."""
        role, token_axis = stored_role(encoded.attrs), stored_token_axis(encoded.attrs)
        spec = encoded.spec
        if spec.dtype not in LOSSY_ALLOWED or prod(spec.shape) == 0:
            raise CodecError(f"nf4-kv decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {spec}")
        if role == "packed" and (not spec.shape or spec.shape[-1] % 2):
            raise CodecError(f"nf4-kv packs keys and values in an even last dimension, not {spec.shape}")
        planes = planes_of(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta"), role, token_axis)
        if role == "packed":
            encoded = split_packed(encoded, [rows for _prefix, _part, rows in planes])
        _checked_names(encoded, planes)
        for prefix, part, rows in planes:
            plane = Plane.of(part, rows, kept_indexes(encoded.attrs.get(f"{prefix}kept"), rows.shape[1]))
            checked_blocks(encoded, plane, prefix)
            if plane.kept:
                checked_kept(encoded, plane, prefix)
            _checked_means(encoded, plane, prefix)


def _encode_plane(rows: torch.Tensor, plane: Plane, prefix: str, parts: dict[str, torch.Tensor]) -> float | None:
    """Add the parts of one plane; returns its receipt, or None where only decoding can tell it."""
    if plane.kept:
        parts[f"{prefix}kept"] = in_halves(plane.kept_rows(rows))
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
    rotated = reference_kv.rotate(coded, reference_kv.rotation_size(plane.d))
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


def _decode_plane(encoded: EncodedTensor, part: Part, prefix: str, out: torch.Tensor) -> None:
    """Fill rows (outer, tokens, inner, d), contiguous, from one plane's parts."""
    plane = Plane.of(part, out, kept_indexes(encoded.attrs.get(f"{prefix}kept"), out.shape[1]))
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


def split_packed(encoded: EncodedTensor, rows: list[torch.Tensor], form: type[Plane] = Plane) -> EncodedTensor:
    """A packed tensor's joined parts as those of its keys ("") and its values ("v."). form: what has their lengths."""
    planes = [
        form.of(part, x, kept_indexes(encoded.attrs.get(f"{prefix}kept"), x.shape[1]))
        for (part, prefix), x in zip(HALVES, rows, strict=True)
    ]
    parts = dict(encoded.parts)
    for suffix, dtype in JOINED.items():
        lengths = [
            {"": p.blocks * p.block // 2, "scale": p.blocks, "scale_top": -(-p.blocks // reference_kv.SCALE_GROUP)}[
                suffix
            ]
            for p in planes
        ]
        joined = require_part(encoded, suffix, dtype, sum(lengths))
        parts[suffix], parts[f"v.{suffix}"] = torch.split(joined, lengths)
    return EncodedTensor(encoded.spec, encoded.encoding, parts, encoded.attrs)


def checked_blocks(encoded: EncodedTensor, plane: Plane, prefix: str) -> reference_kv.RotatedBlocks:
    """Codes, scales and tops of exactly the lengths the plane has, with tops that are finite scales."""
    b = plane.blocks
    codes = require_part(encoded, prefix, torch.uint8, b * plane.block // 2)
    scales = require_part(encoded, f"{prefix}scale", torch.uint8, b)
    tops = require_part(encoded, f"{prefix}scale_top", torch.int16, -(-b // reference_kv.SCALE_GROUP))
    if not tops.clamp(0, _TOP_LIMIT - 1).equal(tops):
        raise CodecError(f"nf4-kv scale tops lie in [0, {_TOP_LIMIT})")
    return reference_kv.RotatedBlocks(codes, scales, tops, scales)


def checked_kept(encoded: EncodedTensor, plane: Plane, prefix: str) -> torch.Tensor:
    """The kept tokens (outer, kept, inner, d), finite."""
    part = encoded.parts.get(f"{prefix}kept")
    shape = (plane.outer, len(plane.kept), plane.inner, plane.d)
    dtype = torch.bfloat16 if part is not None and part.dtype == torch.bfloat16 else torch.float16
    return require_finite(encoded, "kept", require_part(encoded, f"{prefix}kept", dtype, prod(shape))).view(shape)


def _checked_means(encoded: EncodedTensor, plane: Plane, prefix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (outer, groups, inner, d) and scales (outer, groups, inner) of the means; None where there are none."""
    shape = (plane.outer, plane.groups, plane.inner)
    if not plane.groups:
        return None
    codes = require_part(encoded, f"{prefix}mean", torch.int8, prod(shape) * plane.d)
    scales = require_part(encoded, f"{prefix}mean_scale", torch.float32, prod(shape))
    return codes.view(*shape, plane.d), require_finite(encoded, "mean_scale", scales).view(shape)


def _checked_names(encoded: EncodedTensor, rows: Sequence[tuple[str, Part, torch.Tensor]]) -> None:
    """CodecError unless the parts are those of these planes (prefix, part, rows) and no others."""
    names: list[str] = []
    for prefix, part, x in rows:
        plane = Plane.of(part, x, kept_indexes(encoded.attrs.get(f"{prefix}kept"), x.shape[1]))
        names += [prefix, f"{prefix}scale", f"{prefix}scale_top"]
        names += [f"{prefix}kept"] * bool(plane.kept)
        names += [f"{prefix}mean", f"{prefix}mean_scale"] * bool(plane.groups)
    require_names(encoded, names)


def kept_indexes(text: object, tokens: int) -> tuple[int, ...]:
    """Token indexes from their attribute: ascending, distinct, and at least one token left to code."""
    if not isinstance(text, str):
        raise CodecError(f"nf4-kv names its kept tokens in a string, not {text!r}")
    try:
        kept = tuple(int(item) for item in text.split(",")) if text else ()
    except ValueError:
        raise CodecError(f"nf4-kv kept tokens are indexes, not {text[:40]!r}") from None
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < tokens) or len(kept) >= tokens:
        raise CodecError(f"nf4-kv kept tokens {text[:40]!r} do not lie in {tokens} tokens")
    return kept


def stored_role(attrs: Mapping[str, object]) -> str:
    """The role among attributes; CodecError for none."""
    role = attrs.get("role")
    if role not in ("key", "value", "packed", "plain"):
        raise CodecError(f"nf4-kv knows no role {role!r}")
    return str(role)


def stored_token_axis(attrs: Mapping[str, object]) -> int:
    """The token axis among attributes; CodecError for none."""
    axis = attrs.get("token_axis")
    if isinstance(axis, bool) or not isinstance(axis, int) or axis >= -1:
        raise CodecError(f"nf4-kv needs a token_axis below -1, not {axis!r}")
    return axis
