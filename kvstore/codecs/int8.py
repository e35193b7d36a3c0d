"""int8: eight bits a value with a scale a row, 8.25 bits a value at a head_dim of 64.

Used where NF4 misses a stated bound. Rows are runs of the last dimension (one token of one head), or of 64
values where that dimension is shorter than 32. Pure torch, any device, any thread: it is not on a path that
must be as fast as memory.
"""

from math import prod

import torch

from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.parts import finite, prepared_out, require_finite, require_names, require_part
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError

SHORT_ROW = 64
_MIN_ROW = 32
_MIN_SCALE = 1e-30
"""Rows of smaller values become zeros: the reciprocal of their scale would overflow."""
_PARTS = frozenset({"", "scale"})


class Int8:
    """Symmetric 8-bit integers, one bfloat16 scale a row."""

    name = "int8"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor of finite values.

        x: float32, float16 or bfloat16, at least one value. Parts: "" int8 (n,), "scale" bfloat16 (rows,).
        The attribute relative_error is |x - decoded| / |x|. Raises CodecError for anything else.
        """
        del name, hints
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if spec.dtype not in LOSSY_ALLOWED or x.numel() == 0:
            raise CodecError(f"int8 holds non-empty tensors of {sorted(LOSSY_ALLOWED)}, not {spec}")
        n, width = x.numel(), _width(spec.shape)
        rows = torch.nn.functional.pad(x.detach().reshape(-1).to(torch.float32), (0, -n % width)).view(-1, width)
        absmax = rows.abs().amax(dim=1)
        if not bool((absmax < torch.finfo(torch.bfloat16).max).all()):
            raise CodecError("int8 holds finite values only; keep these raw")
        # Rounded up to bfloat16, so that the largest value of a row is within 127 steps.
        scale = (((absmax / 127).view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        scale = torch.where(absmax < _MIN_SCALE, torch.zeros_like(scale), scale)
        inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
        codes = torch.round(rows * inverse[:, None])
        norm = float(torch.linalg.vector_norm(rows))
        error = float(torch.linalg.vector_norm(rows - codes * scale[:, None]))
        parts = {"": codes.to(torch.int8).view(-1)[:n].clone(), "scale": scale.to(torch.bfloat16)}
        return EncodedTensor(spec, self.name, parts, {"relative_error": error / norm if norm else 0.0})

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out`; CodecError where parts and spec do not agree."""
        spec = encoded.spec
        self.check(encoded)
        n, width = prod(spec.shape), _width(spec.shape)
        codes, scale = encoded.parts[""].view(-1), encoded.parts["scale"].view(-1).to(torch.float32)
        out = prepared_out(spec, codes.device, out)
        flat = out.view(-1)
        full = n // width * width
        flat[:full].view(-1, width).copy_(codes[:full].view(-1, width) * scale[: n // width, None])
        if full < n:
            flat[full:].copy_(codes[full:] * scale[-1])
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding."""
        spec = encoded.spec
        if spec.dtype not in LOSSY_ALLOWED or not prod(spec.shape):
            raise CodecError(f"int8 decodes to non-empty {sorted(LOSSY_ALLOWED)}, not {spec}")
        n, width = prod(spec.shape), _width(spec.shape)
        require_names(encoded, _PARTS)
        codes = require_part(encoded, "", torch.int8, n)
        scale = require_finite(self.name, "scale", require_part(encoded, "scale", torch.bfloat16, -(-n // width)))
        largest = torch.finfo(getattr(torch, spec.dtype)).max
        if float(scale.abs().max()) * 128 < largest:
            return
        rows = torch.nn.functional.pad(codes.to(torch.float32), (0, -n % width)).view(-1, width)
        decoded = (rows.abs().amax(dim=1) * scale.to(torch.float32).abs()).to(getattr(torch, spec.dtype))
        if not finite(decoded):
            raise CodecError(f"int8 part 'scale' makes values beyond {largest} of {spec.dtype}")


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape and shape[-1] >= _MIN_ROW else SHORT_ROW
