"""layers: one tensor whose layers are encoded differently, each run of alike layers by a codec of its own.

Written where a policy names codecs for some layers of (layers, tokens, heads, dim) tensors (`codecs.choice`); the first
layers of a model often need more bits than the rest. Nothing is nested: a run's encoding is any but this one.
Pure, any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvstore.codecs import Codec, codec_named, encode_measured
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.parts import prepared_out
from kvstore.codecs.raw import Raw
from kvstore.codecs.receipt import with_receipt
from kvstore.config import LAYER_RUNS_MAX as RUNS_MAX
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError


@dataclass(frozen=True, slots=True)
class Run:
    """Layers [start, stop) and how they are encoded."""

    start: int
    stop: int
    encoding: str
    attrs: Mapping[str, object]


class Layers:
    """Decodes what `encode_runs` wrote."""

    name = "layers"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Never called: only a policy knows which layers are which. Raises CodecError."""
        del x, hints
        raise CodecError(f"layers is written by a policy that names layers, not for {name!r} alone")

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out`; CodecError where runs, parts and spec do not agree."""
        spec = encoded.spec
        tensors = _checked(encoded)
        out = prepared_out(spec, next(iter(encoded.parts.values())).device, out)
        for run, tensor in tensors:
            codec_named(run.encoding).decode(tensor, out[run.start : run.stop])
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding."""
        for run, tensor in _checked(encoded):
            codec_named(run.encoding).check(tensor)


def encode_runs(name: str, x: torch.Tensor, hints: Hints, runs: Sequence[tuple[int, int, Codec]]) -> EncodedTensor:
    """Encode runs of layers [start, stop), which cover x's first axis in order, each by its codec.

    What a codec cannot hold stays raw. Raises CodecError where nothing was encoded.
    """
    attrs: list[list[object]] = []
    parts: dict[str, torch.Tensor] = {}
    worst = 0.0
    for at, (start, stop, codec) in enumerate(runs):
        run = x[start:stop]
        found = encode_measured(codec, name, run, hints) or Raw().encode(name, run)
        worst = max(worst, found.relative_error)
        parts.update({f"{at}.{suffix}" if suffix else str(at): part for suffix, part in found.parts.items()})
        attrs.append([start, stop, found.encoding, dict(found.attrs)])
    if all(run[2] == "raw" for run in attrs):
        raise CodecError(f"{name!r}: every layer stays as it is")
    spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
    return with_receipt(EncodedTensor(spec, Layers.name, parts, {"runs": attrs}), worst)


def _checked(encoded: EncodedTensor) -> list[tuple[Run, EncodedTensor]]:
    """Each run with its tensor; CodecError unless every part is one of theirs."""
    tensors = [
        (run, _tensor_of(encoded, at, run)) for at, run in enumerate(_runs(encoded.attrs.get("runs"), encoded.spec))
    ]
    parts = sum(len(tensor.parts) for _, tensor in tensors)
    if not parts or parts != len(encoded.parts):
        raise CodecError(f"layers: {len(encoded.parts)} parts, {parts} of them belong to a run")
    return tensors


def _tensor_of(encoded: EncodedTensor, at: int, run: Run) -> EncodedTensor:
    """One run of layers as a tensor of its own."""
    spec = TensorSpec(encoded.spec.dtype, (run.stop - run.start, *encoded.spec.shape[1:]))
    return EncodedTensor(spec, run.encoding, dict(_parts_of(encoded.parts, at)), run.attrs)


def _parts_of(parts: Mapping[str, torch.Tensor], at: int) -> list[tuple[str, torch.Tensor]]:
    prefix = f"{at}."
    found = [(suffix.removeprefix(prefix), part) for suffix, part in parts.items() if suffix.startswith(prefix)]
    return [("", parts[str(at)]), *found] if str(at) in parts else found


def _runs(value: object, spec: TensorSpec) -> list[Run]:
    """The runs an attribute names. They cover every layer once, in order; CodecError otherwise."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= RUNS_MAX or not spec.shape:
        raise CodecError(f"layers needs 1 to {RUNS_MAX} runs of a tensor with layers")
    runs: list[Run] = []
    for item in value:
        match item:
            case [int(start), int(stop), str(encoding), Mapping() as attrs] if encoding != Layers.name:
                runs.append(Run(start, stop, encoding, attrs))
            case _:
                raise CodecError(f"layers: not a run: {item!r:.80}")
    bounds = [0, *(run.stop for run in runs)]
    if [run.start for run in runs] != bounds[:-1] or bounds[-1] != spec.shape[0] or sorted(set(bounds)) != bounds:
        raise CodecError(f"layers: runs {bounds} do not cover {spec.shape[0]} layers")
    return runs
