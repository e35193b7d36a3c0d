"""An inference worker: a process of its own, with a model and a client of the daemon.

`python -m examples.worker ROLE JOB`: ROLE is `prefill` (run the prompt, keep its K and V in the store) or `restore`
(get them back from each tier and answer another question about the same document). JOB is a JSON object; what the
worker found out is one JSON object on standard output, what it is doing goes to standard error.
"""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.model import Model
from kvstore.prefix import Namespace
from kvstored_client import Client

QUESTION_A = "In one sentence, what is this document about?"
QUESTION_B = "Under which conditions may the work be redistributed?"
FIDELITIES = ("exact", "auto")
PREFILLS_MAX = 3
"""Seconds each, and they vary less than a restore's milliseconds."""


@dataclass(frozen=True)
class Job:
    """What both workers are told. document: a text file, of which the first `document_tokens` are used."""

    address: str
    model: str
    revision: str
    document: str
    document_tokens: int
    chunk_tokens: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work done several times."""

    best_s: float
    median_s: float
    times: int


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def timed(work: Callable[[], Any], times: int) -> tuple[Any, Timing]:
    """The last result of `work`, and how long each run took."""
    seconds = []
    result = None
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, Timing(min(seconds), statistics.median(seconds), times)


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.contiguous().numpy().tobytes())
    return sha.hexdigest()


def namespaces(client: Client, model: Model, job: Job) -> dict[str, Namespace]:
    """The same model twice: entries that stay exact, and entries the store may hold as NF4."""
    return {f: client.namespace(chunk_tokens=job.chunk_tokens, **model.identity(f)) for f in FIDELITIES}


def prefill(client: Client, model: Model, job: Job) -> dict[str, Any]:
    """Worker A: run the prompt once, put its K and V."""
    ids = model.prompt(Path(job.document).read_text(), job.document_tokens, QUESTION_A)
    say(f"worker A: prefilling {len(ids)} tokens")
    (k, v), took = timed(lambda: model.prefill(ids), 1)
    puts = {}
    for fidelity, namespace in namespaces(client, model, job).items():
        stored, put = timed(lambda ns=namespace: ns.put_prefix(ids, k, v), 1)  # type: ignore[misc]  # ns: bound now
        say(f"worker A: put {stored} chunks as {fidelity} in {put.best_s:.3f} s")
        puts[fidelity] = {"chunks": stored, "put_s": put.best_s}
    # Of each whole chunk's end, so that worker B can compare however many it gets.
    ends = range(job.chunk_tokens, len(ids) + 1, job.chunk_tokens)
    digests = {str(n): digest(k[:, :n], v[:, :n]) for n in ends}
    return {"tokens": len(ids), "prefill_s": took.best_s, "puts": puts, "digests": digests}


def restore(client: Client, model: Model, job: Job) -> dict[str, Any]:
    """Worker B: another question about the same document, from each tier in turn."""
    ids = model.prompt(Path(job.document).read_text(), job.document_tokens, QUESTION_B)
    say(f"worker B: answering {len(ids)} tokens without the store")
    expected = model.answer(ids, job.new_tokens)
    spaces = namespaces(client, model, job)
    # Never the last token: a cache of the whole prompt leaves the model nothing to run, and the answer comes out wrong.
    known = ids[:-1]
    n = spaces["exact"].get_prefix(known)[0]
    if n == 0:
        raise SystemExit("worker B: the store has nothing of this document")
    times = min(job.repeats, PREFILLS_MAX)
    say(f"worker B: prefilling the {n} tokens that the store has, {times} times")
    (k, v), took = timed(lambda: model.prefill(ids[:n]), times)
    rows = []
    for fidelity, tier in (("exact", "cold"), ("auto", "cold"), ("exact", "hot"), ("auto", "hot"), ("auto", "warm")):
        place(client, spaces[fidelity], ids[:n], tier, (k, v))
        rows.append(measure(client, model, job, spaces[fidelity], (ids, expected)) | {"asked_tier": tier})
    return {
        "prompt_tokens": len(ids),
        "tokens": n,
        "prefill": asdict(took),
        "answer": expected,
        "text": model.text(expected),
        "rows": rows,
    }


def place(
    client: Client, space: Namespace, ids: list[int], tier: str, values: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Bring a prefix to a tier with the operator's verbs."""
    keys = space.keys(ids)
    if tier == "hot":
        client.promote(*keys)
    if tier == "warm":
        # What is in cold already has no reason to be encoded once more: a warm copy comes from an entry put anew.
        client.delete(*keys)
        space.put_prefix(ids, *values)
        client.demote(*keys)


def measure(
    client: Client, model: Model, job: Job, space: Namespace, prompt: tuple[list[int], list[int]]
) -> dict[str, Any]:
    """Restore a prefix several times from where it is, then answer from it."""
    ids, expected = prompt
    fidelity = space.identity.fidelity

    def once() -> tuple[int, Any, torch.Tensor, torch.Tensor]:
        n, k, v = space.get_prefix(ids[:-1])
        return n, model.restored(k, v) if n else None, k, v

    (n, cache, k, v), took = timed(once, job.repeats)
    if n == 0:
        raise SystemExit(f"worker B: the {fidelity} prefix was lost")
    keys = space.keys(ids[:n])
    _, hits = space.get_prefix_hits(ids[:-1])
    held = [info for key in keys if (info := client.inspect(key)) is not None]
    row = {
        "fidelity": fidelity,
        "tiers": sorted({hit.tier for hit in hits}),
        "encodings": sorted({hit.encoding for hit in hits}),
        "lossy": any(hit.lossy for hit in hits),
        "tokens": n,
        "restore": asdict(took),
        "nbytes": sum(info.tier_nbytes[0] for info in held),
        "value_nbytes": sum(info.value_nbytes for info in held),
        "digest": digest(k, v),
    }
    start = time.perf_counter()
    answer = model.answer(ids, job.new_tokens, cache)
    row["answer_s"] = time.perf_counter() - start
    row["agreement"] = sum(a == b for a, b in zip(answer, expected, strict=False))
    row["equal"] = answer == expected
    say(f"worker B: {fidelity} from {'+'.join(row['tiers'])}: {took.median_s:.3f} s for {n} tokens")
    return row


def main() -> None:
    """Run one role."""
    role, text = sys.argv[1:]
    job = Job(**json.loads(text))
    model = Model(Path(job.model), job.revision)
    roles = {"prefill": prefill, "restore": restore}
    # raise: a demo that went on without its cache would measure nothing.
    with Client(job.address, timeout_s=60, on_error="raise") as client:
        print(json.dumps(roles[role](client, model, job)))


if __name__ == "__main__":
    main()
