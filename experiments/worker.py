"""One worker: `python -m experiments.worker JOB` (JSON).

Role "put" makes and stores, "judge" restores and judges, "time" restores and takes times, "get" does both.

It prints one JSON object a line: {"begin": NAME}, then {"found": NAME, ...} or {"failed": NAME, "why": ...}; and
{"fatal": WHY} where the model or the text is no good. A strategy that raises leaves the others alone; one that kills
the process does too, since `run` starts another with those that are left.
"""

import gc
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from experiments import ExperimentFailed, Step, Strategy, Tensors, Units
from experiments.attention import Baseline, NoContext
from experiments.catalogue import named
from experiments.lab import Lab, digest, load_model, quality
from experiments.needles import answered, hidden
from kvstore.hit import Fidelity
from kvstored_client import Client

DECODED_TOKENS = 6
"""Tokens whose time is compared with the baseline's, in turns, after one to warm up."""
TIMEOUT_S = 120.0
KILL = "EXPERIMENTS_KILL"
"""For tests: ROLE:NAME, the strategy in whose middle the worker kills itself, as the kernel does when memory is out."""
Document = Literal["text", "needles"]
Role = Literal["put", "get", "judge", "time"]


@dataclass(frozen=True)
class Job:
    """What a worker does. threads: of torch, for what must be the same in both roles. strategies: names, in order."""

    role: Role
    address: str
    model: str
    text: str
    prefix: int
    continuation: int
    threads: int
    strategies: tuple[str, ...]


class Bench:
    """The documents of one process, for models that read tokens and for those that read bytes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._text = Path(job.text).read_text(errors="replace")
        self.model, self.tokenizer = load_model(Path(job.model))
        self._labs: dict[tuple[Units, Document], Lab] = {}

    def lab(self, units: Units, document: Document = "text") -> Lab:
        """One document, in the units that a strategy's model reads."""
        found = self._labs.get((units, document))
        if found is None:
            found = self._labs[units, document] = self._made(units, document)
        return found

    def _encode(self, units: Units, text: str) -> list[int]:
        return list(text.encode()) if units == "bytes" else list(self.tokenizer(text)["input_ids"])

    def _made(self, units: Units, document: Document) -> Lab:
        prefix, continuation = self._job.prefix, self._job.continuation
        ids = self._encode(units, self._text)
        if len(ids) < prefix + continuation:
            raise ExperimentFailed(f"{self._job.text} has {len(ids)} {units}, {prefix + continuation} are needed")
        head, rest = ids[:prefix], ids[prefix : prefix + continuation]
        try:
            needled, questions = hidden(lambda text: self._encode(units, text), head, prefix)
        except ValueError as error:
            raise ExperimentFailed(f"no questions can be asked: {error}") from None
        if document == "needles":
            head = needled
        return Lab(self.model, self.tokenizer, torch.tensor([head]), torch.tensor([rest]), questions)

    @contextmanager
    def few_threads(self) -> Iterator[None]:
        """For a block, torch has the job's threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._job.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @cached_property
    def exact(self) -> torch.Tensor:
        """Logits of the continuation after a prefill of this process, which no store has seen."""
        return self.baseline()(self.lab("tokens").rest)

    @cached_property
    def nothing_kl(self) -> float:
        """KL of continuing without any context."""
        lab = self.lab("tokens")
        return quality(self.exact, NoContext().resume(lab, {})(lab.rest), lab.rest).kl

    def baseline(self) -> Step:
        """The model after the whole prefix."""
        return Baseline().resume(self.lab("tokens"), Baseline().state(self.lab("tokens")))

    @cached_property
    def prefill_s(self) -> float:
        """Seconds that the prefix takes to compute: the better of two."""
        lab = self.lab("tokens")
        return min(timed(lambda: lab.prefill(lab.ids))[1] for _ in range(2))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def key_of(strategy: Strategy, document: Document) -> bytes:
    """The state's key in the daemon."""
    return hashlib.sha256(f"experiments/{strategy.name}/{document}".encode()).digest()


def put(bench: Bench, client: Client, strategy: Strategy) -> dict[str, Any]:
    """Make and store both documents' states, and continue the text from the one that was never stored."""
    lab = bench.lab(strategy.units)
    with bench.few_threads():
        state = stored(bench, client, strategy, "text")
        logits = strategy.resume(lab, {name: x.clone() for name, x in state.items()})(lab.rest)
        stored(bench, client, strategy, "needles")
    return {"logits": digest(logits)}


def stored(bench: Bench, client: Client, strategy: Strategy, document: Document) -> Tensors:
    """One document's state, made and put. Raises RuntimeError where the daemon did not keep it."""
    state = strategy.state(bench.lab(strategy.units, document))
    fidelity: Fidelity = "exact" if strategy.policy is None else "auto"
    entries = [(key_of(strategy, document), state)]
    if state and client.put_many(entries, fidelity=fidelity, namespace=strategy.name) != 1:
        raise RuntimeError("the daemon did not store it")
    return state


def judge(bench: Bench, client: Client, strategy: Strategy) -> dict[str, Any]:
    """Restore both documents' states and judge them. Nothing is timed."""
    lab = bench.lab(strategy.units)
    own = strategy.units == "bytes"
    with bench.few_threads():
        exact = strategy.resume(lab, strategy.state(lab))(lab.rest) if own else bench.exact
        tensors, encoding = held(client, strategy, "text")
        logits = strategy.resume(lab, tensors)(lab.rest)
        judged = quality(exact, logits, lab.rest)
        return {
            **asdict(judged),
            "encoding": encoding,
            "bytes_per_token": held_nbytes(client, strategy) / lab.ids.shape[1],
            "logits": digest(logits),
            "worse_than_nothing": not own and judged.kl > bench.nothing_kl,
            "retrieval": retrieval(bench, client, strategy),
            "note": strategy.notes(lab),
        }


def held(client: Client, strategy: Strategy, document: Document) -> tuple[Tensors, str]:
    """A state out of the daemon, and how it was encoded. Raises RuntimeError where the daemon does not have it."""
    if isinstance(strategy, NoContext):
        return {}, "-"
    hit = client.get(key_of(strategy, document))
    if hit is None:
        raise RuntimeError("the daemon does not give it back after the restart")
    return hit.tensors, hit.encoding


def take_times(bench: Bench, client: Client, strategy: Strategy) -> dict[str, Any]:
    """Restore the text's state with all threads, alone."""
    lab = bench.lab(strategy.units)
    with bench.few_threads():
        tensors, _ = held(client, strategy, "text")
        # What a strategy computes once and keeps is as it was where the state was put.
        step = strategy.resume(lab, tensors)
    found = {"ms_per_token_over_baseline": slower(bench, step)}
    if isinstance(strategy, NoContext):
        return {**found, "restore_over_prefill": 0.0}
    restored_s = min(timed(lambda: strategy.resume(lab, held(client, strategy, "text")[0]))[1] for _ in range(2))
    whole_s = bench.prefill_s if strategy.units == "tokens" else timed(lambda: strategy.state(lab))[1]
    return {**found, "restore_over_prefill": restored_s / whole_s}


def held_nbytes(client: Client, strategy: Strategy) -> int:
    """Bytes of the text's state in the daemon. Raises RuntimeError where it does not have it."""
    if isinstance(strategy, NoContext):
        return 0
    info = client.inspect(key_of(strategy, "text"))
    if info is None:
        raise RuntimeError("the daemon does not have it after the restart")
    return info.tier_nbytes[0]


def slower(bench: Bench, step: Step) -> float:
    """Time of a token over the baseline's: medians of turns, since what else the machine does hits both alike."""
    baseline, token = bench.baseline(), torch.zeros((1, 1), dtype=torch.long)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(DECODED_TOKENS + 1):
        for kept, one in zip(times, (step, baseline), strict=True):
            _, took_s = timed(lambda one=one: one(token))  # type: ignore[misc]  # mypy cannot infer the default's type
            if turn:
                kept.append(took_s)
    return statistics.median(times[0]) / statistics.median(times[1])


def retrieval(bench: Bench, client: Client, strategy: Strategy) -> float:
    """Percent of the questions answered exactly, each from the restored state as it was."""
    lab = bench.lab(strategy.units, "needles")
    tensors, _ = held(client, strategy, "needles")
    right = sum(answered(strategy.resume(lab, tensors), question) for question in lab.questions)
    return 100 * right / len(lab.questions)


def run(job: Job) -> Iterator[dict[str, Any]]:
    """Every strategy's outcome, as it comes."""
    bench = Bench(job)
    roles: dict[Role, Callable[[Bench, Client, Strategy], dict[str, Any]]] = {
        "put": put,
        "judge": judge,
        "time": take_times,
        "get": lambda *given: judge(*given) | take_times(*given),
    }
    for units in {named(name).units for name in job.strategies}:
        bench.lab(units)  # a text that is too short ends the run before its first row
    with Client(job.address, timeout_s=TIMEOUT_S, on_error="raise") as client:
        for name in job.strategies:
            yield {"begin": name}
            if os.environ.get(KILL) == f"{job.role}:{name}":
                os.abort()
            try:
                yield {"found": name, **roles[job.role](bench, client, named(name))}
            except Exception as error:  # noqa: BLE001 - the boundary: one row fails, the others go on
                why = str(error).strip().splitlines() or ["no message"]
                yield {"failed": name, "why": f"{type(error).__name__}: {why[0]}"}
            gc.collect()


def main() -> None:
    """Do the job."""
    # Libraries print where they like: the answer has a stream of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    values = json.loads(sys.argv[1])
    job = Job(**{**values, "strategies": tuple(values["strategies"])})
    try:
        for line in run(job):
            print(json.dumps(line), file=answer, flush=True)
    except ExperimentFailed as error:
        print(json.dumps({"fatal": str(error)}), file=answer, flush=True)


if __name__ == "__main__":
    main()
