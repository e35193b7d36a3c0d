"""vLLM itself with a model of two cache groups, full attention and sliding windows: the same logits with the store.

    tools/engines/vllm_windows.py --engine-python PYTHON

A small random Gemma 3 (its weights are drawn here). vLLM keeps groups apart on GPUs alone; on a CPU it is told that it
can. base: no connector. store: the first with it, then from the store. load: a new process, whose steps are cut
otherwise. lose: what is found is gone at the load, and the request is computed. Exit code 1: other log probabilities
than base's, nothing loaded, or nothing lost. Run by `make engines`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS, WINDOW, BLOCK, CHUNK = 1024, 1000, 128, 32, 64
STEPS = {"base": 512, "store": 512, "load": 200, "lose": 512}
"""Tokens a step at most: the window lets go of blocks at other places."""
CLOSE = 1e-3


def model(home: Path) -> None:
    """Write the model."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=4096,
    )  # fmt: skip
    made = Gemma3ForCausalLM(config)
    for weights in made.parameters():
        if weights.dim() > 1:
            weights.data.normal_(0, 0.08)
    made.save_pretrained(home)


def engine() -> None:
    """One engine process: MODEL CONNECTOR_JSON STEP. Prints what each of two runs of the prompt gives."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    type(current_platform).support_hybrid_kv_cache = classmethod(lambda _: True)
    connector = json.loads(sys.argv[2])
    llm = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=2048, skip_tokenizer_init=True,
        max_num_batched_tokens=int(sys.argv[3]), block_size=BLOCK, enable_prefix_caching=True,
        **({} if connector is None else {"kv_transfer_config": connector}),
    )  # fmt: skip
    rng = random.Random(1)  # noqa: S311 - a prompt
    ids = [rng.randrange(VOCABULARY) for _ in range(TOKENS)]
    found = []
    for _ in range(2):
        assert llm.reset_prefix_cache()
        asked = SamplingParams(temperature=0, max_tokens=8, logprobs=4, detokenize=False)
        (out,) = llm.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)
        tokens = [{str(token): each.logprob for token, each in step.items()} for step in out.outputs[0].logprobs]
        found.append({"cached": out.num_cached_tokens, "logprobs": tokens})
        time.sleep(1)  # the writer's
    print("RESULT " + json.dumps(found), flush=True)


def run_case(python: str, case: str, home: Path, address: str) -> list[dict[str, Any]]:
    """One engine process. Exits with its log where it fails."""
    module, kind = "kvstored_client.integrations.vllm", "KvstoredConnector"
    if case == "lose":
        module, kind = "tools.engines.vllm_lossy", "LossyConnector"
    settings = {"address": address, "chunk_tokens": CHUNK, "lookup_timeout_s": 5.0, "fetch_timeout_s": 10.0}
    connector = {
        "kv_connector": kind, "kv_connector_module_path": module, "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": settings,
    }  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client"))), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [
        python, __file__, str(home), json.dumps(None if case == "base" else connector), str(STEPS[case]),
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False, cwd=ROOT)
    line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
    if line is None or "kv cache group sizes (32, 32)" not in done.stdout + done.stderr:
        raise SystemExit(f"{case}: no result, or not two groups\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    found: list[dict[str, Any]] = json.loads(line[7:])
    if case == "lose" and "lost " not in done.stdout + done.stderr:
        raise SystemExit("lose: nothing was asked for that could be lost")
    return found


def farthest(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest difference of log probabilities; infinite where the tokens differ."""
    if [max(step, key=step.__getitem__) for step in one] != [max(step, key=step.__getitem__) for step in other]:
        return float("inf")
    return max(abs(a[token] - b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys())


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine-python", required=True)
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(prefix="kvw-") as top:
        home, address = Path(top, "model"), f"unix:{top}/k.sock"
        model(home)
        serve = [sys.executable, "-m", "kvstored", "serve", "--address", address, "--data-dir", f"{top}/data"]
        path = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))
        daemon = subprocess.Popen(serve, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT)
        while not Path(top, "k.sock").exists() and daemon.poll() is None:
            time.sleep(0.1)
        try:
            base: list[dict[str, float]] = []
            for case in STEPS:
                runs = run_case(options.engine_python, case, home, address)
                base = base or runs[0]["logprobs"]
                far = max(farthest(base, run["logprobs"]) for run in runs)
                cached = [run["cached"] for run in runs]
                wanted = {"store": cached[0] == 0 < cached[1], "load": min(cached) > 0}.get(case, max(cached) == 0)
                good &= far <= CLOSE and wanted
                print(f"{case:6} tokens from the store {cached}, farthest log probability {far:.1e}", flush=True)
        finally:
            daemon.kill()
            daemon.wait()
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("--"):
        engine()
    else:
        sys.exit(main())
