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
from tests.mutants.running import ROOT
from tests.mutants.session import Session

LAW = (
    "kvstore/*.py",
    "kvstore/entries/*.py",
    "kvstore/metadata/*.py",
    "kvstore/residency/*.py",
    "kvstore/shm/*.py",
    "kvstore/codecs/*.py",
    "kvstore/disk/*.py",
    "kvstore/tiers/*.py",
    "kvstore/policies/*.py",
    "daemon/kvstored/doors/lease_connection.py",
    "daemon/kvstored/calls/gets.py",
    "daemon/kvstored/calls/puts.py",
    "daemon/kvstored/doors/cache_service.py",
    "daemon/kvstored/calls/budget.py",
    "daemon/kvstored/access/tenant_view.py",
    "daemon/kvstored/access/interceptor.py",
    "daemon/kvstored/calls/shared_memory_reply.py",
    "daemon/kvstored/calls/encoded_reply.py",
    "daemon/kvstored/calls/verbs.py",
    "daemon/kvstored/access/tokens.py",
    "client/kvstored_client/wire/messages.py",
    "client/kvstored_client/decoding.py",
    "client/kvstored_client/stream/transport.py",
    "client/kvstored_client/shm/pool.py",
    "client/kvstored_client/shm/calls.py",
    "client/kvstored_client/shm/mapping.py",
    "client/kvstored_client/stream/receiver.py",
    "client/kvstored_client/wire/frames.py",
)
NOT_LAW = ("kvstore/simulation/simulator.py", "kvstore/simulation/trace.py", "kvstore/stats.py", "kvstore/__init__.py")
"""They answer no get: forecasts, recordings, counters."""
TESTS = ("tests/kvstore", "tests/contract", "tests/kvstored_client", "tests/fuzz", "tests/crash", "tests/kvstored")
DOORS = {
    "daemon/kvstored/doors/lease_connection.py": (
        "tests/kvstored/doors/test_lease.py",
        "tests/kvstored/doors/test_killed_clients.py",
    ),
    "daemon/kvstored/calls/shared_memory_reply.py": ("tests/kvstored/doors/test_lease.py",),
    "daemon/kvstored/calls/encoded_reply.py": ("tests/contract/test_packed.py", "tests/kvstored/doors/test_lease.py"),
    "daemon/kvstored/calls/gets.py": ("tests/kvstored/doors/test_bad_input.py", "tests/kvstored/doors/test_lease.py"),
    "daemon/kvstored/doors/cache_service.py": (
        "tests/kvstored/doors/test_bad_input.py",
        "tests/kvstored/test_server.py",
    ),
    "daemon/kvstored/calls/budget.py": ("tests/kvstored/doors/test_abuse.py",),
    "daemon/kvstored/access/tenant_view.py": (
        "tests/kvstored/access/test_access.py",
        "tests/kvstored/access/test_tenant_view.py",
    ),
    "daemon/kvstored/access/interceptor.py": ("tests/kvstored/access/test_access.py",),
    "kvstore/shm/arena.py": ("tests/kvstored/doors/test_lease.py",),
    "kvstore/shm/layout.py": ("tests/kvstored/doors/test_lease.py",),
}
"""Files whose lines run in a daemon's own process, and the tests that talk to one: after those that were measured."""
BASELINE_MAX_S = 6.0
"""Of the tests against one change, as measured: the fastest that execute the line."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a change. tests: how many ran at most."""

    mutant: Mutant
    outcome: str
    tests: int


def main() -> int:
    """Returns 0: this command reports. MUTANTS.md says which survivors may be."""
    options = _options()
    files = options.file or _law_files()
    chosen = [m for file in files for m in mutants_of(file, (ROOT / file).read_bytes())]
    if options.line:
        chosen = [m for m in chosen if m.line in options.line]
    if options.each:
        chosen = _some_of_each(chosen, options.each, options.seed)
    elif options.count and options.count < len(chosen):
        chosen = sorted(random.Random(options.seed).sample(chosen, options.count), key=lambda m: (m.file, m.at))
    if options.list:
        click.echo("\n".join([*(m.name for m in chosen), f"{len(chosen)} changes"]))
        return 0
    running.warm()
    measured = ROOT / ".mutants" / "lines.json"
    if options.measure or not measured.exists():
        _measure(measured, options.tests or TESTS)
    lines = Lines(measured)
    results: list[Result] = []

    def work(session: Session) -> None:
        for result in _results(chosen, lines, session, options.jobs):
            results.append(result)
            _show(results, len(chosen))
            if options.json:
                _save(results, Path(options.json))

    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(measured.parent / "hypothesis")
    running.run_pytest(["-qq", "-s", "-p", "no:cacheprovider", "--no-summary", *lines.files()], [Session(work)])
    _sum_up(results)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--file", action="append", help="a source file, from the root of the work tree; again for more")
    parser.add_argument("--line", action="append", type=int, help="only changes of this line")
    parser.add_argument("--count", type=int, default=300, help="how many changes, chosen by --seed; 0: all")
    parser.add_argument("--each", type=int, help="at most so many changes of each file, instead of --count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--json", help="write the results here, while it runs, too")
    parser.add_argument("--list", action="store_true", help="only say which changes there are")
    parser.add_argument("--measure", action="store_true", help="measure again which test executes which line")
    parser.add_argument("--tests", action="append", help="tests to measure, by default those of engine and doors")
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


def _results(mutants: list[Mutant], lines: Lines, session: Session, jobs: int) -> Iterator[Result]:
    """Run changes, several at once; results as they come."""
    at_work: list[tuple[Mutant, list[list[str]], int, running.Run]] = []
    waiting = iter(mutants)
    more = True

    def begin(mutant: Mutant, steps: list[list[str]], before: int) -> None:
        source, tests = (ROOT / mutant.file).read_bytes(), steps[0]
        in_session = session.has(mutant) and all("::" in test for test in tests)
        seconds = lines.seconds([t for t in tests if "::" in t]) + 30 * sum("::" not in t for t in tests)
        run = (session.start if in_session else running.start)(tests, mutant, source, seconds)
        at_work.append((mutant, steps[1:], before + len(tests), run))

    while more or at_work:
        while more and len(at_work) < jobs:
            mutant = next(waiting, None)
            if mutant is None:
                more = False
            elif steps := _steps_for(mutant, lines):
                begin(mutant, steps, 0)
            else:
                yield Result(mutant, "no test", 0)
        for item in list(at_work):
            outcome = item[3].ended()
            if outcome is None:
                continue
            at_work.remove(item)
            if outcome == "survived" and item[1]:
                begin(item[0], item[1], item[2])
            else:
                yield Result(item[0], outcome, item[2])
        time.sleep(0.02)


def _steps_for(mutant: Mutant, lines: Lines) -> list[list[str]]:
    """The measured tests that execute the line; then, for what they leave alive, the files that talk to a daemon."""
    height = mutant.before.count("\n") + 1
    found = lines.tests_of(mutant.file, range(mutant.line, mutant.line + height), outside=mutant.outside)
    chosen: list[str] = []
    for test in found:
        if chosen and lines.seconds([*chosen, test]) > BASELINE_MAX_S:
            break
        chosen.append(test)
    files = [file for file in DOORS.get(mutant.file, ()) if (ROOT / file).exists()]
    return [step for step in (chosen, files) if step]


def _show(results: list[Result], total: int) -> None:
    last, count = results[-1], Counter(result.outcome for result in results)
    if last.outcome not in ("killed", "hung"):
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
    rows = [{"mutant": r.mutant.name, "outcome": r.outcome, "tests": r.tests} for r in results]
    target.write_text(json.dumps(rows, indent=1))


def _sum_up(results: list[Result]) -> None:
    count = Counter(result.outcome for result in results)
    caught = count["killed"] + count["hung"]
    click.echo(f"{len(results)} changes, {caught} noticed ({count['hung']} by hanging), {len(results) - caught} not")


if __name__ == "__main__":
    sys.exit(main())
