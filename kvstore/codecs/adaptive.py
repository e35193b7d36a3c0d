"""Adaptive fidelity: the cheapest encoding that keeps a stated bound on the real tensor.

A policy of a namespace, not an encoding: what it writes carries the name of the codec it chose. Each
tensor is tried on its own, so entries with a key a layer get a choice a layer. Pure, any thread.
"""

from collections.abc import Sequence

import torch

from kvstore.codecs import Codec
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.nf4 import relative_error
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.raw import Raw
from kvstore.entry import EncodedTensor
from kvstore.errors import CodecError, ConfigError


class Adaptive:
    """nf4-kv where |x - decoded| / |x| stays within the bound, else int8, else the tensor itself."""

    name = "adaptive"
    lossy = True

    def __init__(self, max_relative_error: float) -> None:
        if not 0.0 <= max_relative_error < 1.0:
            raise ConfigError(f"max_relative_error is {max_relative_error}; it lies in [0, 1)")
        self._bound = max_relative_error
        self._tried: Sequence[Codec] = (NF4KV(), Int8())
        self._exact = Raw()

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """The first encoding whose decoded tensor, in x's own type, keeps the bound; its receipt is that error."""
        for codec in self._tried:
            try:
                encoded = codec.encode(name, x, hints)
            except CodecError:
                continue
            error = relative_error(x, codec.decode(encoded))
            if error <= self._bound:
                return EncodedTensor(
                    encoded.spec, encoded.encoding, encoded.parts, {**encoded.attrs, "relative_error": error}
                )
        return self._exact.encode(name, x)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Never used for a stored tensor, which names the codec that wrote it; decodes by that name."""
        by_name: dict[str, Codec] = {codec.name: codec for codec in (*self._tried, self._exact)}
        if encoded.encoding not in by_name:
            raise CodecError(f"adaptive never writes {encoded.encoding!r}")
        return by_name[encoded.encoding].decode(encoded, out)
