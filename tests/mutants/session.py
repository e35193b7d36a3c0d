"""One session of pytest that has everything imported and collected, and forks for each change.

The fork puts the changed function's code in the place of the old one and runs the tests: no import, no collection. Only
a change inside a function can be made so, and only in this process; `running` is for the others.
"""

import ast
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.mutants.mutations import Mutant
from tests.mutants.running import ROOT, Run, fork, temporary

TIMEOUT_MIN_S = 30.0
TIMEOUT_FACTOR = 20


class Session:
    """The plugin. work: called with this object once all tests are collected."""

    def __init__(self, work: Callable[["Session"], None]) -> None:
        self._work = work
        self._items: dict[str, pytest.Item] = {}
        self._functions: defaultdict[tuple[str, str], list[FunctionType]] = defaultdict(list)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests."""
        self._items = {item.nodeid: item for item in session.items}
        for at in gc.get_objects():
            if type(at) is FunctionType:  # isinstance would ask lazy modules for their class, which warn
                self._functions[at.__code__.co_filename, at.__code__.co_qualname].append(at)
        gc.collect()
        gc.freeze()
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure ends a fork: the change was noticed."""
        if report.failed:
            sys.stdout.write(report.longreprtext)
            sys.stdout.flush()
            os._exit(1)

    def has(self, mutant: Mutant) -> bool:
        """Whether a change can be made here."""
        return bool(self._found(mutant))

    def _found(self, mutant: Mutant) -> list[FunctionType]:
        name = enclosing((ROOT / mutant.file).read_bytes(), mutant.line)
        return self._functions.get((str(ROOT / mutant.file), name), []) if name else []

    def start(self, tests: Sequence[str], mutant: Mutant, source: bytes, seconds: float) -> Run:
        """Begin to run these tests against a change."""
        directory = temporary()
        functions = self._found(mutant)
        name = functions[0].__code__.co_qualname
        items = [self._items[test] for test in tests if test in self._items]

        def work() -> int:
            code = code_of(compile(mutant.applied(source), functions[0].__code__.co_filename, "exec"), name)
            if code is None:
                return 70
            for function in functions:
                function.__code__ = code
            _use(items[0].config, directory)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            return 0

        return Run(
            fork(work, directory / "log"), directory, time.monotonic() + TIMEOUT_MIN_S + TIMEOUT_FACTOR * seconds
        )


def _use(config: Any, directory: Path) -> None:
    base = directory / "t"
    base.mkdir()
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


def code_of(module: CodeType, name: str) -> CodeType | None:
    """The code of the function of this qualified name in a module's."""
    for constant in module.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name:
                return constant
            if name.startswith(constant.co_qualname + "."):
                return code_of(constant, name)
    return None
