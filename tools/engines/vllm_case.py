"""One engine process of run_vllm.py: answer a prompt, print tokens, cached tokens and seconds as one JSON line.

vllm_case.py MODEL PROMPT_IDS_JSON CONNECTOR_JSON RUNS ("null": no connector)

The seconds are the median of so many runs, the engine's own prefix cache emptied before each.
"""

import json
import statistics
import sys
import time


def main() -> None:
    """Run it."""
    from vllm import LLM, SamplingParams

    model, ids, connector = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    options = {} if connector is None else {"kv_transfer_config": connector}
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
        enable_prefix_caching=True, **options,
    )  # fmt: skip
    llm.generate({"prompt_token_ids": ids[-8:]}, SamplingParams(max_tokens=1), use_tqdm=False)
    seconds = []
    for _ in range(int(sys.argv[4])):
        assert llm.reset_prefix_cache()
        start = time.perf_counter()
        (out,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    (rest,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    time.sleep(1)  # the writer's
    found = {
        "tokens": list(rest.outputs[0].token_ids), "first": list(out.outputs[0].token_ids),
        "cached": out.num_cached_tokens, "ttft_s": statistics.median(seconds),
    }  # fmt: skip
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
