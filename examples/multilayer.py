"""All layers of a model, or only some: what a hit of each saves.

Run: .venv/bin/python -m examples.multilayer [--tokens 256]
"""

import argparse
import time

import torch

from examples.reuse import layers_of, load_model, prompts, rows
from kvstored_client.integrations.simple import SimpleKVCache


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    model = load_model()
    ids = prompts(model, 1, options.tokens)[0]
    start = time.perf_counter()
    k, v = model.prefill(ids)
    prefill_s = time.perf_counter() - start
    layers = layers_of(model)
    lines: list[tuple[object, ...]] = [("layers", "put ms", "get ms", "MB", "all equal")]
    for count in (1, layers // 2, layers):
        with SimpleKVCache(512) as cache:
            start = time.perf_counter()
            for layer in range(count):
                cache.cache_kv(ids, layer, k[layer], v[layer])
            put_s = time.perf_counter() - start
            start = time.perf_counter()
            pairs = [cache.get_cached_kv(ids, layer) for layer in range(count)]
            get_s = time.perf_counter() - start
            equal = all(
                p is not None and torch.equal(p[0], k[i]) and torch.equal(p[1], v[i]) for i, p in enumerate(pairs)
            )
            used = cache.get_stats()["memory_used_mb"]
            lines.append((count, f"{put_s * 1e3:.1f}", f"{get_s * 1e3:.1f}", f"{used:.1f}", equal))
    print(f"prefill of {len(ids)} tokens, all {layers} layers: {prefill_s * 1e3:.0f} ms")
    print(rows(lines))


if __name__ == "__main__":
    main()
