"""MiniCache: pairs of neighbouring layers share one direction for each token, each with a magnitude of its own."""

from typing import ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab
from kvstore.config import CodecPolicy


class MiniCache(Baseline):
    """Layers from the middle on, two by two: SLERP between their directions, magnitudes and odd tokens kept.

    `k` and `v` hold the early layers, then one merged layer a pair, (layers + pairs, tokens, heads, dim). Side data is
    float16 as int16, so that no codec takes it: `knorm` (pairs, 2, tokens), `kkept` (pairs, 2, r, heads * dim), and
    `kat` (pairs, r), the tokens whose directions differ most; the same for v.
    """

    row = 3
    name = "minicache"
    category = "depth"
    source = "arXiv 2405.14366"
    kept = "faithful; its premise is not: neighbouring layers of this model have a cosine of about 0, not 0.8"
    towards: ClassVar[float] = 0.6
    """The paper's t: how far the shared direction lies towards the earlier layer."""
    retained: ClassVar[float] = 0.05
    """The share of tokens kept whole."""

    def state(self, lab: Lab) -> Tensors:
        """K and V merged."""
        found: dict[str, torch.Tensor] = {}
        for name, x in zip("kv", lab.prefix, strict=True):
            found |= self._merged(name, x)
        return found

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """Both layers of each pair from their direction, their magnitudes and the tokens kept whole."""
        k, v = (self._parted(name, tensors) for name in "kv")
        return lab.step(k, v)

    def _merged(self, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        layers, tokens, heads, dim = x.shape
        first = _first(layers)
        pairs = x[first:].reshape((layers - first) // 2, 2, tokens, heads * dim)
        norms = pairs.norm(dim=-1).clamp(min=1e-12)
        early, late = (pairs / norms[..., None]).unbind(1)
        angle = (early * late).sum(-1).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        share = [torch.sin(t * angle) / torch.sin(angle) for t in (self.towards, 1 - self.towards)]
        shared = share[0][..., None] * early + share[1][..., None] * late
        odd = angle.topk(max(1, int(self.retained * tokens)), dim=1).indices
        rows = odd[:, None, :, None].expand(-1, 2, -1, heads * dim)
        # Scaled to the pair's mean magnitude, so that a codec sees ordinary keys and values.
        scaled = (shared * norms.mean(1)[..., None]).view(-1, tokens, heads, dim)
        return {
            name: torch.cat((x[:first], scaled)),
            f"{name}norm": as_integers(norms),
            f"{name}kept": as_integers(pairs.gather(2, rows)),
            f"{name}at": odd.to(torch.int32),
        }

    def _parted(self, name: str, tensors: Tensors) -> torch.Tensor:
        x, norms = tensors[name], as_floats(tensors[f"{name}norm"])
        kept, odd = as_floats(tensors[f"{name}kept"]), tensors[f"{name}at"].long()
        pairs, _, tokens = norms.shape
        _, _, heads, dim = x.shape
        first = x.shape[0] - pairs
        shared = x[first:].reshape(pairs, 1, tokens, heads * dim)
        whole = shared / shared.norm(dim=-1, keepdim=True).clamp(min=1e-12) * norms[..., None]
        rows = odd[:, None, :, None].expand(-1, 2, -1, heads * dim)
        whole = whole.scatter(2, rows, kept)
        return torch.cat((x[:first], whole.view(2 * pairs, tokens, heads, dim)))


class MiniCacheFourBit(MiniCache):
    """What is left of it in nf4-kv."""

    row = 32
    name = "minicache-4-bit"
    policy = CodecPolicy("nf4-kv")


def _first(layers: int) -> int:
    """The first layer that is merged: the middle one, or the one before it where the rest would be odd."""
    middle = layers // 2
    return middle - (layers - middle) % 2


def as_integers(x: torch.Tensor) -> torch.Tensor:
    """float16's bits as int16: side data that stays exact under any codec."""
    return x.half().contiguous().view(torch.int16)


def as_floats(x: torch.Tensor) -> torch.Tensor:
    """Back to float32."""
    return x.contiguous().view(torch.float16).float()
