"""The run: worker A puts every state, the daemon restarts, worker B restores and judges.

Strategies whose libraries want another path on PYTHONPATH have workers of their own; all speak to one daemon. Nothing
is timed while states are put and judged, so two workers share that; then one alone takes the times. A worker that dies
in the middle of a strategy costs that row: another worker goes on with the next. Not thread-safe.
"""

import importlib.util
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from experiments import ExperimentFailed, Found, Strategy
from experiments.catalogue import ENGINES
from experiments.daemon import child, daemon, environment
from experiments.smollm import cache_directory, default_model
from experiments.worker import Job, Role
from kvstore.config import CodecPolicy

ROW_S = 1200.0
"""One strategy in one role; a worker that takes longer is ended, and the row is a failure. The longest, a cartridge,
takes about 60 s of a core, and twenty times that where twenty others want it."""
SHARED_FROM = 12
"""Strategies from which on two workers share them: to start one takes as long as a few strategies."""
Tick = Callable[[str], None]
Outcome = tuple[str, dict[str, Any]]
"""A strategy's name and what its worker said, {"failed": why} among it."""


@dataclass(frozen=True)
class Plan:
    """What to run. model: a directory. text: a file. prefix, continuation: tokens. times: whether they are taken."""

    model: Path
    text: Path
    prefix: int
    continuation: int
    strategies: tuple[Strategy, ...]
    times: bool = True


TEXTS = (Path("/usr/share/common-licenses/GPL-3"), Path(str(pydoc_data.topics.__file__)))
"""What is read where no text is named: a licence on Debian, else Python's own manual."""


def checked_text(path: Path | None) -> Path:
    """The text to read. Raises ExperimentFailed for a file that is none."""
    if path is None:
        return next(text for text in TEXTS if text.is_file())
    try:
        with path.open("rb") as file:
            binary = b"\0" in file.read(4096)
    except OSError as error:
        raise ExperimentFailed(f"{path}: {error.strerror or error}") from None
    if binary:
        raise ExperimentFailed(f"{path} is not plain text: there are zero bytes in it")
    return path.resolve()


def checked_model(path: Path | None) -> Path:
    """The model's directory. Raises ExperimentFailed where there is none."""
    if path is None:
        return default_model()
    if not (path / "config.json").is_file():
        raise ExperimentFailed(f"{path} is no model: a directory with config.json, weights and tokenizer is wanted")
    return path.resolve()


def run(plan: Plan, tick: Tick) -> Iterator[Found]:
    """Every strategy's row, in the plan's order. tick: called after each strategy in each role, with its name.

    Raises ExperimentFailed where nothing can be run at all.
    """
    outcomes: dict[str, dict[str, Any]] = {s.name: {} for s in plan.strategies}
    with tempfile.TemporaryDirectory(prefix="kvx-") as top:
        home = Path(top)
        (home / "kvstored.toml").write_text(settings(plan.strategies))
        for roles in lives(plan):
            with daemon(home) as address:
                for role in roles:
                    for name, outcome in _all(plan, role, address, home / "workers.log", outcomes):
                        outcomes[name][role] = outcome
                        tick(name)
    for strategy in plan.strategies:
        yield found(strategy, outcomes[strategy.name])


def lives(plan: Plan) -> tuple[tuple[Role, ...], ...]:
    """The roles, by the daemon that serves them: one that is put to, and one that was started after it."""
    if not plan.times:
        return ("put",), ("judge",)
    return ("put",), (("judge", "time") if _lanes(plan.strategies) > 1 else ("get",))


def _lanes(strategies: Sequence[Strategy]) -> int:
    return 2 if len(os.sched_getaffinity(0)) > 1 and len(strategies) >= SHARED_FROM else 1


def found(strategy: Strategy, outcome: dict[str, Any]) -> Found:
    """A row from what the two workers said."""
    row = Found(strategy.row, strategy.name, strategy.category, strategy.kept)
    recorded = getattr(strategy, "recorded", None)
    if recorded is not None:
        from_record: Found = recorded(row)
        return from_record
    failed = next((half["failed"] for half in outcome.values() if "failed" in half), "")
    if failed:
        return replace(row, failed=failed)
    a = outcome["put"]
    b = dict(outcome["get"]) if "get" in outcome else outcome["judge"] | outcome.get("time", {})
    same = a["logits"] == b.pop("logits")
    if not same and strategy.policy is None:
        row = replace(row, failed="an exact state came back, and its logits are others than before it was stored")
    return replace(row, bit_equal=same, **b)


@dataclass
class Workers:
    """The worker processes of one role, which end together."""

    processes: "set[subprocess.Popen[str]]" = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, process: "subprocess.Popen[str]") -> None:
        """One that was just started; it is ended at once where the others were."""
        with self.lock:
            self.processes.add(process)
            if self.stopped:
                process.kill()

    def stop(self) -> None:
        """End all of them; no other is started."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.kill()


def _all(plan: Plan, role: Role, address: str, log: Path, outcomes: dict[str, dict[str, Any]]) -> Iterator[Outcome]:
    """All strategies in one role; those that failed before are passed by."""
    lanes = _lanes(plan.strategies)
    # The same in all roles: another number of threads adds up in another order, and a logit has another last bit.
    job = Job(
        role,
        address,
        str(plan.model),
        str(plan.text),
        plan.prefix,
        plan.continuation,
        len(os.sched_getaffinity(0)) // lanes,
        (),
    )
    workers, works = Workers(), list[Iterator[Outcome]]()
    for engine in ENGINES:
        names = [
            s.name
            for s in plan.strategies
            if s.engine == engine and not hasattr(s, "recorded")
            and not any("failed" in half for half in outcomes[s.name].values())
        ]  # fmt: skip
        try:
            env = environment(wheels(engine))
        except ExperimentFailed as error:
            yield from ((name, {"failed": str(error)}) for name in names)
            continue
        parts = 1 if role == "time" else lanes
        works += [work(job, names[i::parts], env, log, workers) for i in range(parts)]
    yield from together(works, workers, 1 if role == "time" else lanes)


def together(works: Sequence[Iterator[Outcome]], workers: Workers, at_once: int) -> Iterator[Outcome]:
    """The outcomes of several `work`s, so many at once, as they come. All workers have ended once this ends."""
    said: SimpleQueue[Outcome | BaseException | None] = SimpleQueue()

    def follow(outcomes: Iterator[Outcome]) -> None:
        try:
            for outcome in outcomes:
                said.put(outcome)
        except BaseException as error:  # noqa: BLE001 - raised where the outcomes are read
            said.put(error)
        said.put(None)

    with ThreadPoolExecutor(at_once) as threads:
        try:
            for outcomes in works:
                threads.submit(follow, outcomes)
            left = len(works)
            while left:
                heard = said.get()
                if isinstance(heard, BaseException):
                    raise heard
                if heard is None:
                    left -= 1
                else:
                    yield heard
        finally:
            workers.stop()


def work(job: Job, names: Sequence[str], env: dict[str, str], log: Path, workers: Workers) -> Iterator[Outcome]:
    """Each strategy's outcome, from as many worker processes as it takes, one after the other."""
    left = list(names)
    while left and not workers.stopped:
        began = ""
        for line in _lines(replace(job, strategies=tuple(left)), env, log, workers):
            if "fatal" in line:
                raise ExperimentFailed(line["fatal"])
            if "begin" in line:
                began = line["begin"]
            elif "end" in line:
                # Died before its first strategy: none of the others would fare better.
                dead = [began] if began in left else list(left) if not began else []
                for name in dead:
                    left.remove(name)
                    yield name, {"failed": line["end"]}
            else:
                name = line.pop("found", None) or line["failed"]
                left.remove(name)
                yield name, {"failed": line["why"]} if "why" in line else line


def _lines(job: Job, env: dict[str, str], log: Path, workers: Workers) -> Iterator[dict[str, Any]]:
    """What one worker says, line by line, and at last {"end": why} where it did not end well."""
    late, command = threading.Event(), [sys.executable, "-m", "experiments.worker", json.dumps(asdict(job))]
    with (
        log.open("a") as errors,
        child(command, signal.SIGKILL, stdout=subprocess.PIPE, stderr=errors, env=env, text=True) as process,
    ):
        workers.add(process)
        watch = _watch(process, late)
        try:
            for text in process.stdout or ():
                watch.cancel()
                watch = _watch(process, late)
                yield json.loads(text)
            code = process.wait()
        finally:
            watch.cancel()
        if code != 0:
            yield {"end": f"it took longer than {ROW_S:.0f} s" if late.is_set() else _why(code, log)}


def _watch(process: "subprocess.Popen[str]", late: threading.Event) -> threading.Timer:
    """Ends the process after ROW_S, unless cancelled."""

    def overdue() -> None:
        late.set()
        process.kill()

    watch = threading.Timer(ROW_S, overdue)
    watch.daemon = True  # an interrupt may come before anyone can cancel it: the run does not wait for it
    watch.start()
    return watch


def _why(code: int, log: Path) -> str:
    if code < 0:
        return f"the worker was ended by {signal.Signals(-code).name}"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the worker ended with exit code {code}: {said[-1] if said else 'it said nothing'}"


def wheels(engine: str) -> list[Path]:
    """The folders that an engine's workers need on the path. Raises ExperimentFailed where they are not there."""
    folders = [cache_directory() / "engines" / "side" / folder for folder in ENGINES[engine]]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing and importlib.util.find_spec(engine) is None:
        raise ExperimentFailed(f"{engine} is not at {missing[0]}: run tools/engines/side.sh PYTHON in a checkout")
    return folders


def settings(strategies: Iterable[Strategy]) -> str:
    """The daemon's TOML: a namespace for each strategy that lets its state be encoded."""
    lines = [
        "[store]",
        "promote_after = 0  # what is measured is the disk",
        "[store.hot]",
        'capacity_nbytes = "1GiB"',
        "[store.warm]",
        'capacity_nbytes = "256MiB"',
        "[store.cold]",
        'capacity_nbytes = "16GiB"',
    ]
    for strategy in strategies:
        if strategy.policy is not None:
            lines += _table(f'store.warm.namespaces."{strategy.name}"', strategy.policy)
    return "\n".join(lines) + "\n"


def _table(name: str, policy: CodecPolicy) -> list[str]:
    lines = [f"[{name}]", f'codec = "{policy.codec}"', f"max_relative_error = {policy.max_relative_error}"]
    if policy.layers:
        lines.append(f"[{name}.layers]")
        lines += [f'"{at}" = {{ codec = "{one.codec}" }}' for at, one in policy.layers.items()]
    return lines
