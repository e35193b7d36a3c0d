"""SmoothQuant: the scale of activations moves into weights. As published, a W8A8 model; and its idea applied to K."""

import copy
import pydoc_data.topics
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.depth import as_floats, as_integers
from experiments.lab import Lab, keys_and_values
from kvstore.config import CodecPolicy

CALIBRATION = Path(str(pydoc_data.topics.__file__))
"""Python's manual: on every machine, and none of the texts that are judged."""
CALIBRATION_TOKENS = 256


class SmoothQuant(Baseline):
    """W8A8, simulated: activations over s, weights times s, both rounded to 8 bits; the cache is that model's, in int8.

    s = max|x|^alpha / max|w|^(1 - alpha), from a calibration text. per_token: activations have a scale a token; else a
    scale a tensor.
    """

    row = 18
    name = "smoothquant"
    category = "smoothing"
    source = "arXiv 2211.10438"
    kept = "W8A8 in float32 arithmetic: the harm of 8 bits, without the speed of int8 kernels; a scale a token"
    policy = CodecPolicy("int8")
    alpha: ClassVar[float] = 0.5
    per_token: ClassVar[bool] = True

    def state(self, lab: Lab) -> Tensors:
        """K and V of the quantized model."""
        return keys_and_values(*lab.prefill(lab.ids, self._model(lab)))

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The quantized model after them."""
        return lab.step(tensors["k"], tensors["v"], model=self._model(lab))

    def _model(self, lab: Lab) -> Any:
        return _quantized(lab.model, lab.tokenizer, self.alpha, per_token=self.per_token)


class SmoothQuantTensor(SmoothQuant):
    """A scale a tensor for activations: what the fastest int8 kernels take."""

    row = 19
    name = "smoothquant-0.5"
    kept = "as smoothquant, with one scale a tensor of activations"
    per_token = False


class SmoothQuant8(SmoothQuant):
    """More of the difficulty moved into the weights."""

    row = 20
    name = "smoothquant-0.8"
    alpha = 0.8


class SmoothKeys(Baseline):
    """K over s before nf4-kv, times s after it: a scale a channel, from the keys themselves and the queries' size.

    s = max|k|^alpha / rms(q)^(1 - alpha) over tokens, a layer, head and channel, mean 1; float16, kept exact.
    """

    row = 33
    name = "smooth-keys-4-bit"
    category = "smoothing"
    source = "ours, after arXiv 2211.10438"
    kept = "ours: the migration applied to keys and queries, where the cache is; no weights change"
    policy = CodecPolicy("nf4-kv")
    alpha: ClassVar[float] = 0.5

    def state(self, lab: Lab) -> Tensors:
        """Smoothed keys, values, and the scale."""
        k, v = lab.prefix
        first = min(4, k.shape[1] - 1)  # the sinks' keys are unlike all others, and nf4-kv keeps them apart
        scale = k[:, first:].abs().amax(1) ** self.alpha / self._queries(lab).clamp(min=1e-3) ** (1 - self.alpha)
        scale = (scale / scale.mean(-1, keepdim=True)).clamp(min=1e-2).half().float()
        return {"k": (k / scale[:, None]).contiguous(), "v": v, "scale": as_integers(scale)}

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The keys as they were."""
        return lab.step(tensors["k"] * as_floats(tensors["scale"])[:, None], tensors["v"])

    def _queries(self, lab: Lab) -> torch.Tensor:
        """Root mean square of the queries, with RoPE, over those that read one key: (layers, kv_heads, dim)."""
        seen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
            for layer in lab.model.model.layers
        ]
        try:
            lab.prefill(lab.ids)
        finally:
            for hook in hooks:
                hook.remove()
        config = lab.model.config
        queries = torch.stack(seen)
        q = lab.rotated(queries.view(*queries.shape[:2], config.num_attention_heads, -1))
        layers, heads, dim = q.shape[0], int(config.num_key_value_heads), q.shape[-1]
        return q.square().mean(1).view(layers, heads, -1, dim).mean(2).sqrt()


@lru_cache(maxsize=1)
def _quantized(model: Any, tokenizer: Any, alpha: float, *, per_token: bool) -> Any:
    """A copy of the model with smoothed and rounded weights, and inputs of its linear layers rounded as they come."""
    found = copy.deepcopy(model)
    groups = [group for layer in found.model.layers for group in _groups(layer)]
    largest = _calibrated(found, tokenizer, [norm for norm, _ in groups])
    with torch.inference_mode():
        for (norm, linears), seen in zip(groups, largest, strict=True):
            weight = torch.stack([x.weight.abs().amax(0) for x in linears]).amax(0)
            s = (seen.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
            norm.weight.data /= s
            for x in linears:
                x.weight.data *= s
        for layer in found.model.layers:
            for x in layer.modules():
                if isinstance(x, torch.nn.Linear):
                    x.weight.data = rounded(x.weight.data, 1)
                    x.register_forward_pre_hook(lambda _m, a: (rounded(a[0], -1 if per_token else None),))
    return found


def _groups(layer: Any) -> list[tuple[Any, list[Any]]]:
    """Each norm, and the linear layers that read it."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def _calibrated(model: Any, tokenizer: Any, norms: list[Any]) -> list[torch.Tensor]:
    """The largest magnitude of each channel of each norm's output, over the calibration text."""
    seen: list[torch.Tensor] = []
    hooks = [
        norm.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().abs().amax((0, 1)))) for norm in norms
    ]
    # Characters first: tokenizing all of the manual would take a second.
    text = CALIBRATION.read_text()[: CALIBRATION_TOKENS * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :CALIBRATION_TOKENS]
    try:
        with torch.inference_mode():
            model(ids, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def rounded(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    """X on a grid of 255 steps, symmetric, with one scale along `dim`, or for all of it."""
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest.clamp(min=1e-8) / 127
    return (x / scale).round() * scale
