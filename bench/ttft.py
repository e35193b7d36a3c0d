"""Time from prompt to first token on a real model: recomputed, and restored from each tier of a daemon.

Run: .venv/bin/python bench/ttft.py [--json] [--tokens 256,512,1024,2048] [--repeats 5]

ttft.recompute: `generate` of one token without a store. ttft.hot, .warm, .cold: the same call through PrefixCache in a
worker that has the model and a client of the daemon, everything included: lookup, transfer, decoding, building the
cache, the last token's forward. Hot and cold entries are exact, warm ones NF4. The rounds go through the tiers in
turn, so that a busy moment of the machine hits all of them; the medians are compared.
Cold reads come from the page cache, as after a restart of the daemon.
ttft.beside: what a hot hit takes beside the engine's own forward: less `generate` over a full cache that was there
before, one after the other, PAIRS times; the median of the differences. over: that cache, the engine's own or one of
our layers, which has room for the next token and costs less.
ttft.break_even: the prompt length below which a hit does not pay, by a line through the recompute times.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cold import Report
from transformers import DynamicCache

from experiments.smollm import convert, gguf_file
from kvstore.errors import KvstoreError
from kvstored_client import Client
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers import PrefixCache
from kvstored_client.integrations.transformers.layer import RoomyLayer

ROOT = Path(__file__).parents[1]
SETTINGS = """
[store]
promote_after = 0  # entries stay in the tier that is measured
[store.hot]
capacity_nbytes = "1GiB"
[store.warm]
capacity_nbytes = "512MiB"
[store.cold]
capacity_nbytes = "4GiB"
"""
TIERS = {"hot": "exact", "warm": "auto", "cold": "exact"}
PAIRS = 15
LIMITS = {"hot": 20, "warm": 15, "cold": 10}
"""What must hold at 1,024 tokens: recompute over this tier's time."""


@contextmanager
def daemon(home: Path) -> Iterator[Client]:
    """A daemon and a client of it that raises."""
    (home / "kvstored.toml").write_text(SETTINGS)
    address = f"unix:{home / 'k.sock'}"
    command = [sys.executable, "-m", "kvstored", "serve", "--config", str(home / "kvstored.toml")]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))
    with (home / "daemon.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(home / "data"), "--address", address],
            stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT,
        )  # fmt: skip
    client = Client(address, timeout_s=60, on_error="raise")
    try:
        for _ in range(600):
            try:
                client.stats()
                break
            except KvstoreError:
                if process.poll() is not None:
                    raise SystemExit((home / "daemon.log").read_text()) from None
                time.sleep(0.1)
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def place(client: Client, worker: PrefixCache, ids: torch.Tensor, tier: str) -> None:
    """Put the prompt's entries anew and bring them to a tier. Exits where they do not get there."""
    client.evict(*[entry.key for entry in client.entries()])
    worker.generate(ids, max_new_tokens=1, do_sample=False)
    if not worker.flush(60):
        raise SystemExit("the puts did not end")
    # An exact entry skips NF4 on its way down: one step for either.
    while tier != "hot" and (keys := [entry.key for entry in client.entries() if entry.tiers[0] == "hot"]):
        if not client.demote(keys[0]):
            raise SystemExit("an entry would not leave hot")
    tiers = {entry.tiers[0] for entry in client.entries()}
    if tiers != {tier}:
        raise SystemExit(f"entries meant for {tier} are in {', '.join(sorted(tiers)) or 'no tier'}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(
    client: Client, model: Any, workers: dict[str, PrefixCache], ids: torch.Tensor, repeats: int
) -> dict[str, list[float]]:
    """Seconds to the first token: one list for recomputing and one for each tier, round by round."""
    seconds: dict[str, list[float]] = {"recompute": [], **{tier: [] for tier in TIERS}}
    first = {"max_new_tokens": 1, "do_sample": False}
    for _ in range(repeats):
        took, expected = timed(lambda: model.generate(ids, **first))
        seconds["recompute"].append(took)
        for tier, fidelity in TIERS.items():
            worker = workers[fidelity]
            place(client, worker, ids, tier)
            for _ in range(2):  # the first of them finds the caches of this tier cold; both count
                before = worker.usage.restored_tokens
                took, out = timed(lambda worker=worker: worker.generate(ids, **first))  # type: ignore[misc]
                if worker.usage.restored_tokens - before != ids.shape[1] - 1:
                    raise SystemExit(f"{tier}: only {worker.usage.restored_tokens - before} tokens were restored")
                if fidelity == "exact" and not torch.equal(out, expected):
                    raise SystemExit(f"{tier}: another token than without the store")
                seconds[tier].append(took)
                worker.flush(60)
    return seconds


def beside(client: Client, model: Any, worker: PrefixCache, ids: torch.Tensor) -> dict[str, list[float]]:
    """Seconds of a hot hit less those of `generate` over a cache that is full: of each pair, by whose cache."""
    first = {"max_new_tokens": 1, "do_sample": False}
    computed = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=computed)
    place(client, worker, ids, "hot")
    found: dict[str, list[float]] = {"own": [], "ours": []}
    for _ in range(PAIRS + 1):
        for whose, differences in found.items():
            hit, _ = timed(lambda: worker.generate(ids, **first))
            full = full_cache(computed, roomy=whose == "ours")
            took, _ = timed(lambda full=full: model.generate(ids, past_key_values=full, **first))  # type: ignore[misc]
            differences.append(hit - took)
    return {whose: differences[1:] for whose, differences in found.items()}  # the first finds memory never touched


def full_cache(computed: Any, *, roomy: bool) -> Any:
    """A copy of a cache, made by torch. roomy: of the layers that a restore makes."""
    if not roomy:
        return DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in computed.layers])
    full = DynamicCache()
    for layer in computed.layers:
        grown = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (layer.keys, layer.values)]
        full.layers.append(RoomyLayer(*grown, layer.keys.shape[2]))
    return full


def break_even(points: list[tuple[int, float, float]]) -> float:
    """Tokens at which a hot hit and recomputing take the same time, from straight lines through the two shortest."""
    (n0, r0, h0), (n1, r1, h1) = sorted(points)[:2]
    slope = (r1 - r0) / (n1 - n0) - (h1 - h0) / (n1 - n0)
    return max(1.0, n0 - (r0 - h0) / slope) if slope > 0 else float("nan")


def main() -> int:
    """Run it. Exit code 1: a ratio that must hold at 1,024 tokens does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", default="64,256,512,1024,2048")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    report = Report(as_json=options.json)
    gguf = gguf_file()
    if gguf is None:
        raise SystemExit("the model is not installed; run: make demo")
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, revision = convert(gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(home, local_files_only=True)
    text = (ROOT / "LICENSE").read_text()
    document = tokenizer(text)["input_ids"]
    points, missed = [], []
    with tempfile.TemporaryDirectory(prefix="kvt-") as top, daemon(Path(top)) as client:
        guard = Guard(client, lookup_timeout_s=30, fetch_timeout_s=60)
        workers = {
            fidelity: PrefixCache(model, guard, revision=revision, fidelity=fidelity, keep_answers=False)
            for fidelity in ("exact", "auto")
        }
        for tokens in map(int, options.tokens.split(",")):
            ids = torch.tensor([document[:tokens]])
            if ids.shape[1] != tokens:
                raise SystemExit(f"the document has {ids.shape[1]} tokens, not {tokens}")
            seconds = measure(client, model, workers, ids, options.repeats)
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            points.append((tokens, medians["recompute"], medians["hot"]))
            for name, median in medians.items():
                ratios = {} if name == "recompute" else {"recompute": medians["recompute"] / median}
                report.add(f"ttft.{name}", median * 1e3, "ms", ratios, tokens=tokens, runs=len(seconds[name]))
                if tokens == 1024 and ratios and ratios["recompute"] < LIMITS[name]:
                    missed.append(f"{name}: {ratios['recompute']:.1f} times faster, not {LIMITS[name]}")
            for whose, differences in beside(client, model, workers["exact"], ids).items():
                extra = statistics.median(differences)
                report.add("ttft.beside", extra * 1e3, "ms", tokens=tokens, over=whose, runs=PAIRS)
    if len(points) > 1:
        report.add("ttft.break_even", break_even(points), "tokens")
    for line in missed:
        print(f"ttft: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
