"""Which test executes which line: measured once, so that a change meets only the tests that could notice it.

A plugin of pytest and a trace function. A line outside of all functions, which runs when its module is imported,
belongs to every test that executes anything of that file. What a test does in another process is not seen.
"""

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest


class Recorder:
    """Traces the files under `root` whose names are in `files`, test by test; writes JSON at the end."""

    def __init__(self, root: Path, files: list[str], target: Path) -> None:
        self._names: dict[str, str | None] = {str(root / file): file for file in files}
        self._target = target
        self._all: dict[CodeType, int] = {}
        self._seen: defaultdict[CodeType, set[int]] = defaultdict(set)
        self._tests: dict[str, dict[str, Any]] = {}

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        del event, arg
        code = frame.f_code
        if self._names.get(code.co_filename) is None:
            return None
        if code not in self._all:
            self._all[code] = len({line for _, _, line in code.co_lines() if line is not None})
        return None if len(self._seen[code]) >= self._all[code] else self._stepped

    def _stepped(self, frame: FrameType, event: str, arg: Any) -> Any:
        del arg
        if event == "line":
            self._seen[frame.f_code].add(frame.f_lineno)
        return self._stepped

    def _taken(self) -> dict[str, list[int]]:
        lines: defaultdict[str, set[int]] = defaultdict(set)
        for code, seen in self._seen.copy().items():
            lines[str(self._names[code.co_filename])] |= seen
        self._seen.clear()
        return {file: sorted(found) for file, found in lines.items()}

    def pytest_collection_finish(self) -> None:
        """Everything is imported: that need not be traced."""
        threading.settrace(self._called)
        sys.settrace(self._called)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One test with its fixtures."""
        self._seen.clear()
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            self._tests[item.nodeid] = {"s": time.perf_counter() - began, "lines": self._taken(), "passed": True}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails or is skipped as things are says nothing about a change."""
        if not report.passed and report.nodeid:
            self._tests.setdefault(report.nodeid, {})["bad"] = True

    def pytest_sessionfinish(self) -> None:
        """Write."""
        sys.settrace(None)
        good = {name: found for name, found in self._tests.items() if "lines" in found}
        self._target.write_text(json.dumps({"tests": good}))


class Lines:
    """What was measured."""

    def __init__(self, measured: Path) -> None:
        data = json.loads(measured.read_text())
        self._seconds: dict[str, float] = {name: found["s"] for name, found in data["tests"].items()}
        self._by_line: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        self._by_file: defaultdict[str, list[str]] = defaultdict(list)
        for name, found in data["tests"].items():
            for file, lines in found["lines"].items():
                self._by_file[file].append(name)
                for line in lines:
                    self._by_line[file, line].append(name)

    def tests_of(self, file: str, lines: range, *, outside: bool) -> list[str]:
        """The tests that execute one of these lines, the fastest first. outside: the lines are in no function."""
        found = {name for line in lines for name in self._by_line[file, line]}
        if not found and outside:
            found = set(self._by_file[file])
        return sorted(found, key=lambda name: (self._seconds[name], name))

    def files(self) -> list[str]:
        """The files of all tests."""
        return sorted({name.partition("::")[0] for name in self._seconds})

    def seconds(self, tests: list[str]) -> float:
        """How long they took, traced."""
        return sum(self._seconds[name] for name in tests)
