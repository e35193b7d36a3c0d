"""One prompt again and again: without a cache, exact, and as NF4. Real model, real seconds.

Run: .venv/bin/python -m examples.comparison [--tokens 512] [--times 5]
"""

import argparse
import statistics
from functools import partial

from examples.reuse import KVWorker, answer, layers_of, load_model, prompts, rows
from kvstored_client.integrations.simple import HybridKVCache, QuantizedKVCache, SimpleKVCache


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    model = load_model()
    ids = prompts(model, 1, options.tokens)[0]
    lines: list[tuple[object, ...]] = [("cache", "first s", "again ms", "times faster", "held MB", "same answer")]
    plain = KVWorker(model, None, layers_of(model))
    kv = plain.prefix(ids)
    expected = answer(model, ids, kv, 8)
    for _ in range(options.times - 1):
        plain.prefix(ids)
    base = statistics.median(plain.seconds)
    lines.append(("none", f"{plain.seconds[0]:.2f}", f"{base * 1e3:.1f}", "1.0", "0", "yes"))
    for kind in (SimpleKVCache, QuantizedKVCache, partial(HybridKVCache, exact_share=0.5)):
        with kind(max_cache_size_mb=512) as cache:
            worker = KVWorker(model, cache, layers_of(model))
            for _ in range(options.times + 1):
                kv = worker.prefix(ids)
            again = statistics.median(worker.seconds[1:])
            tokens = answer(model, ids, kv, 8)
            same = sum(a == b for a, b in zip(tokens, expected, strict=True))
            held = cache.get_stats()["memory_used_mb"]
            told = "yes" if same == len(expected) else f"{same} of {len(expected)} tokens"
            first = f"{worker.seconds[0]:.2f}"
            faster = f"{base / again:.1f}"
            lines.append((type(cache).__name__, first, f"{again * 1e3:.1f}", faster, f"{held:.1f}", told))
    print(rows(lines))


if __name__ == "__main__":
    main()
