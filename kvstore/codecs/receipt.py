"""The receipt of an encoded tensor: how much of its content decoding loses, measured on the decoded values.

One rule in one place for every codec, so that a new codec cannot forget it: `codecs.encode_entry` returns only
`Measured` tensors, and only this module makes them. It decodes into the tensor's own type, refuses decoded values that
are not finite, and writes the attribute relative_error: for keys and values |x - decoded| / |content| of the worst
layer and head, for other tensors |x - decoded| / |x|. 0.0 means bit for bit as put, and nothing else.
Only nf4-kv may measure by itself, for float32, where no rounding follows (`from_sums`). Pure, any thread.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from kvstore.codecs.hints import Hints, role_of, token_axis_of
from kvstore.codecs.parts import Part, others, planes_of, standing_apart
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import KvKernel, kv_kernel, reference_content
from kvstore.kernels.cpu import STILL, Rotary, Rows

RESOLUTION = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-18}
"""Of |x|: what lies below is not content but the rounding of whoever computed x in this type."""
_TINY = 1e-28
"""Content a value, squared: below, sums of float32 squares lose it, and float64 counts again."""
_SAMPLE_OUTER, _SAMPLE_TOKENS = 4, 32
_LEAST = sys.float_info.min
"""The receipt of what differs by less than squares can tell: not bit for bit, so not 0.0."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured(EncodedTensor):
    """An encoded tensor whose receipt was measured here."""

    def after(self, error: float) -> "Measured":
        """The same where what was encoded had an error already: the sum, which the whole error is never above."""
        return self if not error else with_receipt(self, self.relative_error + error)


class Decoder(Protocol):
    """The half of a codec that a measurement needs."""

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor."""
        ...


NOTHING_KNOWN: Mapping[str, torch.Tensor] = MappingProxyType({})


def sealed(
    codec: Decoder,
    name: str,
    x: torch.Tensor,
    encoded: EncodedTensor,
    hints: Hints,
    known: Mapping[str, torch.Tensor] = NOTHING_KNOWN,
) -> Measured:
    """The tensor with its receipt. known: the content of planes that were counted already, by their prefix.

    Raises CodecError if it would decode to a value that is not finite.
    """
    if isinstance(encoded, Measured):
        return encoded
    return with_receipt(encoded, max(float(e.max()) for e in errors_by_head(codec, name, x, encoded, hints, known)))


def with_receipt(encoded: EncodedTensor, error: float) -> Measured:
    """The tensor with this receipt."""
    attrs = {**encoded.attrs, "relative_error": error}
    return Measured(encoded.spec, encoded.encoding, encoded.parts, attrs)


def role_in(name: str, x: torch.Tensor, hints: Hints) -> str:
    """The tensor's role; "plain" if it has no axis of tokens, or cannot be halved."""
    role = role_of(name, hints)
    return "plain" if x.dim() < 2 or (role == "packed" and x.shape[-1] % 2) else role


def errors_by_head(
    codec: Decoder,
    name: str,
    x: torch.Tensor,
    encoded: EncodedTensor,
    hints: Hints,
    known: Mapping[str, torch.Tensor] = NOTHING_KNOWN,
) -> list[torch.Tensor]:
    """The relative error of each head, for each plane (keys, values, or the only one): float64 (outer, inner).

    known: see `sealed`. Raises CodecError if a decoded value is not finite.
    """
    x, decoded, role = x.detach(), codec.decode(encoded), role_in(name, x, hints)
    if role == "plain":
        return [_errors(x.reshape(1, 1, 1, -1), decoded.reshape(1, 1, 1, -1), "plain", ())]
    axis = encoded.attrs.get("token_axis")
    if not isinstance(axis, int):
        axis = token_axis_of(x.shape, hints)
    found = []
    both = zip(planes_of(x, role, axis), planes_of(decoded, role, axis), strict=True)
    for (prefix, part, rows), (_, _, got) in both:
        stored = encoded.attrs.get(f"{prefix}kept")
        kept = standing_apart(rows, part, hints) if stored is None else _kept_in(stored)
        found.append(_errors(rows, got, part, kept, known.get(prefix)))
    return found


def _kept_in(stored: object) -> tuple[int, ...]:
    """The kept tokens that an attribute names: indexes, or how many of the first (kv-learned)."""
    if isinstance(stored, int):
        return tuple(range(stored))
    return tuple(map(int, str(stored).split(","))) if stored else ()


def from_sums(missed: torch.Tensor, energies: torch.Tensor, values: int) -> float | None:
    """The receipt of float32 rows from sums made while encoding; None if only decoding can tell.

    missed: squared error of each head, (outer, inner); energies: `content.energies` of the coded rows, (outer, inner,
    2); values: those of one head.
    """
    if not bool((energies[..., 0] >= _TINY * values).all() & (energies < torch.inf).all()):
        return None
    worst = float(_ratios(missed, energies, torch.float32).max())
    # The error of four bits is 0.05 and more; for far smaller ones the sums cancel and say little.
    return worst if 0.01 <= worst < float("inf") else None


def rotary_of(rows: torch.Tensor, kernel: KvKernel | None) -> Rotary:
    """How RoPE pairs the channels of keys: the pairing that leaves least of a sample of them.

    Half apart (Llama, Qwen), neighbours (GPT-J, Cohere), all channels, a half (GLM) or a quarter (NeoX). rows: (outer,
    tokens, inner, d).
    """
    outer, tokens, _inner, d = rows.shape
    usual = Rotary(d - d % 2, interleaved=False)
    if tokens < 8 or d < 8:
        return usual
    some = rows[:: max(1, -(-outer // _SAMPLE_OUTER)), :_SAMPLE_TOKENS]
    candidates = [Rotary(d // part // 2 * 2, interleaved=near) for part in (1, 2, 4) for near in (False, True)]
    left, whole = _energies(some, kernel, *candidates).unbind(-1)
    scores = (left / whole).log().nan_to_num(0.0, 0.0, 0.0).sum(dim=(1, 2)).tolist()
    best, least = usual, float("inf")
    for rotary, score in zip(candidates, scores, strict=True):
        if score < least - 1e-3 * abs(least if least < float("inf") else 0.0):
            best, least = rotary, score
    return best


def _errors(
    rows: torch.Tensor, got: torch.Tensor, part: Part, kept: tuple[int, ...], known: torch.Tensor | None = None
) -> torch.Tensor:
    kernel = kv_kernel(rows.device)
    coded = _without(rows, kept)
    missed = distances(rows, got, kernel)
    energies = _content(coded, part, kernel) if known is None else known
    values = max(1, coded.shape[1] * coded.shape[3])
    if not bool((energies[..., 0] >= _TINY * values).all() & (energies < torch.inf).all() & (missed < torch.inf).all()):
        missed = reference_content.distances(rows, got)
        rotary = rotary_of(coded, kernel) if part == "key" else STILL
        energies = reference_content.energies(coded, rotary) if part != "plain" else _whole(coded, None)
    if not bool(torch.isfinite(missed).all()):
        raise CodecError("encoded, finite values would come back as infinities; keep these raw")
    ratios = _ratios(missed, energies, rows.dtype)
    if float(ratios.max()) == 0.0 and not _same_bits(rows, got):
        ratios = ratios + _LEAST
    return ratios


def _ratios(missed: torch.Tensor, energies: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    left, whole = energies.unbind(-1)
    left = torch.maximum(left, whole * RESOLUTION[dtype] ** 2)
    return torch.where(missed > 0, (missed / left).sqrt(), torch.zeros_like(missed))


def distances(rows: torch.Tensor, got: torch.Tensor, kernel: KvKernel | None) -> torch.Tensor:
    """Squared error of each head (outer, inner), by the kernel if there is one."""
    if kernel is None:
        return reference_content.distances(rows, got)
    return kernel.kv_distance(rows, got, _place(rows))


def _energies(rows: torch.Tensor, kernel: KvKernel | None, *rotaries: Rotary) -> torch.Tensor:
    """Float64 (pairings, outer, inner, 2)."""
    if kernel is None:
        return torch.stack([reference_content.energies(rows, rotary) for rotary in rotaries])
    return kernel.kv_content(rows, _place(rows), *rotaries)


def _content(coded: torch.Tensor, part: Part, kernel: KvKernel | None) -> torch.Tensor:
    if part == "plain":
        return _whole(coded, kernel)
    return _energies(coded, kernel, rotary_of(coded, kernel) if part == "key" else STILL)[0]


def _whole(rows: torch.Tensor, kernel: KvKernel | None) -> torch.Tensor:
    """Energy without subtracting a mean, twice: (outer, inner, 2)."""
    energy = distances(rows, torch.zeros_like(rows), kernel)
    return torch.stack((energy, energy), dim=-1)


def _without(rows: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    if not kept:
        return rows
    if kept == tuple(range(len(kept))) and rows.device.type == "cpu":
        return rows[:, len(kept) :]
    return rows[:, others(rows.shape[1], kept, rows.device)]


def _place(rows: torch.Tensor) -> Rows:
    outer, tokens, inner, d = rows.shape
    stride = rows.stride(0) if outer > 1 else tokens * inner * d
    return Rows(outer, tokens, inner, d, stride, 1, 32, 0)


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def by_layer(errors: list[torch.Tensor], layers: int) -> torch.Tensor:
    """The worst error of each of a tensor's first `layers` slabs. errors: as `errors_by_head` gives them."""
    return torch.stack([e.reshape(layers, -1).amax(dim=1) for e in errors]).amax(dim=0)
