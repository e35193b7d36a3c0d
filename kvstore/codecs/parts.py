"""The parts of encoded tensors, and the rows of keys and values: what a codec reads is checked here.

What a stored tensor of keys or values has to consist of is `Expected`: worked out from its shape and attributes alone,
and remembered. `read` checks all of its parts against that in one pass, for a check and for decoding alike.

Keys and values are rows, (outer, tokens, inner, head_dim). outer: the axes before the tokens (layers); inner: those
between a token and its rows (heads). A `Plane` is the rows of one role, with the tokens that are kept in 16 bits.
Pure, any thread. Leaves out: what the bytes of a part mean (each codec).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, prod
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch

from kvstore.codecs.hints import Hints
from kvstore.dtypes import BY_NAME, LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import reference_kv
from kvstore.kernels.cpu import Rotary, Rows

KEPT_KEYS = 4
"""Tokens at the start of a prefix whose keys stay in 16 bits; elsewhere at most so many outlying ones."""
KEPT_VALUES = 1
"""Values have a scale per token, so an attention sink spoils no other token; only the first one's own error shows
(KL of values alone 1.64e-3 without, 0.40e-3 with it, 0.40e-3 with four)."""
OUTLIER_ENERGY = 4.0
"""Times the median energy about the mean; SmolLM2's tokens beyond the first stay below 3."""

EXPECTED_MAX, KEPT_TEXT_MAX = 256, 256
"""How many are remembered: the tensors of a namespace's chunks have one or few. One that names more kept tokens than a
chunk of 16,000 has is worked out each time: whoever writes records could fill the memory with them."""

Shape = tuple[int, int, int, int]
Part = Literal["key", "value", "plain"]
HALVES: tuple[tuple[Part, str], ...] = (("key", ""), ("value", "v."))
JOINED = {"": torch.uint8, "scale": torch.uint8, "scale_top": torch.int16}
"""Parts of a packed tensor that hold those of its keys and then those of its values: each part costs its overhead."""
_TOP_LIMIT = 0x7F800000 >> 17


def planes_of(x: torch.Tensor, role: str, token_axis: int) -> list[tuple[str, Part, torch.Tensor]]:
    """(prefix of part names, role, rows (outer, tokens, inner, d)); halves of a packed tensor are copies."""
    roles = roles_of(role)
    if len(roles) == 1:
        return [(prefix, part, x.contiguous().view(rows_of(x.shape, token_axis))) for part, prefix in roles]
    half = x.shape[-1] // 2
    halves = x[..., :half], x[..., half:]
    rows = (half.clone(memory_format=torch.contiguous_format).view(rows_of(half.shape, token_axis)) for half in halves)
    return [(prefix, part, one) for (part, prefix), one in zip(roles, rows, strict=True)]


def roles_of(role: str) -> tuple[tuple[Part, str], ...]:
    """The role of each plane of a tensor, and the prefix of its parts' names."""
    if role == "packed":
        return HALVES
    return (("key" if role == "key" else "value" if role == "value" else "plain", ""),)


def rows_of(shape: Sequence[int], token_axis: int) -> Shape:
    """A tensor's shape as (outer, tokens, inner, d); one with too few axes is one run of tokens, or one row."""
    if len(shape) < 2:
        return 1, 1, 1, prod(shape)
    axis = max(len(shape) + token_axis, 0)
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 : -1]), shape[-1]


class Due(NamedTuple):
    """A part as it has to be: its type, one of these, and how many values of it each of its pieces has, in order.

    repeated: the last piece may be there several times. finite: no value is infinite or NaN. most: (which piece, the
    largest value in it) where a codec writes no larger ones.
    """

    dtypes: tuple[torch.dtype, ...]
    pieces: tuple[int, ...]
    repeated: bool = False
    finite: bool = False
    most: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plane:
    """One role's rows: (outer, tokens, inner, d) of the whole tensor, and which tokens are kept in 16 bits.

    coded: how many tokens are coded: the last ones, where the others lead. groups: means that each of their outer slabs
    has. size: of the Hadamard transform. block: values a scale. blocks: scales of the coded tokens; the last block may
    be padded. tops: of so many scales. leading: whether the kept tokens are the first ones: then the rest is one view
    of the tensor. where: the coded tokens of the whole tensor, for the kernel; never to be written.
    A subclass says how a codec's parts differ. means_min: coded tokens that have a mean, at least. codes_inside: a kept
    token is coded too, unless it leads. tops_joined: the tops lie behind the scales.
    """

    means_min: ClassVar[int] = 1
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
    block: int
    blocks: int
    tops: int
    leading: bool
    where: Rows = field(compare=False)

    @classmethod
    def of(cls, role: Part, shape: Sequence[int], kept: tuple[int, ...]) -> Self:
        """The plane of rows (outer, tokens, inner, d)."""
        outer, tokens, inner, d = shape
        lead = next((at for at, token in enumerate(kept) if at != token), len(kept))
        coded = tokens - (lead if cls.codes_inside else len(kept))
        groups = reference_kv.group_count(coded) if role == "key" and coded >= cls.means_min else 0
        size = reference_kv.rotation_size(d)
        block = reference_kv.KEY_BLOCK if role == "key" else reference_kv.VALUE_BLOCK
        blocks = -(-outer * coded * inner * d // block)
        where = Rows(outer, coded, inner, d, tokens * inner * d, size, block, groups)
        tops = -(-blocks // reference_kv.SCALE_GROUP)
        return cls(
            role, outer, tokens, inner, d, kept, coded, groups, size, block, blocks, tops, lead == len(kept), where
        )

    @property
    def shape(self) -> Shape:
        """Of the rows."""
        return self.outer, self.tokens, self.inner, self.d

    def rows(self, stride_tokens: int) -> Rows:
        """The coded tokens for the kernel, slabs lying stride_tokens tokens apart."""
        stride = stride_tokens * self.inner * self.d
        return Rows(self.outer, self.coded, self.inner, self.d, stride, self.size, self.block, self.groups)

    def means_due(self, turning: Rotary | None) -> dict[str, Due]:
        """The parts that means are in, where there are any."""
        del turning
        n = self.outer * self.groups * self.inner
        return {"mean": Due((torch.int8,), (n * self.d,)), "mean_scale": Due((torch.float32,), (n,), finite=True)}

    def turning_in(self, channels: object, interleaved: object) -> Rotary | None:
        """Which channels turn, by two attributes; None: none do. Raises CodecError."""
        del channels, interleaved
        return None

    def kept_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The kept tokens (outer, kept, inner, d), contiguous."""
        return (rows[:, : len(self.kept)] if self.leading else rows[:, list(self.kept)]).contiguous()

    def others(self, device: torch.device) -> torch.Tensor:
        """Indexes of the coded tokens. Returns int64 (coded,)."""
        return others(self.tokens, self.kept, device)


P = TypeVar("P", bound=Plane)


class Stored(NamedTuple, Generic[P]):
    """The parts of one plane of a stored tensor, checked. kept: the tokens in 16 bits, if there are any.

    means: the pieces of its means' parts, in order; angles in them are not checked. turning: which channels turn.
    """

    plane: P
    codes: torch.Tensor
    scales: torch.Tensor
    tops: torch.Tensor
    kept: torch.Tensor | None
    means: tuple[torch.Tensor, ...]
    turning: Rotary | None


class Named(NamedTuple, Generic[P]):
    """A plane of a stored tensor, and the names of the parts that are its alone. turning: as in `Stored`."""

    plane: P
    kept: str
    means: tuple[str, ...]
    turning: Rotary | None


class Expected(NamedTuple, Generic[P]):
    """What a stored tensor has to consist of, by its shape and its attributes alone. due: its parts, by name."""

    planes: tuple[Named[P], ...]
    due: Mapping[str, Due]


def expected(  # noqa: PLR0913, PLR0917 - the key of a cache: each by itself, so that equal values of other types are told apart
    form: type[P],
    encoding: str,
    dtype: str,
    shape: tuple[int, ...],
    role: object,
    token_axis: object,
    kept: object,
    value_kept: object,
    channels: object,
    interleaved: object,
) -> Expected[P]:
    """What a tensor that `encoding` wrote in planes of this form consists of. Raises CodecError where there is none."""
    role, token_axis = stored_role(role), stored_token_axis(token_axis)
    if dtype not in LOSSY_ALLOWED or min(shape, default=1) < 1:
        raise CodecError(f"{encoding} decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {dtype} {shape}")
    roles = roles_of(role)
    if len(roles) > 1:
        if not shape or shape[-1] % 2:
            raise CodecError(f"{encoding} packs keys and values in an even last dimension, not {shape}")
        shape = (*shape[:-1], shape[-1] // 2)
    rows = rows_of(shape, token_axis)
    texts = (kept, value_kept)[: len(roles)]
    planes = [form.of(part, rows, kept_indexes(text, rows[1])) for (part, _), text in zip(roles, texts, strict=True)]
    scales, tops = tuple(plane.blocks for plane in planes), tuple(plane.tops for plane in planes)
    due = {"": Due((torch.uint8,), tuple(plane.blocks * plane.block // 2 for plane in planes))}
    if form.tops_joined:
        due["scale"] = Due((torch.uint8,), (*scales, *(2 * count for count in tops)))
    else:
        due["scale"], due["scale_top"] = Due((torch.uint8,), scales), Due((torch.int16,), tops)
    named = []
    for plane, (_, prefix) in zip(planes, roles, strict=True):
        if plane.kept:
            values = plane.outer * len(plane.kept) * plane.inner * plane.d
            due[f"{prefix}kept"] = Due((torch.float16, torch.bfloat16), (values,), finite=True)
        turning = plane.turning_in(channels, interleaved) if plane.groups else None
        means = {f"{prefix}{suffix}": one for suffix, one in plane.means_due(turning).items()} if plane.groups else {}
        due |= means
        named.append(Named(plane, f"{prefix}kept", tuple(means), turning))
    return Expected(tuple(named), due)


_known = lru_cache(maxsize=EXPECTED_MAX, typed=True)(expected)


def expected_of(encoded: EncodedTensor, form: type[P]) -> Expected[P]:
    """What is expected of a stored tensor. Raises CodecError where its shape and attributes do not belong together."""
    spec, attrs = encoded.spec, encoded.attrs
    kept, value_kept = attrs.get("kept"), attrs.get("v.kept")
    told: tuple[Any, ...] = (
        form, encoded.encoding, spec.dtype, spec.shape, attrs.get("role"), attrs.get("token_axis"), kept, value_kept,
        attrs.get("rotary"), attrs.get("interleaved"),
    )  # fmt: skip
    if type(kept) is str and len(kept) <= KEPT_TEXT_MAX and (value_kept is None or type(value_kept) is str):
        try:
            return _known(*told)
        except TypeError:  # what cannot be hashed: the same, and it is refused for what it is
            pass
    return expected(*told)


def read(encoded: EncodedTensor, form: type[P]) -> list[Stored[P]]:
    """The planes of a stored tensor of keys or values; CodecError unless its parts are theirs and no others."""
    named, due = expected_of(encoded, form)
    require_names(encoded, due.keys())
    parts = {suffix: _pieces(encoded, suffix, one) for suffix, one in due.items()}
    scales = parts["scale"]
    tops = [top.clone().view(torch.int16) for top in scales[len(named) :]] if form.tops_joined else parts["scale_top"]
    found = []
    for at, (plane, kept_name, mean_names, turning) in enumerate(named):
        if not tops[at].clamp(0, _TOP_LIMIT - 1).equal(tops[at]):
            raise CodecError(f"nf4-kv scale tops lie in [0, {_TOP_LIMIT})")
        kept = None
        if plane.kept:
            kept = parts[kept_name][0].view(plane.outer, len(plane.kept), plane.inner, plane.d)
        means = tuple(piece for name in mean_names for piece in parts[name])
        found.append(Stored(plane, parts[""][at], scales[at], tops[at], kept, means, turning))
    return found


def _pieces(encoded: EncodedTensor, suffix: str, due: Due) -> tuple[torch.Tensor, ...]:
    """The pieces of a part, flat; CodecError unless it has the type and the length, and holds what is due."""
    part, pieces = encoded.parts[suffix], due.pieces
    numel = sum(pieces)
    if due.repeated and pieces[-1]:
        more = max(0, part.numel() - numel) // pieces[-1] * pieces[-1]
        numel, pieces = numel + more, (*pieces[:-1], pieces[-1] + more)
    flat = require_part(encoded, suffix, part.dtype if part.dtype in due.dtypes else due.dtypes[0], numel)
    if due.finite:
        require_finite(encoded.encoding, suffix, flat)
    found = (flat,) if len(pieces) == 1 else flat.split_with_sizes(pieces)
    if due.most is not None:
        at, most = due.most
        largest = int(found[at].max())
        if largest > most:
            raise CodecError(f"{encoded.encoding} exponents of means are at most {most}, not {largest}")
    return found


class RowsCodec(ABC, Generic[P]):
    """The reading half of a codec whose tensors are planes of rows. form: the planes it has."""

    form: type[P]

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out` (same dtype, shape and device, contiguous).

        Raises CodecError when parts, attributes and spec do not belong together: before memory is made for what they
        say there is.
        """
        planes = read(encoded, self.form)
        out = prepared_out(encoded.spec, encoded.parts[""].device, out)
        if len(planes) == 1:
            self.fill(planes[0], out.view(planes[0].plane.shape))
            return out
        half = out.shape[-1] // 2
        for stored, target in zip(planes, (out[..., :half], out[..., half:]), strict=True):
            rows = out.new_empty(stored.plane.shape)
            self.fill(stored, rows)
            target.copy_(rows.view(target.shape))
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding."""
        for stored in read(encoded, self.form):
            if stored.turning is not None:
                self.means(stored)

    @abstractmethod
    def fill(self, stored: Stored[P], out: torch.Tensor) -> None:
        """Fill the rows (outer, tokens, inner, d), contiguous, of one plane. Raises CodecError as `means`."""

    @abstractmethod
    def means(self, stored: Stored[P]) -> object:
        """The means of a plane that has them. Raises CodecError for angles that the codec does not write."""


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


def stored_role(role: object) -> str:
    """The role that an attribute names; CodecError for none."""
    if role not in ("key", "value", "packed", "plain"):
        raise CodecError(f"nf4-kv knows no role {role!r}")
    return str(role)


def stored_token_axis(axis: object) -> int:
    """The token axis that an attribute names; CodecError for none."""
    if isinstance(axis, bool) or not isinstance(axis, int) or axis >= -1:
        raise CodecError(f"nf4-kv needs a token_axis below -1, not {axis!r}")
    return axis


def require_names(encoded: EncodedTensor, names: AbstractSet[str]) -> None:
    """CodecError unless the parts are these and no others: whoever takes an entry as it is held takes all of them."""
    if encoded.parts.keys() != names:
        raise CodecError(f"{encoded.encoding} has the parts {sorted(names)}, not {sorted(encoded.parts)!r:.200}")


def require_finite(encoding: str, suffix: str, part: torch.Tensor) -> torch.Tensor:
    """The part; CodecError where a scale or a value in it is not finite. No codec writes such a one."""
    if not finite(part):
        raise CodecError(f"{encoding} part {suffix!r} holds what is not finite")
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
    return part if part.dim() == 1 else part.view(-1)


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
