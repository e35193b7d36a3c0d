"""What the examples of the drop-in API share: a model whose K and V are asked for layer by layer.

`KVWorker.prefix` is the loop that a program would write: ask for every layer, prefill at the first miss, keep all
layers. `plain` does the same work without a cache.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from examples.model import Model
from experiments.smollm import convert, gguf_file
from kvstored_client.integrations.simple import HybridKVCache, QuantizedKVCache, SimpleKVCache

KVCache = SimpleKVCache | QuantizedKVCache | HybridKVCache
DOCUMENT = Path(__file__).parent.parent / "LICENSE"


def load_model() -> Model:
    """The demo's model. Exits where it is not installed."""
    gguf = gguf_file()
    if gguf is None:
        raise SystemExit("the model is not installed; run: make demo")
    torch.set_num_threads(1)
    return Model(*convert(gguf))


def prompts(model: Model, count: int, tokens: int) -> list[list[int]]:
    """So many different prompts of so many tokens, from one document."""
    text = DOCUMENT.read_text()
    ids = model.prompt(text, 10_000, "")
    step = max(1, (len(ids) - tokens) // max(1, count))
    return [ids[i * step : i * step + tokens] for i in range(count)]


@dataclass
class KVWorker:
    """A model and a cache in front of its prefill. seconds: what getting K and V took, call by call."""

    model: Model
    cache: KVCache | None
    layers: int
    seconds: list[float] = field(default_factory=list)

    def prefix(self, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K and V of a prompt, layer by layer."""
        start = time.perf_counter()
        found = self._cached(ids) if self.cache is not None else self._computed(ids)
        self.seconds.append(time.perf_counter() - start)
        return found

    def _computed(self, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        k, v = self.model.prefill(ids)
        return list(k), list(v)

    def _cached(self, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        cache = self.cache
        assert cache is not None
        ks: list[torch.Tensor] = []
        vs: list[torch.Tensor] = []
        for layer in range(self.layers):
            pair = cache.get_cached_kv(ids, layer)
            if pair is None:
                k, v = self._computed(ids)
                for i in range(self.layers):
                    cache.cache_kv(ids, i, k[i], v[i])
                pair = (k[layer], v[layer])
            ks.append(pair[0])
            vs.append(pair[1])
        return ks, vs


def layers_of(model: Model) -> int:
    """How many layers the model has."""
    return int(model.identity("exact")["layers"])


def answer(model: Model, ids: list[int], kv: tuple[list[torch.Tensor], list[torch.Tensor]], new: int) -> list[int]:
    """Tokens after a prompt whose K and V are given: all but its last token's are used."""
    k, v = (torch.stack(each)[:, : len(ids) - 1] for each in kv)
    return model.answer(ids, new, model.restored(k, v))


def rows(lines: list[tuple[Any, ...]]) -> str:
    """Lines of columns, aligned."""
    text = [[str(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in text)
