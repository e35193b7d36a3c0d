"""One session of pytest that has everything imported and collected, and forks for each change.

The fork puts the changed code of a function, and of those inside it, in the place of the old and runs the tests: no
import, no collection. Only a change inside a function can be made so; `running` is for the others.
"""

import ast
import gc
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.mutants.mutations import Mutant
from tests.mutants.running import ROOT, Run, change, deadline, fork, put_first, temporary

CHECK_S = 300.0
"""The longest that a test may take when nothing is changed."""


class Session:
    """The plugin. work: called with this object once all tests are collected."""

    def __init__(self, work: Callable[["Session"], None]) -> None:
        self._work = work
        self._items: dict[str, pytest.Item] = {}
        self._functions: defaultdict[str, list[FunctionType]] = defaultdict(list)
        self._passes: dict[str, bool] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests."""
        self._items = {item.nodeid: item for item in session.items}
        for at in gc.get_objects():
            if type(at) is FunctionType:  # isinstance would ask lazy modules for their class, which warn
                self._functions[at.__code__.co_filename].append(at)
        gc.collect()
        gc.freeze()
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure ends a fork: the change was noticed."""
        if report.failed:
            sys.stdout.write(f"\nFAILED {report.nodeid}\n{report.longreprtext}")
            sys.stdout.flush()
            os._exit(1)

    def passes_unchanged(self, test: str) -> bool:
        """Whether a test passes in a fork when nothing is changed. Asked once of each test that noticed something."""
        if test not in self._items:  # a file that cannot be collected
            return True
        if test not in self._passes:
            directory = temporary()

            def work() -> int:
                _run([self._items[test]], directory)
                return 0

            run = Run(fork(work, directory / "log"), directory, time.monotonic() + CHECK_S)
            while (outcome := run.ended()) is None:
                time.sleep(0.01)
            self._passes[test] = outcome == "survived"
        return self._passes[test]

    def has(self, mutant: Mutant) -> bool:
        """Whether a change can be made here."""
        return bool(self._found(mutant))

    def _found(self, mutant: Mutant) -> list[FunctionType]:
        name = enclosing((ROOT / mutant.file).read_bytes(), mutant.line)
        functions = self._functions[str(ROOT / mutant.file)] if name else []
        return [at for at in functions if f"{at.__code__.co_qualname}.<locals>.".startswith(f"{name}.<locals>.")]

    def start(self, tests: Sequence[str], mutant: Mutant, source: bytes, seconds: float) -> Run:
        """Begin to run these tests against a change."""
        directory = temporary()
        functions = self._found(mutant)
        items = [self._items[test] for test in tests if test in self._items]
        path = change(mutant, source, directory)

        def work() -> int:
            codes = codes_of(compile(mutant.applied(source), functions[0].__code__.co_filename, "exec"))
            for function in functions:
                function.__code__ = codes[function.__code__.co_qualname, function.__code__.co_firstlineno]
            put_first(path)
            _run(items, directory)
            return 0

        return Run(fork(work, directory / "log"), directory, deadline(seconds))


def _run(items: Sequence[pytest.Item], directory: Path) -> None:
    if not items:
        return
    _use(items[0].config, directory)
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def _use(config: Any, directory: Path) -> None:
    base = directory / "t"
    base.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(directory)  # what a test makes ends with the directory
    config._tmp_path_factory._basetemp = base


def enclosing(source: bytes, line: int) -> str | None:
    """The qualified name of the outermost function around a line; None: it is in none."""

    def within(nodes: Sequence[ast.stmt], prefix: str) -> str | None:
        for node in nodes:
            if not node.lineno <= line <= (node.end_lineno or node.lineno):
                continue
            if isinstance(node, ast.ClassDef):
                return within(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and line >= node.body[0].lineno:
                return prefix + node.name
        return None

    return within(ast.parse(source).body, "")


def codes_of(module: CodeType) -> dict[tuple[str, int], CodeType]:
    """The code of every function of a module, by its qualified name and first line."""
    found: dict[tuple[str, int], CodeType] = {}
    for constant in module.co_consts:
        if isinstance(constant, CodeType):
            found[constant.co_qualname, constant.co_firstlineno] = constant
            found |= codes_of(constant)
    return found
