"""The choice of the codec for an entry below hot: by its namespace, and by layer.

`CodecChoice` is made once from a configuration. A namespace's own policy replaces the store's. Pure, any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvstore.codecs import Codec, codec_for
from kvstore.codecs.adaptive import Adaptive
from kvstore.codecs.basis import Basis, read_basis, use
from kvstore.codecs.hints import NO_HINTS, Hints, role_of
from kvstore.codecs.kv_learned import Learned
from kvstore.codecs.layers import encode_runs
from kvstore.config import LEARNED, CodecPolicy, ColdConfig, Rate, WarmConfig, layer_range
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError, ConfigError

T = TypeVar("T")
_RANK = 4
"""Axes of (layers, tokens, heads, dim): with fewer, layers cannot be told from tokens."""


class ByLayer:
    """Some layers by their own codecs, the others by `rest`. If all layers are one run, it is no `layers` encoding."""

    name = "by-layer"
    lossy = True

    def __init__(self, layers: dict[int, Codec], rest: Codec) -> None:
        self._layers, self._rest = layers, rest

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor. Raises CodecError if no layer of it can be encoded, as the codecs do."""
        if x.dim() < _RANK or role_of(name, hints) == "plain":
            return self._of(_layer_in(name)).encode(name, x, hints)
        runs: list[tuple[int, int, Codec]] = []
        for layer in range(x.shape[0]):
            codec = self._of(layer)
            if runs and runs[-1][2] is codec:
                runs[-1] = (runs[-1][0], layer + 1, codec)
            else:
                runs.append((layer, layer + 1, codec))
        if len(runs) == 1:
            return runs[0][2].encode(name, x, hints)
        # `layers` is not nested: each of these runs keeps its bound as a whole.
        return encode_runs(name, x, hints, [(a, b, c.whole if isinstance(c, Adaptive) else c) for a, b, c in runs])

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Never used: a stored tensor names the codec that wrote it. Raises CodecError."""
        del out
        raise CodecError(f"by-layer is no encoding; decode by {encoded.encoding!r}")

    def _of(self, layer: int | None) -> Codec:
        return self._rest if layer is None else self._layers.get(layer, self._rest)


class CodecChoice:
    """The codec of each namespace, and the form that cold holds. Holds the bases in use as long as it lives."""

    def __init__(self, config: WarmConfig, cold: ColdConfig | None = None) -> None:
        """cold: the rates below. Raises ConfigError for a basis that cannot be read, or a rate that none keeps."""
        read = {path: use(read_basis(path)) for path in dict.fromkeys(config.bases.values())}
        self._bases = {name: read[path] for name, path in config.bases.items()}
        each = set(read.values())
        self._nested = {basis.digest: [other for other in each if other.times(basis)] for basis in each}
        self._rest = self._policy_of(config, "warm")
        self._namespaces = {
            name: self._policy_of(policy, f"warm.namespaces.{name}") for name, policy in config.namespaces.items()
        }
        self._below = cold or ColdConfig()
        for name in ("*", *self._bases, *self._namespaces, *self._below.namespaces):
            self.coarser_of(name)  # what cannot be kept is said at the start

    def codec_of(self, namespace: str) -> Codec:
        """The codec of entries put under a namespace: its own by "MODEL@DIGEST" or by the model, else the store's.

        Where that is kv-learned, the basis is found by the same names, or "*"; without one the codec is "auto".
        """
        policy = _by_name(self._namespaces, namespace) or self._rest
        return _by_name(policy.learned, namespace) or policy.learned.get("*") or policy.codec

    def coarser_of(self, namespace: str) -> Basis | None:
        """The basis of the form that a namespace's entries sink into cold in; None: they sink as they are.

        Raises ConfigError for a rate that no basis keeps, which a start finds.
        """
        own, codec = _by_name(self._below.namespaces, namespace), self.codec_of(namespace)
        rate, where = (own, f"cold.namespaces.{namespace}") if own else (self._below, "cold")
        if not rate.bits and not rate.max_kl:
            return None
        if not isinstance(codec, Learned):
            if own:
                raise ConfigError(f"{where} states a rate, and the codec there is not {LEARNED}: only its forms nest")
            return None
        found = _of_rate([codec.basis, *self._nested[codec.basis.digest]], rate, where, "--coarser FILE")
        return None if found is codec.basis else found

    def _policy_of(self, policy: CodecPolicy | WarmConfig, where: str) -> "_Policy":
        if policy.codec != LEARNED:
            return _Policy(_codec_of(policy), {})
        rest = codec_for("auto", policy.max_relative_error or None)
        learned: dict[str, Codec] = {}
        for name, named in self._bases.items():
            alike = [basis for basis in dict.fromkeys(self._bases.values()) if _model(basis) == _model(named)]
            basis = _of_rate(alike, policy, where) or named
            learned[name] = Learned(basis, rest, [other for other in alike if other is not basis])
        return _Policy(rest, learned)


@dataclass(frozen=True, slots=True)
class _Policy:
    """The codec of a policy; learned: instead of it where a basis has the namespace's name."""

    codec: Codec
    learned: Mapping[str, Codec]


_Rate = CodecPolicy | WarmConfig | ColdConfig | Rate


def _of_rate(of: Sequence[Basis], rate: _Rate, where: str, how: str = "") -> Basis | None:
    """Of bases of one model the finest within the bits that are stated, or the coarsest within the KL; None: unsaid.

    how: options of `learn` beside the rate. Raises ConfigError where no basis keeps it: what is put would be held
    otherwise than was asked for.
    """
    name, most, finest, has = ("bits", rate.bits, "coarsest", "has") if rate.bits else ("max_kl", rate.max_kl, "finest",
                                                                                       "measured")  # fmt: skip
    if not most:
        return None
    costs = {basis: basis.about.bits if rate.bits else basis.about.kl_measured for basis in of}
    fitting = [basis for basis, cost in costs.items() if cost <= most]
    if fitting:
        return max(fitting, key=lambda basis: basis.about.bits if rate.bits else -basis.about.bits)
    option = name.replace("_", "-")
    raise ConfigError(
        f"{where}.{name} is {most:g}, and the {finest} basis of {of[0].about.model!r} in warm.bases {has} "
        f"{min(costs.values()):.3g}: kvstored learn {how or f'--{option} {most:g}'} makes one"
    )


def _model(basis: Basis) -> tuple[object, ...]:
    about = basis.about
    return about.model, about.layers, about.heads, about.dim


def _by_name(of: Mapping[str, T], namespace: str) -> T | None:
    return of.get(namespace) or of.get(namespace.rpartition("@")[0])


def _codec_of(policy: CodecPolicy | WarmConfig) -> Codec:
    rest = codec_for(policy.codec, policy.max_relative_error or None)
    made: dict[tuple[str, float], Codec] = {(policy.codec, policy.max_relative_error): rest}
    layers: dict[int, Codec] = {}
    for text, choice in policy.layers.items():
        how = (choice.codec, choice.max_relative_error)
        codec = made.get(how) or codec_for(choice.codec, choice.max_relative_error or None)
        made[how] = codec  # one object per choice, so that equal neighbours make one run
        layers.update(dict.fromkeys(layer_range(text), codec))
    return ByLayer(layers, rest) if layers else rest


def _layer_in(name: str) -> int | None:
    """The layer in a name such as "layers.3.k", for entries with one key tensor per layer."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit()), None)
