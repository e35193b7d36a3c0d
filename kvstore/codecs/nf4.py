"""NF4: packed 4-bit codes in blocks of 64 with double-quantized scales, 4.13 bits a value.

Bit-compatible with bitsandbytes 0.50 on the CPU: same packed bytes, same scales, same decoded bits.
Invariant: a record or an entry in memory holds codes and scales only; the constant tables
(`quant_map`, `nested_quant_map`, 1.1 KB a tensor) are added by `bitsandbytes_tensors` for an export.
Pure, any thread. Leaves out: which tensors may be touched (`codecs.encode_entry`) and the arithmetic
itself (`reference`; `kvstore.kernels` repeats it faster).
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from math import inf, prod, sqrt

import torch

from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.dtypes import BY_NAME, LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import cpu_kernel, reference
from kvstore.kernels.cpu import CpuKernel
from kvstore.kernels.tables import table

_PARTS = frozenset({"", "absmax", "nested_absmax"})
_OFFSET_LIMIT = 2.0**128
"""A scale is a float32: beyond it, and not a number, an offset is nobody's mean."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Double-quantized scales: codes uint8 (b,), nested float32 (ceil(b/256),), offset their mean."""

    codes: torch.Tensor
    nested: torch.Tensor
    offset: float


class NF4:
    """NF4 exactly as bitsandbytes packs it; for any tensor of a KV dtype."""

    name = "nf4"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor of finite values.

        x: float32, float16 or bfloat16, any shape and device, at least one value. Parts: "" uint8
        ((n+1)//2,), "absmax" uint8 (ceil(n/64),), "nested_absmax" float32 (ceil(ceil(n/64)/256),).
        The attribute relative_error is the receipt: |x - decoded| / |x| before rounding to x's type, within 0.001.
        Raises CodecError for another dtype, and where a value or a decoded scale is not finite.
        """
        del name, hints
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if spec.dtype not in LOSSY_ALLOWED or x.numel() == 0:
            raise CodecError(f"nf4 holds non-empty tensors of {sorted(LOSSY_ALLOWED)}, not {spec}")
        flat = x.detach().reshape(-1)
        kernel = cpu_kernel(flat)
        found = _measured_reference(flat) if kernel is None else _measured(kernel, flat)
        if found is None:
            raise CodecError("nf4 holds finite values only; keep these raw")
        codes, scales, squares = found
        _refuse_overflow(scales, x.dtype)
        error, energy = squares.clamp(min=0.0).tolist()
        attrs: dict[str, object] = {
            "blocksize": reference.BLOCK,
            "nested_blocksize": reference.NESTED_BLOCK,
            "nested_offset": scales.offset,
            "relative_error": sqrt(error / energy) if energy else 0.0,
        }
        parts = {"": codes, "absmax": scales.codes, "nested_absmax": scales.nested}
        return EncodedTensor(spec, self.name, parts, attrs)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out` (same dtype, shape and device, contiguous).

        Raises CodecError when parts, attributes and spec do not belong together.
        """
        scales = _checked(encoded)
        codes = encoded.parts[""]
        out = prepared_out(encoded.spec, codes.device, out)
        absmax = reference.dequantize_scales(scales.codes, scales.nested, scales.offset)
        kernel = cpu_kernel(codes)
        if kernel is None:
            reference.dequantize(codes, absmax, out.view(-1))
        else:
            kernel.nf4_decode(codes, absmax, out.view(-1))
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would, without decoding."""
        _checked(encoded)


def _measured(kernel: CpuKernel, flat: torch.Tensor) -> tuple[torch.Tensor, Scales, torch.Tensor] | None:
    """Codes, scales and (squared error, energy); None where a value is not finite."""
    found = kernel.nf4_encode(flat)
    if found is None:
        return None
    codes, absmax, sums = found
    scale_codes, nested, offset, squares = kernel.nf4_scales(absmax, sums)
    return codes, Scales(scale_codes, nested, offset), squares.sum(dim=0)


def _measured_reference(flat: torch.Tensor) -> tuple[torch.Tensor, Scales, torch.Tensor] | None:
    codes, absmax = reference.quantize(flat)
    if not bool(torch.isfinite(absmax).all()):
        return None
    scales = Scales(*reference.quantize_scales(absmax))
    decoded = reference.dequantize_scales(scales.codes, scales.nested, scales.offset)
    return codes, scales, reference.squares(absmax, reference.sums(flat, codes, absmax), decoded)


def _refuse_overflow(scales: Scales, dtype: torch.dtype) -> None:
    """Raise where the largest scale, once decoded, would turn finite values into infinities.

    NaN and Inf in the input reach a scale, so this is also the check that all values were finite. Asked again before
    decoding: no codec writes such scales.
    """
    # No level of the map is above 1, so this bound settles it without decoding the scales.
    if float(scales.nested.abs().max()) + abs(scales.offset) < torch.finfo(dtype).max / 2:
        return
    largest = reference.dequantize_scales(scales.codes, scales.nested, scales.offset).abs().max()
    if not bool(torch.isfinite(largest.to(dtype))):
        raise CodecError(f"nf4 cannot hold values whose scale is {float(largest)} in {dtype}; keep them raw")


def _checked(encoded: EncodedTensor) -> Scales:
    """The scales of an NF4 tensor after every length, type and attribute was checked against its spec."""
    spec, attrs = encoded.spec, encoded.attrs
    if spec.dtype not in LOSSY_ALLOWED:
        raise CodecError(f"nf4 decodes to {sorted(LOSSY_ALLOWED)}, not {spec.dtype}")
    if attrs.get("blocksize") != reference.BLOCK or attrs.get("nested_blocksize") != reference.NESTED_BLOCK:
        raise CodecError(f"nf4 has blocks of {reference.BLOCK} and {reference.NESTED_BLOCK}, not {dict(attrs)}")
    offset = attrs.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < _OFFSET_LIMIT:
        raise CodecError(f"nf4 needs a number nested_offset, not {offset!r}")
    require_names(encoded, _PARTS)
    n = prod(spec.shape)
    b = (n + reference.BLOCK - 1) // reference.BLOCK
    require_part(encoded, "", torch.uint8, (n + 1) // 2)
    codes = require_part(encoded, "absmax", torch.uint8, b)
    nested = require_part(
        encoded, "nested_absmax", torch.float32, (b + reference.NESTED_BLOCK - 1) // reference.NESTED_BLOCK
    )
    scales = Scales(codes, nested, float(offset))
    if n:
        _refuse_overflow(scales, getattr(torch, spec.dtype))
    return scales


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


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    """|x - decoded| / |x|, Euclidean, in float32; 0 where both are zero."""
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float32))
    error = float(torch.linalg.vector_norm(x.to(torch.float32) - decoded.to(torch.float32)))
    return error / norm if norm else (0.0 if error == 0.0 else float("inf"))


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


def bitsandbytes_tensors(name: str, encoded: EncodedTensor) -> dict[str, torch.Tensor]:
    """The tensors of an NF4 tensor under the safetensors keys of bitsandbytes and transformers.

    name: the tensor's name in the file. Returns `name`, `name.absmax`, `name.quant_map`,
    `name.nested_absmax`, `name.nested_quant_map` and `name.quant_state.bitsandbytes__nf4` (UTF-8 JSON
    in uint8), which `bitsandbytes.functional.QuantState.from_dict` reads. Source: bitsandbytes 0.50.
    """
    scales = _checked(encoded)
    cpu = torch.device("cpu")
    state = {
        "quant_type": "nf4",
        "blocksize": reference.BLOCK,
        "dtype": encoded.spec.dtype,
        "shape": list(encoded.spec.shape),
        "nested_blocksize": reference.NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": scales.offset,
    }
    return {
        name: encoded.parts[""].view(-1, 1),
        f"{name}.absmax": scales.codes,
        f"{name}.quant_map": table("code", cpu).clone(),
        f"{name}.nested_absmax": scales.nested,
        f"{name}.nested_quant_map": table("scale_map", cpu).clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"
        ),
    }
