"""RAW: the tensor itself, bit for bit."""

import torch

from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, is_of
from kvstore.errors import CodecError


class Raw:
    """The identity codec: what hot memory and exact records hold."""

    name = "raw"
    lossy = False

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """A private copy of x. x: any dtype, shape and device."""
        del name, hints
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        return EncodedTensor(spec, self.name, {"": x.detach().clone(memory_format=torch.contiguous_format)})

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of the held tensor, or `out` filled with it."""
        self.check(encoded)
        x = encoded.parts[""]
        if out is None:
            return x.clone()
        if out.dtype != x.dtype or out.shape != x.shape:
            raise CodecError(f"out is {out.dtype} {tuple(out.shape)}, the entry holds {x.dtype} {tuple(x.shape)}")
        return out.copy_(x)

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError unless the one part is a tensor of the spec."""
        x, spec = encoded.parts.get(""), encoded.spec
        if x is None or len(encoded.parts) != 1 or not is_of(x, spec):
            found = sorted(encoded.parts) if x is None else f"{x.dtype} {tuple(x.shape)}"
            raise CodecError(f"raw holds {found}, expected {spec}")
