"""Hit ratios of the embedded store on a real trace: real bytes, 32 KiB of float32 a block, metadata counted.

    .venv/bin/python bench/trace.py --json            # every case: about 15 minutes
    .venv/bin/python bench/trace.py --case float32    # one of them

One case a line: share of the trace's block references found in the longest resident prefix, cold start, whole trace.
The clock is the trace's own. Ratios above 1 are better than the baseline named.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.hit import Hit
from kvstore.simulation.trace import Request, read_trace, replay
from kvstore.store import Store

TRACE = Path(__file__).parent.parent / "tests" / "data" / "mooncake_conversation.jsonl.xz"
VALUES = 8192
"""float32 values of a block: 32 KiB."""
LRU_PERCENT = 19.58
"""Leaf-first LRU with room for 9,139 blocks: the oracle's 56,479 of 288,500."""
UNIQUE_BLOCKS = 182_790

POOL = [torch.randn(VALUES, generator=torch.Generator().manual_seed(i)) for i in range(64)]


def block_nbytes(*, payload_only: bool) -> int:
    """Bytes of one float32 block: its payload, or what the store counts for holding it."""
    if payload_only:
        return 4 * VALUES
    with Store.open(background=False) as store:
        store.put(b"k" * 32, {"kv": POOL[0]})
        info = store.inspect(b"k" * 32)
        assert info is not None
        return info.tier_nbytes[0]


@dataclass(frozen=True)
class Case:
    """One configuration. Budgets in float32 blocks as the store counts them; at_least: the hit percentage due."""

    name: str
    hot_blocks: float
    warm_blocks: float = 0.0
    cold_blocks: float = 0.0
    policy: str = "lru"
    admission: str = "all"
    at_least: float = 0.0
    writes_at_most: float = 0.0
    payload_only: bool = False


def cases() -> list[Case]:
    """What issue 5 asks for, and the same with metadata on top of the budget instead of within."""
    half, disk = UNIQUE_BLOCKS * 0.005, UNIQUE_BLOCKS * 0.05
    return [
        Case("float32", 9139, at_least=19.3),
        Case("arc", 9139, policy="arc", at_least=20.7),
        Case("s3fifo", 9139, policy="s3fifo"),
        Case("nf4-2%", 365.5, 3289.5, at_least=30.0),
        Case("nf4-5%", 913.9, 8225.1, at_least=35.3),
        Case("disk", half, half, disk, at_least=35.5, writes_at_most=1.0),
        Case("disk-reused", half, half, disk, admission="reused", at_least=23.0, writes_at_most=0.12),
        Case("nf4-2%-payload", 365.5, 3289.5, at_least=30.0, payload_only=True),
        Case("float32-payload", 9139, at_least=0.0, payload_only=True),
    ]


def run(case: Case, requests: list[Request]) -> dict[str, Any]:
    """Replay a trace against a store of this shape."""
    unit = block_nbytes(payload_only=case.payload_only)
    folder = Path(tempfile.mkdtemp(prefix="kvstore-bench-")) if case.cold_blocks else None
    config = StoreConfig(
        hot=HotConfig(max(1, int(case.hot_blocks * unit))),
        warm=WarmConfig(int(case.warm_blocks * unit)),
        cold=ColdConfig(
            path=str(folder) if folder else None,
            capacity_nbytes=max(1 << 20, int(case.cold_blocks * unit)),
            admission=case.admission,
        ),
        policy=case.policy,
    )
    clock = ManualClock()
    start_s = clock.now()
    started = time.perf_counter()
    try:
        with Store.open(config, clock=clock, background=False) as store:

            def before(request: Request) -> None:
                clock.advance(max(0.0, start_s + request.at_s - clock.now()))
                store.maintain()

            *_, done = _progress(replay(store, requests, value_of, before=before, check=is_right), len(requests))
            stats = store.stats()
            writes = stats.tiers["cold"].puts if folder else 0
            return {
                "hits": done.hits, "blocks": done.blocks, "puts": done.puts, "wrong": done.wrong,
                "hit_percent": 100 * done.hits / done.blocks, "writes_per_put": writes / max(1, done.puts),
                "encodes_per_put": stats.values["encodes"] / max(1, done.puts),
                "tiers": {name: tier.hits for name, tier in stats.tiers.items()},
                "entries": {name: tier.entries for name, tier in stats.tiers.items()},
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
    finally:
        if folder:
            shutil.rmtree(folder)


def value_of(block: int) -> dict[str, torch.Tensor]:
    """One of 64 random blocks."""
    return {"kv": POOL[block % len(POOL)]}


def is_right(block: int, hit: Hit) -> bool:
    """Exactly what was put, or within NF4's error of it."""
    due, got = POOL[block % len(POOL)], hit.tensors["kv"]
    return bool((got - due).norm() < 0.15 * due.norm()) if hit.lossy else torch.equal(got, due)


def _progress(steps: Iterator[Any], total: int) -> Iterator[Any]:
    for i, step in enumerate(steps):
        if sys.stderr.isatty() and i % 50 == 0:
            print(f"\r{i}/{total} requests", end="", file=sys.stderr)
        yield step
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def lines_of(case: Case, got: dict[str, Any]) -> list[dict[str, Any]]:
    """The bench lines of one case."""
    params = {"case": case.name, "policy": case.policy, "admission": case.admission, **{
        name: got[name] for name in ("hits", "blocks", "puts", "wrong", "tiers", "entries")
    }, "encodes_per_put": round(got["encodes_per_put"], 3), "seconds": round(got["seconds"], 1)}  # fmt: skip
    ratios = {"float32 LRU, same bytes at 5%": got["hit_percent"] / LRU_PERCENT}
    if case.at_least:
        ratios["due"] = got["hit_percent"] / case.at_least
    lines = [{"name": "prefix_hits", "params": params, "value": got["hit_percent"], "unit": "%", "ratios": ratios}]
    if case.cold_blocks:
        ratios = {"due": case.writes_at_most / max(1e-9, got["writes_per_put"])}
        lines.append(
            {
                "name": "writes_per_put", "params": {"case": case.name, "admission": case.admission},
                "value": got["writes_per_put"], "unit": "1", "ratios": ratios,
            }
        )  # fmt: skip
    return lines


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--case", action="append", choices=[case.name for case in cases()])
    parser.add_argument("--requests", type=int, help="only so many of the trace's requests")
    parser.add_argument("--trace", type=Path, default=TRACE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    requests = read_trace(args.trace, args.requests)
    for case in cases():
        if args.case and case.name not in args.case:
            continue
        for line in lines_of(case, run(case, requests)):
            if args.json:
                print(json.dumps(line), flush=True)
            else:
                due = line["ratios"].get("due")
                print(
                    f"{line['name']:16} {case.name:16} {line['value']:8.2f} {line['unit']:2}"
                    + (f" {due:.3f} of what is due" if due else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
