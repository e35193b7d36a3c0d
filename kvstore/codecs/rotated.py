"""What nf4-kv and nf4-kv2 share: a tensor's planes of rotated rows in NF4 blocks, with some tokens kept in 16 bits.

`RotatedRows` is the codec but for what the two do differently: which tokens are kept, and how means are made and
written. Pure, any thread. The formats: docs/codecs.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

import torch

from kvstore.codecs import receipt
from kvstore.codecs.hints import NO_HINTS, Hints, token_axis_of
from kvstore.codecs.nf4 import prepared_out, require_finite, require_names, require_part
from kvstore.codecs.planes import Part, others, planes_of
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import KvKernel, reference_content, reference_kv
from kvstore.kernels.cpu import Rows

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


P = TypeVar("P", bound=Plane)


class Written(NamedTuple):
    """What is being encoded: parts and attributes so far."""

    parts: dict[str, torch.Tensor]
    attrs: dict[str, object]


class RotatedRows(ABC, Generic[P]):
    """NF4 of rotated rows, plane by plane."""

    name: str
    lossy = True
    _form: type[P]
    _means: ClassVar[tuple[str, ...]]
    """The parts that keys with means have."""

    @abstractmethod
    def _kept(self, rows: torch.Tensor, part: Part, hints: Hints) -> tuple[int, ...]:
        """The tokens to keep in 16 bits."""

    @abstractmethod
    def _encode_plane(self, rows: torch.Tensor, plane: P, prefix: str, into: Written) -> float | None:
        """Add one plane's parts, kept tokens aside; returns its receipt, or None where only decoding can tell it."""

    @abstractmethod
    def _decode_plane(self, encoded: EncodedTensor, plane: P, prefix: str, out: torch.Tensor) -> None:
        """Fill rows (outer, tokens, inner, d), contiguous, from one plane's parts."""

    @abstractmethod
    def _check_means(self, encoded: EncodedTensor, plane: P, prefix: str) -> None:
        """Raise CodecError unless the means of a plane that has some could be decoded."""

    def _closed(self, parts: dict[str, torch.Tensor]) -> None:
        """Bring the parts of all planes into the form in which they are stored."""

    def _opened(self, encoded: EncodedTensor, planes: Sequence[P]) -> EncodedTensor:
        """The tensor with the parts that `_closed` found."""
        del planes
        return encoded

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor of finite values.

        x: float32, float16 or bfloat16, any shape with at least one value. Parts: docs/codecs.md. The
        attribute relative_error is the receipt (`receipt`). Raises CodecError for another dtype, for values that are
        not finite or whose squares are not, and for those that would not come back finite.
        """
        x = x.detach()
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if spec.dtype not in LOSSY_ALLOWED or x.numel() == 0:
            raise CodecError(f"{self.name} holds non-empty tensors of {sorted(LOSSY_ALLOWED)}, not {spec}")
        role, token_axis = receipt.role_in(name, x, hints), token_axis_of(x.shape, hints)
        into = Written({}, {"role": role, "token_axis": token_axis})
        errors: list[float | None] = []
        for prefix, part, rows in planes_of(x, role, token_axis):
            plane = self._form.of(part, rows, self._kept(rows, part, hints))
            into.attrs[f"{prefix}kept"] = ",".join(map(str, plane.kept))
            if plane.kept:
                into.parts[f"{prefix}kept"] = in_halves(plane.kept_rows(rows))
            errors.append(self._encode_plane(rows, plane, prefix, into))
        if role == "packed":
            for suffix in JOINED:
                into.parts[suffix] = torch.cat((into.parts[suffix], into.parts.pop(f"v.{suffix}")))
        self._closed(into.parts)
        encoded = EncodedTensor(spec, self.name, into.parts, into.attrs)
        known = [error for error in errors if error is not None]
        if len(known) == len(errors):
            return receipt.with_receipt(encoded, max(known))
        return receipt.sealed(self, name, x, encoded, hints)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out` (same dtype, shape and device, contiguous).

        Raises CodecError when parts, attributes and spec do not belong together.
        """
        role, token_axis = self._checked_spec(encoded)
        main = encoded.parts.get("")
        if main is None:
            raise CodecError(f"{self.name} without codes")
        if 2 * sum(part.numel() for part in encoded.parts.values()) < prod(encoded.spec.shape):
            raise CodecError(f"{self.name} has too few codes for {encoded.spec}")  # before memory is made for them
        out = prepared_out(encoded.spec, main.device, out)
        planes, encoded = self._planes(encoded, out, role, token_axis)
        for plane, prefix, rows in planes:
            self._decode_plane(encoded, plane, prefix, rows)
            if role == "packed":
                half = out.shape[-1] // 2
                target = out[..., :half] if plane.role == "key" else out[..., half:]
                target.copy_(rows.view(target.shape))
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding: on a tensor of that shape without memory."""
        role, token_axis = self._checked_spec(encoded)
        like = torch.empty(encoded.spec.shape, dtype=getattr(torch, encoded.spec.dtype), device="meta")
        planes, encoded = self._planes(encoded, like, role, token_axis)
        for plane, prefix, _rows in planes:
            checked_blocks(encoded, plane, prefix)
            if plane.kept:
                checked_kept(encoded, plane, prefix)
            if plane.groups:
                self._check_means(encoded, plane, prefix)

    def _checked_spec(self, encoded: EncodedTensor) -> tuple[str, int]:
        """Role and token axis; CodecError for a spec that no tensor of this codec has."""
        role, token_axis = stored_role(encoded.attrs), stored_token_axis(encoded.attrs)
        spec = encoded.spec
        if spec.dtype not in LOSSY_ALLOWED or prod(spec.shape) == 0:
            raise CodecError(f"{self.name} decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {spec}")
        if role == "packed" and (not spec.shape or spec.shape[-1] % 2):
            raise CodecError(f"{self.name} packs keys and values in an even last dimension, not {spec.shape}")
        return role, token_axis

    def _planes(
        self, encoded: EncodedTensor, like: torch.Tensor, role: str, token_axis: int
    ) -> tuple[list[tuple[P, str, torch.Tensor]], EncodedTensor]:
        """Plane, prefix and rows of each, and the tensor with their parts; CodecError for any others."""
        found = [
            (self._form.of(part, rows, kept_indexes(encoded.attrs.get(f"{prefix}kept"), rows.shape[1])), prefix, rows)
            for prefix, part, rows in planes_of(like, role, token_axis)
        ]
        encoded = self._opened(encoded, [plane for plane, _prefix, _rows in found])
        if role == "packed":
            encoded = _split(encoded, [plane for plane, _prefix, _rows in found])
        names: list[str] = []
        for plane, prefix, _rows in found:
            names += [prefix, f"{prefix}scale", f"{prefix}scale_top"]
            names += [f"{prefix}kept"] * bool(plane.kept)
            names += [f"{prefix}{part}" for part in self._means] * bool(plane.groups)
        require_names(encoded, names)
        return found, encoded


def _split(encoded: EncodedTensor, planes: Sequence[Plane]) -> EncodedTensor:
    """A packed tensor's joined parts as those of its keys ("") and its values ("v.")."""
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


def in_halves(kept: torch.Tensor) -> torch.Tensor:
    """Kept rows in 16 bits: as they are, or float32 as float16, or as bfloat16 out of float16's range."""
    largest = float(kept.abs().max())
    if not isfinite(largest):
        raise CodecError(reference_kv.REFUSED)
    if kept.dtype != torch.float32:
        return kept.contiguous()
    # From 2**-10 up, what float16 loses of smaller values is below its error on the largest.
    return kept.to(torch.float16 if 2.0**-10 <= largest < 65504 else torch.bfloat16)


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
