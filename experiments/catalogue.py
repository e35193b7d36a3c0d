"""All strategies, in the order of the report: the two controls, the 25 rows, and what came after them."""

import difflib
from collections.abc import Mapping, Sequence

from experiments import (
    ExperimentFailed,
    Strategy,
    attention,
    depth,
    engines,
    eviction,
    order,
    prompt,
    rank,
    recurrent,
    smooth,
    sparse,
    training,
)

ENGINES: Mapping[str, Sequence[str]] = {"": (), "kvpress": ("kvpress", "shared")}
"""For each engine the folders of wheels that its workers have on the path."""

STRATEGIES: tuple[Strategy, ...] = (
    attention.Baseline(),
    attention.NoContext(),
    eviction.AttentionSink(),
    depth.MiniCache(),
    engines.VLLM(),
    attention.Transformers(),
    eviction.H2O(),
    eviction.PyramidKV(),
    attention.EightBit(),
    attention.EightBitByError(),
    attention.FourBit(),
    eviction.SlidingWindow(),
    attention.GroupedQuery(),
    rank.LoRCEightBit(),
    rank.LoRCEightBitUniform(),
    rank.LoRC(),
    order.FirstCome(),
    order.PrefixAware(),
    smooth.SmoothQuant(),
    smooth.SmoothQuantTensor(),
    smooth.SmoothQuant8(),
    recurrent.RWKV(),
    recurrent.Mamba(),
    prompt.Selective2x(),
    prompt.Selective10x(),
    prompt.Selective20x(),
    attention.PlainNF4(),
    eviction.H2OFourBit(),
    eviction.ExpectedAttention10x(),
    eviction.ExpectedAttention20x(),
    attention.MultiHead(),
    attention.OneHead(),
    depth.MiniCacheFourBit(),
    smooth.SmoothKeys(),
    attention.AdaptiveBits(),
    sparse.SparseBits(),
    sparse.SparseDrop(),
    training.Cartridge10x(),
    training.Cartridge20x(),
    attention.TwoModels(),
    training.TrainedForNF4(),
)

_BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
CATEGORIES = tuple(dict.fromkeys(strategy.category for strategy in STRATEGIES))
CONTROLS = STRATEGIES[:2]


def named(name: str) -> Strategy:
    """The strategy of this name. Raises KeyError."""
    return _BY_NAME[name]


def chosen(words: Sequence[str]) -> tuple[Strategy, ...]:
    """What names and categories mean, "all" for everything; the two controls always first.

    Raises ExperimentFailed for a word that is neither, naming the nearest.
    """
    wanted: set[str] = set()
    for word in words or ("all",):
        found = {s.name for s in STRATEGIES if word in ("all", s.name, s.category)}
        if not found:
            known = [*_BY_NAME, *CATEGORIES]
            close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
            raise ExperimentFailed(f"no strategy or category {word!r}; the nearest is {close[0]!r}")
        wanted |= found
    return tuple(s for s in STRATEGIES if s in CONTROLS or s.name in wanted)
