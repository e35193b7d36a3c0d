"""The demo: one prefill, two workers, a restart between them.

A daemon starts; worker A runs a document through a real model and puts its K and V; A ends; the daemon is restarted;
worker B, a new process, restores them from each tier and answers another question about the document. Every figure
printed was measured in this run. Exit code 1: an exact entry did not come back as it was, or changed an answer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.worker import Job
from experiments import ExperimentFailed
from experiments.daemon import daemon, environment
from experiments.smollm import MODEL_NAME, convert, gguf_file
from kvstore.printable import size
from kvstored.cli.text import table

ROOT = Path(__file__).parent.parent
WORKER_TIMEOUT_S = 600.0

_SETTINGS = """\
[store]
promote_after = 0  # this demo moves entries itself, so that each tier can be measured several times
[store.hot]
capacity_nbytes = "256MiB"
[store.warm]
capacity_nbytes = "64MiB"
[store.cold]
capacity_nbytes = "512MiB"
"""


class DemoFailed(Exception):
    """Something did not run; the message says what."""


def step(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def run_worker(role: str, job: Job) -> Any:
    """Run a worker to its end. Returns what it found out."""
    command = [sys.executable, "-m", "examples.worker", role, json.dumps(asdict(job))]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT, timeout=WORKER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"worker {role} did not end within {WORKER_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise DemoFailed(f"worker {role} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def run(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The whole story. Returns worker A's and worker B's findings."""
    gguf = gguf_file()
    if gguf is None:
        raise DemoFailed("the model is not installed; run: make demo")
    step(f"model: {MODEL_NAME} (converted once, then kept)")
    model, revision = convert(gguf)
    (home / "kvstored.toml").write_text(_SETTINGS)
    job = Job(
        address="",
        model=str(model),
        revision=revision,
        document=str(Path(options.document).resolve()),
        document_tokens=options.tokens,
        chunk_tokens=options.chunk_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
    )
    step("daemon: starting")
    with daemon(home) as address:
        first = run_worker("prefill", Job(**asdict(job) | {"address": address}))
        step("worker A has ended; daemon: restarting")
    with daemon(home) as address:
        second = run_worker("restore", Job(**asdict(job) | {"address": address}))
    return {"a": first, "b": second}


def complaints(found: dict[str, Any]) -> list[str]:
    """What must hold and does not."""
    wrong = []
    for row in found["b"]["rows"]:
        place = f"{row['fidelity']} from {row['asked_tier']}"
        if row["tiers"] != [row["asked_tier"]]:
            wrong.append(f"{place}: answered by {'+'.join(row['tiers'])}")
        if row["fidelity"] == "exact" and not row["equal"]:
            wrong.append(f"{place}: the answer differs from the one without the store")
        if row["fidelity"] == "exact" and row["digest"] != found["a"]["digests"][str(row["tokens"])]:
            wrong.append(f"{place}: K and V are not the bytes that worker A put")
    return wrong


def report(found: dict[str, Any]) -> str:
    """The table."""
    b = found["b"]
    took = b["prefill"]
    n, new = b["tokens"], len(b["answer"])
    rows = [
        ("prefill", "-", "-", f"{took['best_s']:.3f}", f"{took['median_s']:.3f}", "1.0x", "-", f"{new}/{new}"),
    ]
    for row in b["rows"]:
        restore = row["restore"]
        rows.append((
            f"restore from {'+'.join(row['tiers'])}",
            row["fidelity"],
            "+".join(row["encodings"]) + (", lossy" if row["lossy"] and row["encodings"] == ["raw"] else ""),
            f"{restore['best_s']:.3f}",
            f"{restore['median_s']:.3f}",
            f"{took['median_s'] / restore['median_s']:.1f}x",
            size(row["nbytes"]),
            f"{row['agreement']}/{new}",
        ))  # fmt: skip
    head = (f"{n} TOKENS", "FIDELITY", "HELD AS", "BEST s", "MEDIAN s", "SPEEDUP", "BYTES", "TOKENS EQUAL")
    a = found["a"]
    story = (
        f"Worker A prefilled {a['tokens']} tokens in {a['prefill_s']:.3f} s and ended; the daemon was restarted; "
        f"worker B had {b['prompt_tokens']} tokens to answer."
    )
    times = b["rows"][0]["restore"]["times"]
    value = size(b["rows"][0]["value_nbytes"])
    measure = f"Prefill {took['times']} times, restore {times} times. {n} tokens are {value} of float32 K and V."
    lines = [
        "",
        story,
        measure,
        "",
        *table(head, rows, left=3),
        "",
        f"Worker B's answer began: {b['text'].strip()[:200]!r}",
    ]
    return "\n".join(lines)


def json_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same findings, in the form of the benches: one JSON object a line."""
    b = found["b"]
    median = b["prefill"]["median_s"]
    yield json.dumps({"name": "prefill", "params": {"tokens": b["tokens"]}, "value": median, "unit": "s", "ratios": {}})
    for row in b["rows"]:
        params = {
            "tokens": row["tokens"], "tier": "+".join(row["tiers"]), "fidelity": row["fidelity"],
            "encoding": "+".join(row["encodings"]), "nbytes": row["nbytes"],
        }  # fmt: skip
        restore = row["restore"]["median_s"]
        yield json.dumps(
            {
                "name": "restore",
                "params": params,
                "value": restore,
                "unit": "s",
                "ratios": {"prefill": median / restore},
            }
        )
        agreement = row["agreement"] / len(b["answer"])
        yield json.dumps({"name": "agreement", "params": params, "value": agreement, "unit": "share", "ratios": {}})


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--document", default=str(ROOT / "LICENSE"), help="a text file (default: this repository's LICENSE)"
    )
    parser.add_argument("--tokens", type=int, default=1060, help="tokens of the document (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens in a chunk (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to answer with (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times each figure is measured (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def main() -> int:
    """Run the demo. Returns the exit code."""
    options = parse_options()
    try:
        with tempfile.TemporaryDirectory(prefix="kvstored-demo-") as home:
            found = run(options, Path(home))
    except (DemoFailed, ExperimentFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print("\n".join(json_lines(found)) if options.json else report(found))
    wrong = complaints(found)
    for line in wrong:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
