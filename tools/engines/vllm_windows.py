"""vLLM itself with a model of two cache groups, full attention and sliding windows: the same logits with the store.

    tools/engines/vllm_windows.py --engine-python PYTHON

A small random Gemma 3 (its weights are drawn here). vLLM keeps groups apart on GPUs alone; on a CPU it is told that it
can. base: no connector. store: the first with it, then from the store. load: a new process, whose steps are cut
otherwise. lose: what is found is gone at the load, and the request is computed. Exit code 1: other log probabilities
than base's, nothing loaded, or nothing lost. Run by `make engines`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from run_vllm import engine, serving, transfer

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


def one_engine() -> None:
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
    settings = {"chunk_tokens": CHUNK, "lookup_timeout_s": 5.0, "fetch_timeout_s": 10.0}
    connector = None if case == "base" else transfer(address, settings, lossy=case == "lose")
    found, log = engine(python, "vllm_windows.py", str(home), json.dumps(connector), str(STEPS[case]))
    if "kv cache group sizes (32, 32)" not in log:
        raise SystemExit(f"{case}: not two groups\n{log[-8000:]}")
    if case == "lose" and "lost " not in log:
        raise SystemExit("lose: nothing was asked for that could be lost")
    runs: list[dict[str, Any]] = found
    return runs


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
    with tempfile.TemporaryDirectory(prefix="kvw-") as top, serving() as (address, _):
        home = Path(top)
        model(home)
        base: list[dict[str, float]] = []
        for case in STEPS:
            runs = run_case(options.engine_python, case, home, address)
            base = base or runs[0]["logprobs"]
            far = max(farthest(base, run["logprobs"]) for run in runs)
            cached = [run["cached"] for run in runs]
            wanted = {"store": cached[0] == 0 < cached[1], "load": min(cached) > 0}.get(case, max(cached) == 0)
            good &= far <= CLOSE and wanted
            print(f"{case:6} tokens from the store {cached}, farthest log probability {far:.1e}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("--"):
        one_engine()
    else:
        sys.exit(main())
