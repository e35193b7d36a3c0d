"""The codec for a tensor's role: nf4-kv2 for keys and values, nf4 for any other tensor that may be lossy.

It is a rule, not an encoding: its output has the name of the codec that it chose. Pure, any thread.
"""

import torch

from kvstore.codecs.hints import NO_HINTS, Hints, role_of, token_axis_of
from kvstore.codecs.nf4 import NF4
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError

_TOKENS_MIN = 16
"""Below it keys have hardly a mean (`nf4_kv2.MEANS_MIN`), and nf4 is what other programs read."""


class ByRole:
    """nf4-kv2 for tensors whose name says key or value ("k", "v", "layers.3.key", ...), else nf4."""

    name = "auto"
    lossy = True

    def __init__(self) -> None:
        self._kv, self._plain = NF4KV2(), NF4()

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor by the codec for its name and shape. Raises CodecError if that codec does."""
        if role_of(name, hints) == "plain" or x.dim() < 2:
            return self._plain.encode(name, x, hints)
        if x.shape[token_axis_of(x.shape, hints)] < _TOKENS_MIN:
            return self._plain.encode(name, x, hints)
        return self._kv.encode(name, x, hints)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Never used for a stored tensor, which names the codec that wrote it; decodes by that name."""
        for codec in (self._kv, self._plain):
            if codec.name == encoded.encoding:
                return codec.decode(encoded, out)
        raise CodecError(f"auto never writes {encoded.encoding!r}")
