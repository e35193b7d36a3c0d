"""Presses of NVIDIA's kvpress: rows of K and V that are dropped after the prefill.

kvpress 0.5.5 is for transformers below 5.3, so its rows run in a process of their own with its wheels on the path
(`tools/engines/side.sh` fetches them). The state is what the integration `PressedCache` keeps: K and V of each layer as
pressed, and the position of the next token.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock

from experiments import Step, Tensors
from experiments.attention import FAITHFUL, Baseline
from experiments.carried import PATIENCE_S, Carried
from experiments.lab import Lab, stepper
from kvstore.config import CodecPolicy

_NEVER_CALLED = ("datasets", "fire")
"""What kvpress imports for presses that are not used here; a stand-in where it is not installed."""


def kvpress() -> Any:
    """The library. Raises ModuleNotFoundError where it is not on the path."""
    for name in _NEVER_CALLED:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            module.__getattr__ = lambda _attribute: MagicMock()  # type: ignore[method-assign]
            sys.modules[name] = module
    return importlib.import_module("kvpress")


class Pressed(Baseline):
    """A press and its parameters. attention: the implementation it needs while it prefills."""

    category = "eviction"
    engine = "kvpress"
    source = "kvpress 0.5.5"
    press: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    attention: ClassVar[str] = "sdpa"

    def state(self, lab: Lab) -> Tensors:
        """What is left after the press."""
        from kvstored_client.integrations.kvpress import PressedCache

        carried = Carried()
        usual = lab.model.config._attn_implementation  # noqa: SLF001 - there is a setter and no getter
        lab.model.set_attn_implementation(self.attention)
        try:
            pressed = PressedCache(lab.model, self._press(), carried.guard, revision="experiments")
            pressed.prefill(lab.ids)
        finally:
            lab.model.set_attn_implementation(usual)
        if not pressed.flush(PATIENCE_S):
            raise RuntimeError(f"the integration did not put its entry within {PATIENCE_S:.0f} s")
        return carried.tensors()

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model after it, by the integration's own restore."""
        from kvstored_client.integrations.kvpress import PressedCache

        usual = lab.model.config._attn_implementation  # noqa: SLF001
        lab.model.set_attn_implementation(self.attention)  # part of the configuration, so of the key
        try:
            cache = PressedCache(lab.model, self._press(), Carried(tensors).guard, revision="experiments")
            past = cache.restore(lab.ids)
        finally:
            lab.model.set_attn_implementation(usual)
        if past is None:
            raise RuntimeError("the integration did not find its own entry")
        # Layers of different lengths share one mask in transformers: only single tokens go through.
        return stepper(lab.model, past.cache, past.position, at_once=len(set(past.rows)) == 1)

    def _press(self) -> Any:
        return getattr(kvpress(), self.press)(**self.settings)


class AttentionSink(Pressed):
    """StreamingLLM: the first 4 tokens and a window of the last ones, half of all."""

    row = 2
    name = "attention-sink"
    category = "attention"
    source = "arXiv 2309.17453, kvpress StreamingLLMPress"
    kept = "at prefill: the paper goes on dropping while decoding"
    press = "StreamingLLMPress"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.5, "n_sink": 4}


class H2O(Pressed):
    """Heavy hitters: the half of all tokens that got the most attention."""

    row = 6
    name = "h2o"
    source = "arXiv 2306.14048, kvpress ObservedAttentionPress"
    kept = "at prefill: the paper goes on dropping while decoding"
    press = "ObservedAttentionPress"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.5}
    attention = "eager"


class PyramidKV(Pressed):
    """More rows in early layers, fewer in late ones, half in all."""

    row = 7
    name = "pyramidkv"
    source = "arXiv 2406.02069, kvpress PyramidKVPress"
    kept = FAITHFUL
    press = "PyramidKVPress"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.5, "window_size": 16}


class SlidingWindow(Pressed):
    """The last half of all tokens, without sinks: the collapse that attention sinks mend."""

    row = 11
    name = "sliding-window"
    category = "attention"
    source = "arXiv 2004.05150, kvpress StreamingLLMPress(n_sink=0)"
    kept = "on a model that was not trained with a window"
    press = "StreamingLLMPress"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.5, "n_sink": 0}


class H2OFourBit(H2O):
    """H2O's half, and what is left in nf4-kv."""

    row = 27
    name = "h2o-4-bit"
    source = "arXiv 2306.14048, kvpress ObservedAttentionPress, kvstored codec nf4-kv"
    policy = CodecPolicy("nf4-kv")


class ExpectedAttention10x(Pressed):
    """A tenth of the rows: those that future queries, estimated from past ones, will look at."""

    row = 28
    name = "expected-attention-10x"
    source = "arXiv 2510.00636, kvpress ExpectedAttentionPress"
    kept = FAITHFUL
    press = "ExpectedAttentionPress"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.9}


class ExpectedAttention20x(ExpectedAttention10x):
    """A twentieth of the rows."""

    row = 29
    name = "expected-attention-20x"
    settings: ClassVar[dict[str, Any]] = {"compression_ratio": 0.95}
