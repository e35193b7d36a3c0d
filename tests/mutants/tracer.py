"""Sees which lines of some files a process executes.

Of the standard library only: in a directory of its own it is also the `sitecustomize` of the processes that a test
starts, which write what they see to one file.
"""

import mmap
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class Tracer:
    """Traces the files that are keys of `names`, in all threads. seen: the lines of each function's code."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.seen: defaultdict[CodeType, set[int]] = defaultdict(set)
        self._all: dict[CodeType, int] = {}

    def start(self) -> None:
        """Trace this thread and those that start from now on."""
        threading.settrace(self._called)
        sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        del event, arg
        code = frame.f_code
        if code.co_filename not in self.names:
            return None
        self.entered()
        if code not in self._all:
            self._all[code] = len({line for _, _, line in code.co_lines() if line is not None})
        return None if len(self.seen[code]) >= self._all[code] else self._stepped

    def _stepped(self, frame: FrameType, event: str, arg: Any) -> Any:
        del arg
        if event == "line" and frame.f_lineno not in self.seen[frame.f_code]:
            self.seen[frame.f_code].add(frame.f_lineno)
            self.found(frame.f_code.co_filename, frame.f_lineno)
        return self._stepped

    def entered(self) -> None:
        """A function of these files is called."""

    def found(self, path: str, line: int) -> None:
        """A line is executed for the first time since `seen` was emptied."""


class Reporter(Tracer):
    """Of another process: appends each line to a file. Begins anew whenever the first byte of `turn` is another."""

    def __init__(self, names: dict[str, str], target: str, turn: str) -> None:
        super().__init__(names)
        self._target = os.open(target, os.O_WRONLY | os.O_APPEND)
        with Path(turn).open("rb") as file:
            self._turn = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
        self._last = self._turn[0]

    def entered(self) -> None:
        """Another test has begun since: it is told of every line again."""
        if self._turn[0] != self._last:
            self._last = self._turn[0]
            self.seen.clear()

    def found(self, path: str, line: int) -> None:
        """One write, which appends whole."""
        os.write(self._target, f"{self.names[path]}\t{line}\n".encode())
