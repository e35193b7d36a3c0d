"""An agent's workflow: 10 rounds of 5 calls, 5 prompts, all layers; without and with a cache.

Run: .venv/bin/python -m examples.agent [--tokens 512] [--rounds 10] [--cache simple|quantized|hybrid]
"""

import argparse
from dataclasses import dataclass

from examples.model import Model
from examples.reuse import KVCache, KVWorker, layers_of, load_model, prompts
from kvstored_client.integrations.simple import HybridKVCache, QuantizedKVCache, SimpleKVCache

CALLS = 5
KINDS: dict[str, type[KVCache]] = {"simple": SimpleKVCache, "quantized": QuantizedKVCache, "hybrid": HybridKVCache}


@dataclass(frozen=True)
class Outcome:
    """Seconds of all calls' prefills, without and with the cache, and the cache's own figures."""

    calls: int
    without_s: float
    with_s: float
    stats: dict[str, float]

    @property
    def speedup(self) -> float:
        """How many times less time."""
        return self.without_s / self.with_s


def workflow(model: Model, cache: KVCache, *, tokens: int, rounds: int) -> Outcome:
    """Run every call twice, in turn: computed, and through the cache."""
    asked = prompts(model, CALLS, tokens)
    plain, cached = KVWorker(model, None, layers_of(model)), KVWorker(model, cache, layers_of(model))
    for _ in range(rounds):
        for ids in asked:
            plain.prefix(ids)
            cached.prefix(ids)
    return Outcome(rounds * CALLS, sum(plain.seconds), sum(cached.seconds), cache.get_stats())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cache", choices=sorted(KINDS), default="simple")
    options = parser.parse_args()
    model = load_model()
    with KINDS[options.cache](max_cache_size_mb=1024) as cache:
        found = workflow(model, cache, tokens=options.tokens, rounds=options.rounds)
    print(f"{found.calls} calls: {found.without_s:.1f} s without a cache, {found.with_s:.1f} s with {options.cache}")
    print(f"{found.speedup:.1f} times less; the bound is {options.rounds}, each prompt being computed once")
    for name, value in found.stats.items():
        print(f"  {name:26} {value:.1f}")


if __name__ == "__main__":
    main()
