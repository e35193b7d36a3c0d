"""vLLM itself with KvstoredConnector: ten engine processes must give the same tokens.

base: no connector. store: the first with it. load: a new process finds the chunks, and loads them before the forward;
beside: while other steps run. store auto, nf4: chunks that may become lossy, and their load from 4 bits in RAM. lose,
lose beside: they are gone between lookup and load. stopped: the daemon is there and answers nothing. down: it is dead;
both with the default deadlines. Prints a table; with --json a line each, and `ttft` of hot and of 4 bits as ratios to
computing. Exit code 1: tokens differ (where nothing is lossy), nothing was loaded, or nothing was lost. Run by
`make engines`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = ("base", "store", "load", "beside", "store auto", "nf4", "lose", "lose beside", "stopped", "down")
RUNS = {"base": 3, "load": 3, "beside": 3, "nf4": 3}
"""Of the prompt, for the median; the others run once: the first run decides what they meet."""
LOSSY = ("store auto", "nf4")
STALL_ROUNDS = 15
TIERS = {"load": "hot", "nf4": "warm"}

PATIENT = {"lookup_timeout_s": 1.0, "fetch_timeout_s": 10.0}
"""Engines and daemon share two cores here: what is due must not be missed by a deadline."""


def connector(case: str, address: str) -> dict[str, Any] | None:
    """The engine's kv_transfer_config."""
    if case == "base":
        return None
    settings = {
        "sync_load_budget_bytes": 0 if "beside" in case else 1 << 40,
        **({"fidelity": "auto"} if case in LOSSY else {}),
        **({} if case in ("stopped", "down") else PATIENT),
    }
    return transfer(address, settings, lossy=case.startswith("lose"))


def transfer(address: str, settings: dict[str, Any], *, lossy: bool) -> dict[str, Any]:
    """A kv_transfer_config of our connector. lossy: of the one whose chunks are gone at the load."""
    module, name = "kvstored_client.integrations.vllm", "KvstoredConnector"
    if lossy:
        module, name = "tools.engines.vllm_lossy", "LossyConnector"
    return {
        "kv_connector": name, "kv_connector_module_path": module, "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"address": address, **settings},
    }  # fmt: skip


def engine(python: str, script: str, *args: str) -> tuple[Any, str]:
    """(what one engine process found, its log). Exits with its log where it found nothing."""
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client"))), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [python, str(ROOT / "tools/engines" / script), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False, cwd=ROOT)
    line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"the engine gave no result: {command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return json.loads(line[7:]), done.stdout + done.stderr


def run_case(python: str, case: str, model: Path, ids: list[int], address: str) -> dict[str, Any]:
    """One engine process of `vllm_case.py`."""
    asked = (str(model), json.dumps(ids), json.dumps(connector(case, address)), str(RUNS.get(case, 1)))
    found, log = engine(python, "vllm_case.py", *asked)
    return {**found, "recovered": "Recovered from KV load failure" in log}


def stall(python: str, model: Path, ids: list[int], address: str) -> dict[str, Any]:
    """The row of a bench: ms that a request which decodes is late because another one's prefix is loaded."""
    settings = connector("load", address)
    assert settings is not None
    settings["kv_connector_extra_config"].pop("sync_load_budget_bytes")  # the default's choice is what users meet
    found, _ = engine(python, "vllm_stall.py", str(model), json.dumps(ids), json.dumps(settings), str(STALL_ROUNDS))
    assert found["cached"], "nothing was loaded"
    params = {"engine": "vllm", "tokens": len(ids), "cached": found["cached"], "step_ms": round(found["step_ms"], 1)}
    return {
        "name": "decode.stall", "params": params, "value": found["stall_ms"], "median": found["median_stall_ms"],
        "unit": "ms", "ratios": {},
    }  # fmt: skip


@contextmanager
def serving(**settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A daemon: its address, and its process. settings: of its environment."""
    with tempfile.TemporaryDirectory(prefix="kvv-") as top:
        address = f"unix:{top}/k.sock"
        serve = [sys.executable, "-m", "kvstored", "serve", "--address", address, "--data-dir", f"{top}/data"]
        path = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))
        daemon = subprocess.Popen(serve, env={**os.environ, **settings, "PYTHONPATH": path}, cwd=ROOT)
        try:
            while not Path(top, "k.sock").exists() and daemon.poll() is None:
                time.sleep(0.1)
            yield address, daemon
        finally:
            daemon.kill()
            daemon.wait()


def prompt(tokens: int) -> tuple[Path, list[int]]:
    """The model's folder, and so many tokens of a text."""
    from experiments.smollm import convert, gguf_file

    gguf = gguf_file()
    if gguf is None:
        raise SystemExit("the model is not installed; run: make demo")
    home, _ = convert(gguf)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(home, local_files_only=True)
    ids = tokenizer((ROOT / "LICENSE").read_text())["input_ids"][:tokens]
    return home, ids


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine-python", required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, separated by commas, base among them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stall", action="store_true", help="only: how late a load makes a request that decodes")
    parser.add_argument("--record", type=Path, help="where `kvstored experiments` reads its row of vLLM from")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if cases[0] != "base" or not set(cases) <= set(CASES):
        parser.error(f"--cases begins with base and has some of {', '.join(CASES)}")
    home, ids = prompt(options.tokens)
    found: dict[str, dict[str, Any]] = {}
    with serving() as (address, daemon):
        if options.stall:
            print(json.dumps(stall(options.engine_python, home, ids, address)))
            return 0
        for case in cases:
            if case == "nf4":
                demote(address)
            if case == "stopped":
                daemon.send_signal(signal.SIGSTOP)
            if case == "down":
                daemon.kill()
                daemon.wait()
            found[case] = run_case(options.engine_python, case, home, ids, address)
            show(case, found[case], as_json=options.json)
    if options.json:
        for case in filter(found.__contains__, TIERS):
            print(json.dumps(ttft(found, case, len(ids))))
    same = all(result["tokens"] == found["base"]["tokens"] for case, result in found.items() if case not in LOSSY)
    if options.record is not None and "load" in found:
        options.record.write_text(json.dumps(record(found, same=same, tokens=len(ids))) + "\n")
    return 0 if good(found, same=same) else 1


def good(found: dict[str, dict[str, Any]], *, same: bool) -> bool:
    """Whether every case was what it is called, and told."""
    cached = [found[case]["cached"] for case in ("load", "beside", "nf4") if case in found]
    lost = all(result["recovered"] for case, result in found.items() if case.startswith("lose"))
    print(f"same tokens: {same}; tokens loaded from the store: {cached}; losses met: {lost}", file=sys.stderr)
    return same and all(cached) and lost


def demote(address: str) -> None:
    """What may be lossy, from hot to 4 bits in RAM."""
    from kvstored_client import Client

    with Client(address, on_error="raise") as client:
        client.demote(*(entry.key for entry in client.entries(tier="hot")))


def ttft(found: dict[str, dict[str, Any]], case: str, tokens: int) -> dict[str, Any]:
    """The row of a bench. recompute: how many times as long it takes to compute the prompt."""
    seconds = found[case]["ttft_s"]
    params = {"engine": "vllm", "tier": TIERS[case], "tokens": tokens, "cached": found[case]["cached"]}
    ratios = {"recompute": found["base"]["ttft_s"] / seconds}
    return {"name": "ttft", "params": params, "value": 1e3 * seconds, "unit": "ms", "ratios": ratios}


def record(found: dict[str, dict[str, Any]], *, same: bool, tokens: int) -> dict[str, Any]:
    """What experiments/vllm.json holds."""
    load = found["load"]
    return {
        "date": time.strftime("%Y-%m-%d"), "tokens": tokens, "cached": load["cached"],
        "base_s": round(found["base"]["ttft_s"], 2), "load_s": round(load["ttft_s"], 2), "same": same,
    }  # fmt: skip


def show(case: str, result: dict[str, Any], *, as_json: bool) -> None:
    """One case."""
    if as_json:
        params = {"case": case, "cached": result["cached"], "recovered": result["recovered"]}
        print(json.dumps({"name": "vllm.ttft", "params": params, "value": result["ttft_s"], "unit": "s", "ratios": {}}))
    else:
        told = f"{case:11} first token {result['ttft_s']:6.2f} s, cached {result['cached']:5}"
        print(f"{told}, recovered {result['recovered']}, tokens {result['tokens']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
