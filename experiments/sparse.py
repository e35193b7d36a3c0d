"""Sparse quantization: tokens get bits by how much attention they received; some get none.

The importance of a token in a layer is the mean attention that it got from the tokens after it, as H2O counts it.
"""

from typing import Any, ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.depth import as_floats, as_integers
from experiments.lab import Lab
from kvstore.config import CodecPolicy


def importance(lab: Lab) -> torch.Tensor:
    """Attention received by each token of the prefix, over those that could give it: (layers, tokens)."""
    seen: list[torch.Tensor] = []

    def received(_module: Any, _args: Any, out: Any) -> None:
        seen.append(out[1][0].mean(0).sum(0))

    hooks = [layer.self_attn.register_forward_hook(received) for layer in lab.model.model.layers]
    usual = lab.model.config._attn_implementation  # noqa: SLF001 - there is a setter and no getter
    lab.model.set_attn_implementation("eager")  # the only one that gives its weights
    try:
        lab.prefill(lab.ids)
    finally:
        lab.model.set_attn_implementation(usual)
        for hook in hooks:
            hook.remove()
    tokens = lab.ids.shape[1]
    return torch.stack(seen) / torch.arange(tokens, 0, -1)


def rows_of(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Of (layers, tokens, heads, dim) the tokens `at` (layers, n), in that order."""
    return x.gather(1, at[:, :, None, None].expand(-1, -1, *x.shape[2:]))


class SparseBits(Baseline):
    """The twentieth of the tokens with the most attention in float16, the others in nf4-kv."""

    row = 35
    name = "sparse-16-bit"
    category = "roadmap"
    source = "ours"
    kept = "ours: 5% of the tokens at 16 bits, by attention received; the others at 4"
    policy = CodecPolicy("nf4-kv")
    whole: ClassVar[float] = 0.05
    dropped: ClassVar[float] = 0.0

    def state(self, lab: Lab) -> Tensors:
        """What is kept of K and V; the most important rows once more, exact, and where they are."""
        score = importance(lab)
        tokens = score.shape[1]
        left = score.topk(tokens - int(self.dropped * tokens), dim=1).indices.sort(dim=1).values
        best = score.gather(1, left).topk(max(1, int(self.whole * tokens)), dim=1).indices
        k, v = (rows_of(x, left).contiguous() for x in lab.prefix)
        return {
            "k": k, "v": v, "at": best.to(torch.int32), "position": torch.tensor([tokens]),
            "kept.a": as_integers(rows_of(k, best)), "kept.b": as_integers(rows_of(v, best)),
        }  # fmt: skip

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The rows at 16 bits over those at 4."""
        found = []
        for name, kept in (("k", "kept.a"), ("v", "kept.b")):
            x, rows = tensors[name], as_floats(tensors[kept])
            at = tensors["at"].long()[:, :, None, None].expand_as(rows)
            found.append(x.scatter(1, at, rows))
        return lab.step(*found, position=int(tensors["position"][0]))


class SparseDrop(SparseBits):
    """The same, and the half with the least attention dropped."""

    row = 36
    name = "sparse-drop"
    kept = "ours: half of the tokens dropped, 5% at 16 bits, by attention received; the others at 4"
    dropped = 0.5
