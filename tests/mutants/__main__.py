"""Break the program on purpose, one small change at a time: a test must notice. Measures lines first, once."""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tests.mutants import running
from tests.mutants.lines import Lines, Recorder
from tests.mutants.mutations import Mutant, mutants_of
from tests.mutants.prepared import prepared
from tests.mutants.running import ROOT
from tests.mutants.session import Session

LAW = (
    "kvstore/*.py",
    "kvstore/entries/*.py",
    "kvstore/metadata/*.py",
    "kvstore/residency/*.py",
    "kvstore/shm/*.py",
    "kvstore/codecs/*.py",
    "kvstore/kernels/*.py",
    "kvstore/disk/*.py",
    "kvstore/tiers/*.py",
    "kvstore/policies/*.py",
    "daemon/kvstored/doors/*.py",
    "daemon/kvstored/calls/*.py",
    "daemon/kvstored/access/*.py",
    "client/kvstored_client/*.py",
    "client/kvstored_client/wire/*.py",
    "client/kvstored_client/stream/*.py",
    "client/kvstored_client/shm/*.py",
)
NOT_LAW = (
    "kvstore/stats.py", "kvstore/__init__.py", "kvstore/kernels/cuda.py", "kvstore/kernels/cuda_kv.py",
    "kvstore/kernels/cuda_learned.py",
)  # fmt: skip
"""Counters; names; and what needs a graphics card."""
TESTS = ("tests/kvstore", "tests/contract", "tests/kvstored_client", "tests/fuzz", "tests/crash", "tests/kvstored")
NOTICED = ("killed", "hung")
SECONDS_MAX = 6.0
"""Of the tests against one change: the fastest that execute the line."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a change. tests: how many ran at most. by: the one that noticed, where known."""

    mutant: Mutant
    outcome: str
    tests: int
    by: str = ""


def main() -> int:
    """Returns 0: this command reports. MUTANTS.md says which survivors may be."""
    options = _options()
    chosen = _chosen(options)
    if options.list:
        click.echo("\n".join([*(m.name for m in chosen), f"{len(chosen)} changes"]))
        return 0
    running.warm()
    directory = ROOT / ".mutants"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(directory / "hypothesis")
    measured = directory / "lines.json"
    if options.measure or not measured.exists():
        _measure(measured, options.tests or TESTS)
    lines = Lines(measured)
    results: list[Result] = []

    def work(session: Session) -> None:
        for result in _results(chosen, lines, session, options):
            results.append(result)
            _show(results, len(chosen))
            if options.json:
                _save(results, Path(options.json))

    running.run_pytest(["-qq", "-s", "-p", "no:cacheprovider", "--no-summary", *lines.files()], [Session(work)])
    _sum_up(results)
    return 0


def _chosen(options: argparse.Namespace) -> list[Mutant]:
    if options.prepared:
        return prepared(ROOT)
    files = options.file or _law_files()
    chosen = [m for file in files for m in mutants_of(file, (ROOT / file).read_bytes())]
    if options.line:
        chosen = [m for m in chosen if m.line in options.line]
    if options.inside:
        chosen = [m for m in chosen if not m.outside]
    if options.each:
        chosen = _some_of_each(chosen, options.each, options.seed)
    elif options.count and options.count < len(chosen):
        chosen = sorted(random.Random(options.seed).sample(chosen, options.count), key=lambda m: (m.file, m.at))
    if options.again:
        noticed = {row["mutant"] for row in json.loads(Path(options.again).read_text()) if row["outcome"] in NOTICED}
        chosen = [m for m in chosen if m.name not in noticed]
    return chosen


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--file", action="append", help="a source file, from the root of the work tree; again for more")
    parser.add_argument("--line", action="append", type=int, help="only changes of this line")
    parser.add_argument("--count", type=int, default=300, help="how many changes, chosen by --seed; 0: all")
    parser.add_argument("--each", type=int, help="at most so many changes of each file, instead of --count")
    parser.add_argument("--inside", action="store_true", help="only inside functions: made in forks, at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prepared", action="store_true", help="those of prepared.py, which all must be noticed")
    parser.add_argument("--again", help="only changes that were not noticed in this --json file of another run")
    parser.add_argument("--seconds", type=float, default=SECONDS_MAX, help="how long the tests of one change may take")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--json", help="write the results here, while it runs, too")
    parser.add_argument("--list", action="store_true", help="only say which changes there are")
    parser.add_argument("--measure", action="store_true", help="measure again which test executes which line")
    parser.add_argument("--tests", action="append", help="what to measure, beside what is measured; by default, all")
    return parser.parse_args()


def _law_files() -> list[str]:
    found = {str(path.relative_to(ROOT)) for pattern in LAW for path in ROOT.glob(pattern)}
    return sorted(found.difference(NOT_LAW))


def _some_of_each(mutants: list[Mutant], most: int, seed: int) -> list[Mutant]:
    """The same number of changes of every file: a long one does not crowd out the others."""
    files: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        files.setdefault(mutant.file, []).append(mutant)
    chosen: list[Mutant] = []
    for file, found in files.items():
        some = random.Random(f"{seed} {file}").sample(found, min(most, len(found)))
        chosen += sorted(some, key=lambda m: m.at)
    return chosen


def _measure(target: Path, tests: tuple[str, ...] | list[str]) -> None:
    target.parent.mkdir(exist_ok=True)
    click.echo(f"measuring which test executes which line, log in {target.parent}/measure.log", err=True)

    def work() -> int:
        arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not model", "--timeout=600", *tests]
        return running.run_pytest(arguments, [Recorder(ROOT, _law_files(), target)])

    running.forked(work, target.parent / "measure.log")
    if not target.exists():
        sys.exit("measuring failed")


def _results(mutants: list[Mutant], lines: Lines, session: Session, options: argparse.Namespace) -> Iterator[Result]:
    """Run changes, several at once; results as they come."""
    at_work: list[tuple[Mutant, list[str], running.Run]] = []
    waiting = list(reversed(mutants))
    while waiting or at_work:
        while waiting and len(at_work) < options.jobs:
            mutant = waiting.pop()
            if tests := _tests_for(mutant, lines, options.seconds):
                start = session.start if session.has(mutant) else running.start
                source = (ROOT / mutant.file).read_bytes()
                at_work.append((mutant, tests, start(tests, mutant, source, lines.seconds(tests))))
            else:
                yield Result(mutant, "no test", 0)
        for item in list(at_work):
            mutant, tests, run = item
            outcome = run.ended()
            if outcome is None:
                continue
            at_work.remove(item)
            if outcome == "killed" and run.by and not session.passes_unchanged(run.by):
                click.echo(f"left out, for it fails when nothing is changed: {run.by}", err=True)
                lines.leave_out(run.by)
                waiting.append(mutant)
            else:
                yield Result(mutant, outcome, len(tests), run.by)
        time.sleep(0.01)


def _tests_for(mutant: Mutant, lines: Lines, most: float) -> list[str]:
    """The tests that execute the line, the fastest first, as many as there is time for; one at least."""
    height = mutant.before.count("\n") + 1
    chosen: list[str] = []
    for test in lines.tests_of(mutant.file, range(mutant.line, mutant.line + height), outside=mutant.outside):
        if chosen and lines.seconds([*chosen, test]) > most:
            break
        chosen.append(test)
    return chosen


def _show(results: list[Result], total: int) -> None:
    last, count = results[-1], Counter(result.outcome for result in results)
    if last.outcome not in NOTICED:
        click.echo(f"{last.outcome.upper():9}{last.mutant.name}  [{last.tests} tests]")
    if sys.stderr.isatty():
        width = max(10, shutil.get_terminal_size().columns - 50)
        done = width * len(results) // total
        bar = f"[{'#' * done}{'.' * (width - done)}] {len(results)}/{total} " + " ".join(
            f"{name} {n}" for name, n in sorted(count.items())
        )
        click.echo("\r" + bar, nl=len(results) == total, err=True)
    elif len(results) % 25 == 0:
        click.echo(f"{len(results)}/{total} {dict(count)}", err=True)


def _save(results: list[Result], target: Path) -> None:
    rows = [{"mutant": r.mutant.name, "outcome": r.outcome, "tests": r.tests, "by": r.by} for r in results]
    target.write_text(json.dumps(rows, indent=1))


def _sum_up(results: list[Result]) -> None:
    count = Counter(result.outcome for result in results)
    caught = sum(count[outcome] for outcome in NOTICED)
    click.echo(f"{len(results)} changes, {caught} noticed ({count['hung']} by hanging), {len(results) - caught} not")


if __name__ == "__main__":
    sys.exit(main())
