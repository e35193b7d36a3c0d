"""LoRC: the projections of K and V as products of lower rank; the cache holds what lies between the two factors."""

from functools import lru_cache
from typing import Any, ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab
from kvstore.config import CodecPolicy

_RAMP = 0.9
"""How far ranks of the first and the last layer lie from the mean, of the room there is up to the full rank."""


class LoRC(Baseline):
    """float16 latents, before RoPE; ranks fall from layer to layer.

    The SVD of W_k and W_v is of the weights alone, as published: it knows nothing of the data. `k.0`, `v.0` ... are
    latents (tokens, rank of the layer).
    """

    row = 15
    name = "lorc-fp16"
    category = "rank"
    source = "arXiv 2410.03111"
    kept = "faithful in the decomposition; ranks fall in a straight line where the paper follows condition numbers"
    share: ClassVar[float] = 0.75
    """The mean rank over the full one."""
    progressive: ClassVar[bool] = True

    def state(self, lab: Lab) -> Tensors:
        """The latents."""
        k, v = lab.prefix
        bases = self._bases(lab)
        found = {}
        for name, x in (("k", lab.rotated(k, back=True)), ("v", v)):
            for layer, basis in enumerate(bases[name]):
                found[f"{name}.{layer}"] = (x[layer].flatten(1) @ basis).half()
        return found

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """K and V out of the latents, K rotated again."""
        heads = int(lab.model.config.num_key_value_heads)
        k, v = (
            torch.stack([tensors[f"{name}.{i}"].float() @ basis.T for i, basis in enumerate(bases)])
            for name, bases in self._bases(lab).items()
        )
        return lab.step(lab.rotated(k.view(*k.shape[:2], heads, -1)), v.view(*v.shape[:2], heads, -1))

    def _bases(self, lab: Lab) -> dict[str, list[torch.Tensor]]:
        whole = _decomposed(lab.model)
        layers = len(whole["k"])
        return {
            name: [basis[:, : self._rank(i, layers, basis.shape[1])] for i, basis in enumerate(bases)]
            for name, bases in whole.items()
        }

    def _rank(self, layer: int, layers: int, full: int) -> int:
        tilt = (1 - self.share) * (1 - 2 * layer / max(1, layers - 1)) * _RAMP if self.progressive else 0.0
        return max(1, min(full, round(full * (self.share + tilt))))


class LoRCEightBit(LoRC):
    """The same latents in int8."""

    row = 13
    name = "lorc-8-bit"
    policy = CodecPolicy("int8")


class LoRCEightBitUniform(LoRCEightBit):
    """One rank for all layers."""

    row = 14
    name = "lorc-8-bit-uniform"
    kept = "one rank for all layers: what the paper compares its progressive ranks with"
    progressive = False


@lru_cache(maxsize=1)
def _decomposed(model: Any) -> dict[str, list[torch.Tensor]]:
    """Left singular vectors of W_k and W_v of each layer, (heads * dim, full rank)."""
    found: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
    with torch.inference_mode():
        for layer in model.model.layers:
            for name, projection in (("k", layer.self_attn.k_proj), ("v", layer.self_attn.v_proj)):
                found[name].append(torch.linalg.svd(projection.weight.float(), full_matrices=False)[0])
    return found
