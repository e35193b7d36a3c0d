"""A model that is none: keys and values of four layers with a bias, few degrees of freedom and RoPE, and its basis."""

from functools import cache

import torch

from kvstore.codecs.basis import Basis
from kvstore.codecs.learning import Learning, Piece, Statistics
from kvstore.codecs.rotation import Rotation

LAYERS, HEADS, DIM, GROUP = 4, 2, 8, 3


def rotation(*, layers: int = LAYERS, dim: int = DIM, interleaved: bool = False) -> Rotation:
    """RoPE of base 10,000."""
    angles = 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return Rotation(angles.repeat(layers, 1), interleaved)


def content(tokens: int, seed: int, *, which: int = 0, layers: int = LAYERS) -> torch.Tensor:
    """(layers, tokens, heads, dim): what layers share, a little of their own, and what all tokens share."""
    drawn = torch.Generator().manual_seed(77 + which)
    mixing = torch.randn(layers, 5, HEADS * DIM, generator=drawn)
    bias = 3 * torch.randn(layers, 1, HEADS, DIM, generator=drawn)
    g = torch.Generator().manual_seed(seed)
    said = torch.randn(tokens, 5, generator=g) @ mixing
    own = 0.2 * torch.randn(layers, tokens, HEADS * DIM, generator=g)
    return (said + own).view(layers, tokens, HEADS, DIM) + bias


def keys(tokens: int, first: int = 0, seed: int = 0, *, layers: int = LAYERS) -> torch.Tensor:
    """As a cache holds them: turned by their positions."""
    return rotation(layers=layers).turned(content(tokens, 1000 + seed, layers=layers), first, back=False)


def values(tokens: int, seed: int = 0) -> torch.Tensor:
    """As a cache holds them."""
    return content(tokens, 2000 + seed, which=1)


def learning(*, layers: int = LAYERS, group: int = GROUP, pieces: int = 4) -> Learning:
    """What eight hundred tokens teach."""
    statistics = Statistics((layers, HEADS, DIM), group, rotation(layers=layers))
    for at in range(pieces):
        k, v = keys(200, seed=at, layers=layers), content(200, 2000 + at, which=1, layers=layers)
        g = torch.Generator().manual_seed(at)
        weight = torch.linspace(1, 0.2, layers)[:, None, None, None]
        statistics.add(Piece(k, v, weight * torch.randn(k.shape, generator=g), torch.randn(v.shape, generator=g), 64))
    return Learning(statistics, "tiny", 200)


@cache
def basis(bits: float = 2.5, *, layers: int = LAYERS) -> Basis:
    """A basis of it."""
    taught = learning(layers=layers)
    return taught.basis(taught.for_bits(bits), 0.001)
