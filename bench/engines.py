"""What vLLM's connector costs beside the copy of the bytes: `bench/engines.py [--json] [--engine-python PYTHON]`.

Needs vLLM's wheel, which `make test` fetches. A daemon over shared memory and both halves of the connector, with 32
layers in blocks of 16 tokens. Heads are so small that the copies take no time: Python, the calls and the client are
left, the same for heads of any size.

    connector.put   CPU ms a chunk of 256 tokens; `forward`: on the forward's thread, where the batch waits for it
    connector.get   the same
    scheduler.step  CPU ms a request a step, of requests of 32k tokens that decode (params: requests)
    ttft            with --engine-python (`tools/engines/vllm.sh` prints it): ms to the first token after a prompt of
                    1,512 in vLLM itself, from hot and from 4 bits in RAM; ratio `recompute`
    decode.stall    the same: ms that a request which decodes is late because another one's prefix is loaded, beside
                    the steps (1,512 tokens) and before one (300); the least of 15 rounds, and the median
    gpu.*           where there is a GPU: see `bench/gpu.py`
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]

from tests.side import side, why_missing  # noqa: E402 - found by the line above

LAYERS, BLOCK, CHUNK = 32, 16, 256
PER = CHUNK // BLOCK
CHUNKS = 8
"""Of one request: 2,048 tokens a step."""
BLOCKS = 32_768
"""Of the paged buffers, 16 MiB a layer: like all that are so large, they lie one behind the other."""
ROUNDS = 40
LONG_TOKENS = 32_768
DUE = {"connector.put": 0.25, "connector.get": 0.15, "scheduler.step": 0.05}
TTFT_TOKENS, TTFT_CASES = 1512, "base,store,load,store auto,nf4"
TTFT_DUE = {"hot": 8, "warm": 6}
"""Times as fast as computing."""
STALL_TOKENS, STALL_DUE = (1512, 300), 10


def halves(address: str) -> tuple[Any, Any]:
    """The scheduler's half and the worker's."""
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvstored_client.integrations.vllm import KvstoredConnector

    model = Some(model="m", revision=None, dtype=torch.bfloat16, quantization=None, hf_config=Some(model_type="tiny"))
    extra = {"address": address, "lookup_timeout_s": 10.0, "fetch_timeout_s": 10.0, "sync_load_budget_bytes": 1 << 40}
    config: Any = Some(
        model_config=model, cache_config=Some(block_size=BLOCK, cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=Some(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        kv_transfer_config=Some(kv_connector_extra_config=extra, is_kv_producer=True),
    )  # fmt: skip
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    names = [f"layer.{i}" for i in range(LAYERS)]
    groups: Any = Some(kv_cache_groups=[Some(kv_cache_spec=spec, layer_names=names)])
    found = [KvstoredConnector(config, role, groups) for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER)]
    found[1].register_kv_caches({name: torch.zeros(BLOCKS, 2, BLOCK, 1, 8, dtype=torch.bfloat16) for name in names})
    return found[0], found[1]


def request(name: str, tokens: int) -> Any:
    """One with hashes of its own."""
    hashes = [f"{name} {i}".encode().ljust(32) for i in range(tokens // BLOCK)]
    return Some(request_id=name, num_tokens=tokens, num_prompt_tokens=tokens, block_hashes=hashes)


def step(scheduler: Any, asked: Any, blocks: list[int], computed: int, scheduled: int) -> Any:
    """What the scheduler tells the worker of a step with one new request."""
    new = Some(req_id=asked.request_id, block_ids=(blocks,), num_computed_tokens=computed)
    old = Some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    return scheduler.build_connector_meta(
        Some(scheduled_new_reqs=[new], scheduled_cached_reqs=old, num_scheduled_tokens={asked.request_id: scheduled})
    )


def timed(work: Any) -> tuple[float, float]:
    """CPU ms of this process and of this thread."""
    process, thread = time.process_time(), time.thread_time()
    work()
    return 1000 * (time.process_time() - process), 1000 * (time.thread_time() - thread)


def put_and_get(scheduler: Any, worker: Any) -> list[dict[str, Any]]:
    """Rounds of a prompt that is kept by one request and loaded by another one."""
    puts, gets = [], []
    blocks = list(range(CHUNKS * PER))
    tokens = CHUNKS * CHUNK + 1

    def run(meta: Any) -> None:
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(None)
        worker.wait_for_save()
        worker.clear_connector_metadata()
        assert worker._guard.flush(20)  # noqa: SLF001 - the put belongs to what is measured

    for i in range(ROUNDS):
        asked = request(f"kept {i}", tokens)
        assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
        kept = step(scheduler, asked, blocks, 0, tokens)
        puts.append(timed(lambda kept=kept: run(kept)))
        assert scheduler.get_num_new_matched_tokens(asked, 0) == (CHUNKS * CHUNK, False)
        scheduler.update_state_after_alloc(asked, Some(get_block_ids=lambda: (blocks,)), CHUNKS * CHUNK)
        loaded = step(scheduler, asked, blocks, CHUNKS * CHUNK, 1)
        gets.append(timed(lambda loaded=loaded: run(loaded)))
        assert not worker.get_block_ids_with_load_errors()
    return [row(name, times) for name, times in (("connector.put", puts), ("connector.get", gets))]


def row(name: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    """A chunk's share, the median of the rounds."""
    process, forward = (sorted(one[i] for one in times)[len(times) // 2] / CHUNKS for i in (0, 1))
    params = {"layers": LAYERS, "tokens": CHUNK, "forward": round(forward, 4)}
    return {"name": name, "params": params, "value": process, "unit": "ms", "ratios": {"due": DUE[name] / process}}


def scheduler_step(scheduler: Any, requests: int) -> dict[str, Any]:
    """Requests of 32k tokens that decode: nothing is filled in most steps."""
    running = [request(f"long {requests} {i}", LONG_TOKENS) for i in range(requests)]
    for asked in running:
        scheduler.get_num_new_matched_tokens(asked, 0)
        step(scheduler, asked, list(range(LONG_TOKENS // BLOCK)), 0, LONG_TOKENS)
    names = [asked.request_id for asked in running]
    took = []
    for at in range(200):
        old = Some(
            req_ids=names, new_block_ids=[None] * requests, num_computed_tokens=[LONG_TOKENS + at] * requests,
            resumed_req_ids=set(),
        )  # fmt: skip
        output = Some(scheduled_new_reqs=[], scheduled_cached_reqs=old, num_scheduled_tokens=dict.fromkeys(names, 1))
        took.append(timed(lambda output=output: scheduler.build_connector_meta(output))[1] / requests)
    value = sorted(took)[len(took) // 2]
    params = {"requests": requests, "tokens": LONG_TOKENS}
    return {"name": "scheduler.step", "params": params, "value": value, "unit": "ms",
            "ratios": {"due": DUE["scheduler.step"] / value}}  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """All rows."""
    from tests.e2e.adapters import stubs

    stubs.install("triton")
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        address = f"unix:{top}/k.sock"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstored", "serve", "--address", address, "--data-dir", f"{top}/data"],
            stderr=subprocess.DEVNULL,
        )
        try:
            while not Path(top, "k.sock").exists():
                assert daemon.poll() is None, "the daemon did not start"
                time.sleep(0.05)
            scheduler, worker = halves(address)
            return [*put_and_get(scheduler, worker), scheduler_step(scheduler, 1), scheduler_step(scheduler, 64)]
        finally:
            daemon.terminate()
            daemon.wait()


def in_engine(engine_python: str) -> list[dict[str, Any]]:
    """In the engine itself."""
    return [
        row
        for asked in (
            ["--tokens", str(TTFT_TOKENS), "--cases", TTFT_CASES, "--json"],
            *(["--tokens", str(tokens), "--stall"] for tokens in STALL_TOKENS),
        )
        for row in run_vllm(engine_python, asked)
        if row["name"] in ("ttft", "decode.stall")
    ]


def run_vllm(engine_python: str, asked: list[str]) -> list[dict[str, Any]]:
    """What `tools/engines/run_vllm.py` prints."""
    run = [sys.executable, str(ROOT / "tools/engines/run_vllm.py"), "--engine-python", engine_python, *asked]
    path = os.pathsep.join(sys.path[:3])
    done = subprocess.run(
        run, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--engine-python", help="of a venv with vLLM: measures ttft and decode.stall too, 6 minutes")
    options = parser.parse_args()
    for folder in ("shared", "vllm"):
        if missing := why_missing(folder):
            raise SystemExit(missing)
    path = os.pathsep.join([*sys.path[:3], str(side() / "shared"), str(side() / "vllm")])
    if os.environ.get("PYTHONPATH") != path:  # vLLM's wheel lies beside the environment
        subprocess.run(
            [sys.executable, str(ROOT / "bench/gpu.py"), "--no-tests", *(["--json"] if options.json else [])],
            check=False,
        )
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env, check=False).returncode)
    for found in measure():
        if options.json:
            print(json.dumps(found))
        else:
            print(f"{found['name']:15} {found['value']:7.3f} ms  {found['params']}  due {DUE[found['name']]}")
    for found in in_engine(options.engine_python) if options.engine_python else ():
        if options.json:
            print(json.dumps(found))
        elif found["name"] == "decode.stall":
            told = f"{found['value']:7.1f} ms, median {found['median']:.1f}  {found['params']}  due {STALL_DUE}"
            print(f"{found['name']:15} {told}")
        else:
            times, due = found["ratios"]["recompute"], TTFT_DUE[found["params"]["tier"]]
            print(f"{found['name']:15} {found['value']:7.1f} ms  {found['params']}  {times:.1f}x computing, due {due}x")


if __name__ == "__main__":
    main()
