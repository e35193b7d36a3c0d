"""From SimpleKVCache to QuantizedKVCache: the same calls, one name changed; what it costs and what it saves.

Run: .venv/bin/python -m examples.migration [--tokens 256]
"""

import argparse

import torch

from examples.reuse import KVCache, KVWorker, answer, layers_of, load_model, prompts
from kvstored_client.integrations.simple import QuantizedKVCache, SimpleKVCache


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    model = load_model()
    ids = prompts(model, 1, options.tokens)[0]
    layers = layers_of(model)
    held: dict[str, float] = {}
    answers: dict[str, list[int]] = {}
    kept: dict[str, torch.Tensor] = {}
    kinds: list[type[KVCache]] = [SimpleKVCache, QuantizedKVCache]
    for kind in kinds:
        with kind(max_cache_size_mb=256) as cache:
            worker = KVWorker(model, cache, layers)
            worker.prefix(ids)
            kv = worker.prefix(ids)
            name = kind.__name__
            kept[name] = torch.stack([*kv[0], *kv[1]]).flatten()
            held[name] = cache.get_stats()["memory_used_mb"]
            answers[name] = answer(model, ids, kv, 16)
            print(
                f"{name}: {held[name]:.1f} MB, first {worker.seconds[0]:.2f} s, again {worker.seconds[1] * 1e3:.0f} ms"
            )
            print(f"  {model.text(answers[name])!r}")
    (before, exact), (after, lossy) = kept.items()
    cosine = float(torch.nn.functional.cosine_similarity(exact, lossy, dim=0))
    same = sum(a == b for a, b in zip(answers[before], answers[after], strict=True))
    print(f"{held[before] / held[after]:.2f} times smaller, cosine {cosine:.4f}, {same} of 16 tokens the same")


if __name__ == "__main__":
    main()
