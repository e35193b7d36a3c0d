"""How long the engine takes to match a chain of 1,000 chunk keys, with a million entries held.

.venv/bin/python bench/match.py --json
"""

import argparse
import json
import time

from kvstore.config import HotConfig, StoreConfig
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.simulation.simulator import LAYOUTS, Setup, SizedTranscoder
from kvstore.simulation.trace import block_key
from kvstore.store import Store

DUE_MS = 2.0
CHAIN = 1000


def main() -> None:
    """Fill and match."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--entries", type=int, default=1_000_000)
    args = parser.parse_args()
    with Store.open(StoreConfig(hot=HotConfig(1 << 50)), background=False) as store:
        # Entries without tensors: the index, the tiers and the chains are the store's own, a match reads no values.
        transcoder = SizedTranscoder(Setup(1 << 40, layout=LAYOUTS["smollm2-135m"]), store._r)  # noqa: SLF001 - fills it without tensors
        now = time.time()
        for start in range(0, args.entries, CHAIN):
            keys = [Key(block_key(start + i)) for i in range(CHAIN)]
            made = ((transcoder.raw(key), Meta(now, now + 3600, 3600.0, 1)) for key in reversed(keys))
            store._write_path.take_chain(keys, made, None)  # noqa: SLF001
        asked = [bytes(block_key(args.entries // 2 // CHAIN * CHAIN + i)) for i in range(CHAIN)]
        took: list[float] = []
        for _ in range(200):
            begun = time.perf_counter()
            held = store.match(asked)
            took.append(1000 * (time.perf_counter() - begun))
            assert held == CHAIN
        took.sort()
    median = took[len(took) // 2]
    line = {"name": "match", "params": {"keys": CHAIN, "entries": args.entries, "p99_ms": took[-2]},
            "value": median, "unit": "ms", "ratios": {"due": DUE_MS / median}}  # fmt: skip
    print(json.dumps(line) if args.json else f"match of {CHAIN} keys, {args.entries:,} entries: {median:.2f} ms")


if __name__ == "__main__":
    main()
