"""Adaptive fidelity: the cheapest encoding whose receipt keeps a given bound, layer by layer.

It is a policy of a namespace, not an encoding: its output has the name of the codec that it chose. Each tensor is tried
alone; if only some layers of it are over the bound, only those are encoded better (`layers`). Pure, any thread.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from kvstore.codecs import Codec, codec_named, encode_measured
from kvstore.codecs.by_role import ByRole
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.layers import encode_runs
from kvstore.codecs.raw import Raw
from kvstore.codecs.receipt import by_layer, errors_by_head, role_in
from kvstore.config import LAYER_RUNS_MAX
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import ConfigError

_RANK = 4
"""Axes of (layers, tokens, heads, dim): with fewer, layers cannot be told from tokens."""
_TRIED: tuple[Codec, ...] = (ByRole(), Int8())


class Adaptive:
    """The choice of `ByRole` if its receipt keeps the bound, else int8, else the raw tensor.

    tried: codecs to try instead, the cheapest first. split: whether layers of one tensor may be encoded differently.
    """

    name = "adaptive"
    lossy = True

    def __init__(self, max_relative_error: float, tried: Sequence[Codec] = _TRIED, *, split: bool = True) -> None:
        if not 0.0 <= max_relative_error < 1.0:
            raise ConfigError(f"max_relative_error is {max_relative_error}; it lies in [0, 1)")
        self._bound, self._tried, self._split = max_relative_error, tuple(tried), split

    @property
    def whole(self) -> "Adaptive":
        """The same bound for tensors that need one encoding."""
        return Adaptive(self._bound, self._tried, split=False)

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """The first encoding whose receipt keeps the bound: for the whole tensor, or for each of its layers."""
        split = self._split and x.dim() >= _RANK and x.shape[0] > 1 and role_in(name, x, hints) != "plain"
        ranks = torch.full((x.shape[0] if x.dim() else 1,), len(self._tried))
        for rank, codec in enumerate(self._tried):
            encoded = encode_measured(codec, name, x, hints)
            if encoded is None:
                continue
            if encoded.relative_error <= self._bound and (rank == 0 or not split):
                return encoded
            if split:
                errors = by_layer(errors_by_head(codec, name, x, encoded, hints), x.shape[0])
                ranks[(errors.cpu() <= self._bound) & (ranks > rank)] = rank
        return self._by_layer(name, x, hints, ranks.tolist()) if split else Raw().encode(name, x)

    def _by_layer(self, name: str, x: torch.Tensor, hints: Hints, ranks: list[int]) -> EncodedTensor:
        """Each layer by the codec of its rank or a better one: each run is encoded again, and checked again."""
        codecs = [Adaptive(self._bound, self._tried[rank:], split=False) for rank in range(len(self._tried) + 1)]
        runs = [(start, stop, codecs[rank]) for start, stop, rank in runs_of(ranks)]
        return encode_runs(name, x, hints, runs) if len(runs) > 1 else runs[0][2].encode(name, x, hints)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Never used for a stored tensor, which names the codec that wrote it; decodes by that name."""
        return codec_named(encoded.encoding).decode(encoded, out)


def runs_of(ranks: Sequence[int], most: int = LAYER_RUNS_MAX) -> list[tuple[int, int, int]]:
    """Runs (start, stop, rank) of equal ranks, at most `most`: the shortest take the rank of a better neighbour."""
    ranks = list(ranks)
    while True:
        runs, start = [], 0
        for rank, group in groupby(ranks):
            stop = start + len(list(group))
            runs.append((start, stop, rank))
            start = stop
        if len(runs) <= most:
            return runs
        # A run takes the better codec of a neighbour: no layer gets a worse one than it needs.
        around = [
            (stop - start, start, stop, min(r for _, _, r in runs[max(0, at - 1) : at + 2] if r > rank))
            for at, (start, stop, rank) in enumerate(runs)
            if any(r > rank for _, _, r in runs[max(0, at - 1) : at + 2])
        ]
        _, start, stop, rank = min(around)
        ranks[start:stop] = [rank] * (stop - start)
