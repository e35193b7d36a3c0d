"""The parts of encoded tensors, and the rows of keys and values: what a codec reads is checked here.

Keys and values are rows, (outer, tokens, inner, head_dim). outer: the axes before the tokens (layers); inner: those
between a token and its rows (heads). A `Plane` is the rows of one role, with the tokens that are kept in 16 bits.
Pure, any thread. Leaves out: what the bytes of a part mean (each codec).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch

from kvstore.codecs.hints import Hints
from kvstore.dtypes import BY_NAME, LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import reference_kv
from kvstore.kernels.cpu import Rows

KEPT_KEYS = 4
"""Tokens at the start of a prefix whose keys stay in 16 bits; elsewhere at most so many outlying ones."""
KEPT_VALUES = 1
"""Values have a scale per token, so an attention sink spoils no other token; only the first one's own error shows
(KL of values alone 1.64e-3 without, 0.40e-3 with it, 0.40e-3 with four)."""
OUTLIER_ENERGY = 4.0
"""Times the median energy about the mean; SmolLM2's tokens beyond the first stay below 3."""

Part = Literal["key", "value", "plain"]
HALVES: tuple[tuple[Part, str], ...] = (("key", ""), ("value", "v."))
JOINED = {"": torch.uint8, "scale": torch.uint8, "scale_top": torch.int16}
"""Parts of a packed tensor that hold those of its keys and then those of its values: each part costs its overhead."""
_TOP_LIMIT = 0x7F800000 >> 17


def planes_of(x: torch.Tensor, role: str, token_axis: int) -> list[tuple[str, Part, torch.Tensor]]:
    """(prefix of part names, role, rows (outer, tokens, inner, d)); halves of a packed tensor are copies."""
    if role == "packed":
        half = x.shape[-1] // 2
        halves = slice(0, half), slice(half, None)
        key, value = (x[..., part].clone(memory_format=torch.contiguous_format) for part in halves)
        rows = rows_of(key, token_axis), rows_of(value, token_axis)
        return [(prefix, part, x) for (part, prefix), x in zip(HALVES, rows, strict=True)]
    part: Part = "key" if role == "key" else "value" if role == "value" else "plain"
    return [("", part, rows_of(x.contiguous(), token_axis))]


def rows_of(x: torch.Tensor, token_axis: int) -> torch.Tensor:
    """The tensor as (outer, tokens, inner, d); a tensor with too few axes is one run of tokens, or one row."""
    shape = tuple(x.shape)
    if len(shape) < 2:
        return x.reshape(1, 1, 1, -1)
    axis = max(len(shape) + token_axis, 0)
    return x.view(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 : -1]), shape[-1])


@dataclass(frozen=True, slots=True)
class Plane:
    """One role's rows: (outer, tokens, inner, d) of the whole tensor, and which tokens are kept in 16 bits.

    coded: how many tokens are coded. groups: means that each of their outer slabs has. size: of the Hadamard transform.
    A subclass says how a codec's parts differ. means_min: coded tokens that have a mean, at least. means: the parts
    they are in. codes_inside: a kept token is coded too, unless it leads. tops_joined: the tops lie behind the scales.
    """

    means_min: ClassVar[int] = 1
    means: ClassVar[tuple[str, ...]] = ("mean", "mean_scale")
    codes_inside: ClassVar[bool] = False
    tops_joined: ClassVar[bool] = False

    role: Part
    outer: int
    tokens: int
    inner: int
    d: int
    kept: tuple[int, ...]
    coded: int
    groups: int
    size: int

    @classmethod
    def of(cls, role: Part, rows: torch.Tensor, kept: tuple[int, ...]) -> Self:
        """The plane of rows (outer, tokens, inner, d)."""
        outer, tokens, inner, d = rows.shape
        lead = next((at for at, token in enumerate(kept) if at != token), len(kept))
        coded = tokens - (lead if cls.codes_inside else len(kept))
        groups = reference_kv.group_count(coded) if role == "key" and coded >= cls.means_min else 0
        return cls(role, outer, tokens, inner, d, kept, coded, groups, reference_kv.rotation_size(d))

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
        stride = stride_tokens * self.inner * self.d
        return Rows(self.outer, self.coded, self.inner, self.d, stride, self.size, self.block, self.groups)

    def kept_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The kept tokens (outer, kept, inner, d), contiguous."""
        return (rows[:, : len(self.kept)] if self.leading else rows[:, list(self.kept)]).contiguous()

    def others(self, device: torch.device) -> torch.Tensor:
        """Indexes of the coded tokens. Returns int64 (coded,)."""
        return others(self.tokens, self.kept, device)


P = TypeVar("P", bound=Plane)


class Stored(NamedTuple, Generic[P]):
    """One plane of a stored tensor, checked. rows: where its values go. kept: the tokens in 16 bits, if there are any.

    encoded: the tensor with this plane's parts, each under `prefix`; what means are in is not checked.
    """

    plane: P
    prefix: str
    rows: torch.Tensor
    encoded: EncodedTensor
    blocks: reference_kv.RotatedBlocks
    kept: torch.Tensor | None


def room_for(encoded: EncodedTensor, out: torch.Tensor | None) -> torch.Tensor:
    """Where keys or values are decoded to: `prepared_out`, not before there are parts enough for what is asked for."""
    main = encoded.parts.get("")
    if main is None:
        raise CodecError(f"{encoded.encoding} without codes")
    if 2 * sum(part.numel() for part in encoded.parts.values()) < prod(encoded.spec.shape):
        raise CodecError(f"{encoded.encoding} has too few codes for {encoded.spec}")  # before memory is made for them
    return prepared_out(encoded.spec, main.device, out)


def shape_only(encoded: EncodedTensor) -> torch.Tensor:
    """A tensor of its spec without memory, to check it on."""
    if encoded.spec.dtype not in BY_NAME:
        raise CodecError(f"unknown dtype {encoded.spec.dtype!r}")
    return torch.empty(encoded.spec.shape, dtype=getattr(torch, encoded.spec.dtype), device="meta")


def stored_planes(encoded: EncodedTensor, like: torch.Tensor, form: type[P]) -> list[Stored[P]]:
    """The planes of a stored tensor of keys or values; CodecError unless its parts are theirs and no others.

    like: of its spec; the rows are views of it, or copies of a packed tensor's halves. form: the codec's planes.
    """
    role, token_axis, spec = stored_role(encoded.attrs), stored_token_axis(encoded.attrs), encoded.spec
    if spec.dtype not in LOSSY_ALLOWED or prod(spec.shape) == 0:
        raise CodecError(f"{encoded.encoding} decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {spec}")
    if role == "packed" and (not spec.shape or spec.shape[-1] % 2):
        raise CodecError(f"{encoded.encoding} packs keys and values in an even last dimension, not {spec.shape}")
    halves = planes_of(like, role, token_axis)
    planes = [
        form.of(part, rows, kept_indexes(encoded.attrs.get(f"{prefix}kept"), rows.shape[1]))
        for prefix, part, rows in halves
    ]
    if form.tops_joined:
        encoded = _with_tops(encoded, planes)
    if role == "packed":
        encoded = _split_packed(encoded, planes)
    names: list[str] = []
    for plane, (prefix, _part, _rows) in zip(planes, halves, strict=True):
        names += [prefix, f"{prefix}scale", f"{prefix}scale_top"]
        names += [f"{prefix}kept"] * bool(plane.kept)
        names += [f"{prefix}{suffix}" for suffix in form.means if plane.groups]
    require_names(encoded, names)
    return [
        Stored(plane, prefix, rows, encoded, _blocks(encoded, plane, prefix), _kept(encoded, plane, prefix))
        for plane, (prefix, _part, rows) in zip(planes, halves, strict=True)
    ]


def _with_tops(encoded: EncodedTensor, planes: Collection[Plane]) -> EncodedTensor:
    """The tensor with the tops, which lie behind the scales, as a part of their own."""
    scales = sum(plane.blocks for plane in planes)
    tops = 2 * sum(-(-plane.blocks // reference_kv.SCALE_GROUP) for plane in planes)
    if "scale_top" in encoded.parts:
        raise CodecError(f"{encoded.encoding} has its tops behind its scales")
    both = require_part(encoded, "scale", torch.uint8, scales + tops)
    parts = {**encoded.parts, "scale": both[:scales], "scale_top": both[scales:].clone().view(torch.int16)}
    return EncodedTensor(encoded.spec, encoded.encoding, parts, encoded.attrs)


def _split_packed(encoded: EncodedTensor, planes: Collection[Plane]) -> EncodedTensor:
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


def _blocks(encoded: EncodedTensor, plane: Plane, prefix: str) -> reference_kv.RotatedBlocks:
    """Codes, scales and tops of exactly the lengths the plane has, with tops that are finite scales."""
    b = plane.blocks
    codes = require_part(encoded, prefix, torch.uint8, b * plane.block // 2)
    scales = require_part(encoded, f"{prefix}scale", torch.uint8, b)
    tops = require_part(encoded, f"{prefix}scale_top", torch.int16, -(-b // reference_kv.SCALE_GROUP))
    if not tops.clamp(0, _TOP_LIMIT - 1).equal(tops):
        raise CodecError(f"nf4-kv scale tops lie in [0, {_TOP_LIMIT})")
    return reference_kv.RotatedBlocks(codes, scales, tops, scales)


def _kept(encoded: EncodedTensor, plane: Plane, prefix: str) -> torch.Tensor | None:
    """The kept tokens (outer, kept, inner, d), finite; None where there are none."""
    if not plane.kept:
        return None
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


def require_names(encoded: EncodedTensor, names: Collection[str]) -> None:
    """CodecError unless the parts are these and no others: whoever takes an entry as it is held takes all of them."""
    if encoded.parts.keys() != set(names):
        raise CodecError(f"{encoded.encoding} has the parts {sorted(names)}, not {sorted(encoded.parts)!r:.200}")


def require_finite(encoded: EncodedTensor, suffix: str, part: torch.Tensor) -> torch.Tensor:
    """The part; CodecError where a scale or a value in it is not finite. No codec writes such a one."""
    if not finite(part):
        raise CodecError(f"{encoded.encoding} part {suffix!r} holds what is not finite")
    return part


def finite(x: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN: by the extremes, as torch.isfinite takes twenty times as long on 16 bits."""
    if not x.numel():
        return True
    least, most = torch.aminmax(x)  # NaN where one value is
    return -inf < float(least) and float(most) < inf


def require_part(encoded: EncodedTensor, suffix: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
    """A part, flat and contiguous, of exactly this type and length; CodecError otherwise."""
    part = encoded.parts.get(suffix)
    if part is None or part.dtype != dtype or part.numel() != numel or not part.is_contiguous():
        found = "nothing" if part is None else f"{part.dtype} {tuple(part.shape)}"
        raise CodecError(f"{encoded.encoding} part {suffix!r}: {found}, expected {dtype} ({numel},)")
    return part.view(-1)


def prepared_out(spec: TensorSpec, device: torch.device, out: torch.Tensor | None) -> torch.Tensor:
    """Where a decoded tensor goes: `out` when it fits the spec, fresh memory when None; else CodecError."""
    if spec.dtype not in BY_NAME:
        raise CodecError(f"unknown dtype {spec.dtype!r}")
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if out is None:
        return torch.empty(spec.shape, dtype=dtype, device=device)
    if out.dtype != dtype or tuple(out.shape) != spec.shape or out.device != device or not out.is_contiguous():
        raise CodecError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected contiguous {spec} on {device}"
        )
    return out


def standing_apart(rows: torch.Tensor, part: Part, hints: Hints) -> tuple[int, ...]:
    """The tokens to keep in 16 bits: the first ones of what may be a prefix, else outlying keys."""
    tokens = rows.shape[1]
    most = {"key": KEPT_KEYS, "value": KEPT_VALUES, "plain": 0}[part]
    if hints.prefix_start is None:
        # Unknown: at most one token in 64, so that a short chunk is not mostly 16 bits.
        most = min(most, max(1, tokens // 64))
    most = min(most, tokens - 1)
    if hints.prefix_start is not False:
        return tuple(range(most))
    if part != "key" or tokens < reference_kv.GROUP:
        return ()
    x = rows.to(torch.float32)
    energy = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(0, 2, 3))
    found = (energy > OUTLIER_ENERGY * energy.median()).nonzero().view(-1)
    if found.numel() > most:
        found = found[energy[found].argsort(descending=True, stable=True)[:most]]
    return tuple(sorted(found.tolist()))


def others(tokens: int, kept: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Indexes of the tokens that are not kept. Returns int64 (tokens - len(kept),)."""
    mask = torch.ones(tokens, dtype=torch.bool, device="cpu")
    mask[list(kept)] = False
    return mask.nonzero().view(-1).to(device)
