"""Hit ratios of simulated fleets on the real trace, and the arithmetic of docs/fleet.md.

    .venv/bin/python bench/fleet.py --json          # every case: about eight minutes
    .venv/bin/python bench/fleet.py --case ci       # the first 3,000 requests: a minute
    .venv/bin/python bench/fleet.py --arithmetic    # what a cell's store must hold and move: at once

Hosts of 1 % RAM and 5 % disk of the trace's 182,790 different blocks, all in NF4; `ci`: 1,000 blocks, no disk.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvstore.simulation.fleet import Fleet, object_nbytes, simulate_fleet
from kvstore.simulation.simulator import LAYOUTS, Setup, block_nbytes
from kvstore.simulation.trace import read_trace

TRACE = Path(__file__).parent.parent / "tests" / "data" / "mooncake_conversation.jsonl.xz"
UNIQUE_BLOCKS = 182_790
CI = {
    "ci alone": (4, {}, 4.6, 4.7), "ci shared": (4, {"shared_blocks": None}, 31.0, 100),
    "ci 20000": (4, {"shared_blocks": 20_000}, 27.0, 100),
}  # fmt: skip
FULL: dict[str, tuple[int, dict[str, Any], float, float]] = {
    "alone": (16, {}, 8.9, 9.9), "shared": (16, {"shared_blocks": None}, 36.3, 100),
    "20%": (16, {"shared_blocks": UNIQUE_BLOCKS // 5}, 34.2, 100),
    "evict-fed": (16, {"shared_blocks": None, "publish": "evict"}, 0, 12),
    "reused": (16, {"shared_blocks": None, "publish": "reused"}, 12, 14),
    "prefix alone": (16, {"routing": "prefix"}, 33, 35),
}  # fmt: skip
"""Hosts, how, and the percentage of hits due, from and to."""
WRITTEN_BLOCKS, READ_BLOCKS = 15.2, 6.5
"""A request's, 16 hosts, random routing: cases `shared` of this bench."""


def setup(ram: int, disk: int) -> Setup:
    """Hosts with room for so many blocks in NF4."""
    one = block_nbytes(Setup(1, hot_fraction=0.0))
    return Setup(ram * one, disk * one, 0.0)


def rows(only: list[str] | None, *, ci: bool) -> None:
    """Run the cases of one size."""
    requests = read_trace(TRACE, 3000 if ci else None)
    sized = setup(1000, 0) if ci else setup(UNIQUE_BLOCKS // 100, UNIQUE_BLOCKS // 20)
    for name, (hosts, how, low, high) in (CI if ci else FULL).items():
        if only and not any(name.startswith(each) for each in only):
            continue
        got = simulate_fleet(requests, Fleet(sized, hosts, **how))
        value = 100 * got.hit_ratio
        params = {"case": name, "hosts": hosts, "shared": how.get("shared_blocks", 0), "holds": low <= value <= high,
                  "shared_bytes_per_request": got.shared_bytes_per_request,
                  "shared_written_bytes_per_request": got.shared_written_bytes_per_request}  # fmt: skip
        print(json.dumps({"name": "fleet.hits", "params": params, "value": value, "unit": "%",
                          "ratios": {"due": value / low if low else high / max(1e-9, value)}}), flush=True)  # fmt: skip


def arithmetic() -> None:
    """What the stores of 10,000 hosts in cells must hold for 12 minutes of writes, and move."""
    print("| model | requests/s a host | MB a block | written, GB/s a host | read, GB/s a host | hosts a cell | cells "
          "| a cell's store, TB | its traffic, GB/s |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for model, rate in (("llama3-8b", 10.0), ("llama3-70b", 1.25)):
        block = object_nbytes(Setup(1, layout=LAYOUTS[model]))
        written, read = (rate * blocks * block / 1e9 for blocks in (WRITTEN_BLOCKS, READ_BLOCKS))
        for hosts in (4, 8, 16):
            holds_tb, moved = written * hosts * 720 / 1e3, (written + read) * hosts
            print(f"| {model} | {rate:g} | {block / 1e6:.1f} | {written:.2f} | {read:.2f} | {hosts} | "
                  f"{10_000 // hosts:,} | {holds_tb:.1f} | {moved:.1f} |")  # fmt: skip


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as always")
    parser.add_argument("--case", action="append", choices=["ci", *FULL])
    parser.add_argument("--arithmetic", action="store_true")
    args = parser.parse_args()
    if args.arithmetic:
        arithmetic()
        return
    for ci in (True, False):  # the small one first
        if not args.case or ("ci" in args.case) or not ci:
            if args.case == ["ci"] and not ci:
                continue
            rows(None if ci else args.case, ci=ci)


if __name__ == "__main__":
    main()
