"""One engine process: by how much a request that decodes is late because another one's prefix is loaded meanwhile.

vllm_stall.py MODEL PROMPT_IDS_JSON CONNECTOR_JSON ROUNDS

Late: the time of all steps from when the other request comes until its first token, less as many steps that only
decode. `load`: the other one's prefix comes from the store. `own`: it is in the engine's own cache, so the engine
computes as much, and nothing is loaded. The difference is what the load costs whoever decodes, all its tokens together,
and so at least its longest wait for one. Of each the least of all rounds: other work of the machine only adds to it;
the medians are told as well. Prints one JSON line.
"""

import itertools
import json
import statistics
import sys
import time
from typing import Any

DECODED = 12
"""Tokens of the one that decodes before the other one comes; the last half of them is timed."""
MOST = 200


def met(engine: Any, ids: list[int], name: str) -> tuple[list[float], float, int, int]:
    """What two requests met: ms of steps that only decode; from the other one's coming to its first token: ms, and
    tokens of the one that decodes; tokens of the other one that were found.
    """
    from vllm import SamplingParams

    greedy = {"temperature": 0, "ignore_eos": True}
    engine.add_request(f"decodes {name}", {"prompt_token_ids": ids[-9:]}, SamplingParams(max_tokens=MOST, **greedy))
    steps = [time.perf_counter()]
    while len(steps) <= DECODED:
        if engine.step():
            steps.append(time.perf_counter())
    engine.add_request(f"comes {name}", {"prompt_token_ids": ids}, SamplingParams(max_tokens=1, **greedy))
    decoded, found = 0, -1
    while found < 0:
        for out in engine.step():
            if out.request_id.startswith("decodes"):
                decoded = len(out.outputs[0].token_ids)
            elif out.finished:
                found = out.num_cached_tokens
    spent = time.perf_counter() - steps[-1]
    engine.abort_request([f"decodes {name}"])
    while engine.has_unfinished_requests():
        engine.step()
    alone = [1e3 * (after - before) for before, after in itertools.pairwise(steps[DECODED // 2 :])]
    return alone, 1e3 * spent, decoded - DECODED, found


def main() -> None:
    """Run it."""
    from vllm import LLM, SamplingParams

    model, ids, connector = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
        enable_prefix_caching=True, kv_transfer_config=connector,
    )  # fmt: skip
    engine = llm.llm_engine
    llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1), use_tqdm=False)
    time.sleep(2)  # the writer's
    alone = list[float]()
    rounds: dict[str, list[tuple[float, int]]] = {"load": [], "own": []}
    cached = {}
    for at in range(int(sys.argv[4]) + 1):
        for kind, found in rounds.items():
            if kind == "load":
                assert llm.reset_prefix_cache()
            ones, ms, decoded, cached[kind] = met(engine, ids, f"{kind} {at}")
            if at:  # the first of each makes what a process makes once
                alone += ones
                found.append((ms, decoded))
    of_one = statistics.median(alone)
    late = {kind: sorted(ms - decoded * of_one for ms, decoded in found) for kind, found in rounds.items()}
    told = {
        "stall_ms": late["load"][0] - late["own"][0], "cached": cached["load"], "step_ms": of_one,
        "median_stall_ms": statistics.median(late["load"]) - statistics.median(late["own"]), "late_ms": late,
    }  # fmt: skip
    print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
