"""Which test executes which line: measured once, so that a change meets only the tests that could notice it.

A plugin of pytest. A line outside of all functions, which runs when its module is imported, belongs to every test that
executes anything of that file. What a daemon executes counts for the test that runs meanwhile.
"""

import json
import mmap
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import running, tracer

BUSY_S = 0.05
"""How long a daemon may take to come to the lines of a test that has ended: those count for the next one."""


class Recorder:
    """Traces the files under `root` whose names are in `files`, test by test; writes JSON at the end."""

    def __init__(self, root: Path, files: list[str], target: Path) -> None:
        self._tracer = tracer.Tracer({str(root / file): file for file in files})
        self._target = target
        self._tests: dict[str, dict[str, Any]] = {}
        self._bad: set[str] = set()
        self._directory = running.temporary()
        reports, turn = self._directory / "reports", self._directory / "turn"
        reports.touch()
        turn.write_bytes(b"\0")
        self._reports = reports.open(encoding="utf-8")
        with turn.open("r+b") as file:
            self._turn = mmap.mmap(file.fileno(), 1)
        call = f"Reporter({self._tracer.names!r}, {str(reports)!r}, {str(turn)!r}).start()"
        running.preface(self._directory / "path", tracer, call)

    def _taken(self) -> dict[str, list[int]]:
        lines: defaultdict[str, set[int]] = defaultdict(set)
        for code, seen in self._tracer.seen.copy().items():
            lines[self._tracer.names[code.co_filename]] |= seen
        for report in self._reports:
            file, _, line = report.rstrip().partition("\t")
            lines[file].add(int(line))
        return {file: sorted(found) for file, found in lines.items() if found}

    def pytest_collection_finish(self) -> None:
        """Everything is imported: that need not be traced."""
        running.put_first(self._directory / "path")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One test with its fixtures."""
        self._turn[0] = (self._turn[0] + 1) % 256
        self._tracer.seen.clear()
        self._tracer.start()  # again: a test may trace for itself
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            seconds = time.perf_counter() - began
            sys.settrace(None)
            time.sleep(BUSY_S)
            self._tests[item.nodeid] = {"s": seconds, "lines": self._taken()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails or is skipped as things are says nothing about a change."""
        if not report.passed:
            self._bad.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write, beside what was measured before; what was measured anew counts."""
        before = json.loads(self._target.read_text())["tests"] if self._target.exists() else {}
        found = before | self._tests
        good = {name: found[name] for name in found if name not in self._bad}
        self._target.write_text(json.dumps({"tests": good}))


class Lines:
    """What was measured."""

    def __init__(self, measured: Path) -> None:
        self._tests: dict[str, dict[str, Any]] = json.loads(measured.read_text())["tests"]
        self._index()

    def _index(self) -> None:
        self._by_line: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        self._by_file: defaultdict[str, set[str]] = defaultdict(set)
        for name, found in self._tests.items():
            for file, lines in found["lines"].items():
                self._by_file[file].add(name)
                for line in lines:
                    self._by_line[file, line].add(name)

    def leave_out(self, test: str) -> None:
        """Forget a test that fails when nothing is changed."""
        self._tests.pop(test, None)
        self._index()

    def tests_of(self, file: str, lines: range, *, outside: bool) -> list[str]:
        """The tests that execute one of these lines, the fastest first. outside: the lines are in no function."""
        found = self._by_file[file] if outside else {name for line in lines for name in self._by_line[file, line]}
        return sorted(found, key=lambda name: (self._tests[name]["s"], name))

    def files(self) -> list[str]:
        """The files of all tests."""
        return sorted({name.partition("::")[0] for name in self._tests})

    def seconds(self, tests: list[str]) -> float:
        """How long they took."""
        return sum(float(self._tests[name]["s"]) for name in tests)
