"""Runs tests against a change: in a fork (`session`), or in a process of its own where the change is made at import.

Each gets a session of the system's, so that what hangs is ended with everything it started. Processes that the tests
start see the change, too: a `sitecustomize` in front of their path installs the hook.
"""

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.mutants import hook
from tests.mutants.mutations import Mutant

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch", "numpy", "ml_dtypes", "lmdb", "zstandard", "xxhash", "safetensors.torch", "grpc", "grpc.aio",
    "google.protobuf.message", "cryptography.hazmat.primitives.ciphers.aead", "pytest", "_pytest.assertion.rewrite",
    "click", "asyncio",
)  # fmt: skip
TIMEOUT_MIN_S = 30.0
TIMEOUT_FACTOR = 8
"""A change may make tests slower without being wrong, and the machine may be busy."""
START_S = 60.0
"""More for a process of its own, which imports everything anew."""
_PYTEST = (
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "--tb=no",
    "-rfE",
    "-W",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
_NOTICED = (1, 2)
"""Exit codes of pytest: a test failed, or a file could not be collected."""


def warm() -> None:
    """Import what every run needs and no change touches."""
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import torch

    torch.set_num_threads(1)
    started = [name for name in sys.modules if name.partition(".")[0] in ("kvstore", "kvstored", "kvstored_client")]
    assert not started, f"imported too early: {started}"


@dataclass
class Run:
    """A fork at work. directory: its temporary files, removed at the end. by: the test that noticed, where known."""

    pid: int
    directory: Path
    deadline: float
    by: str = ""

    def ended(self) -> str | None:
        """ "killed", "survived", "hung" or "broken"; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            outcome = _outcome(status)
        elif time.monotonic() > self.deadline:
            outcome = "hung"
        else:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        failed = re.search(
            r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", (self.directory / "log").read_text(errors="replace"), re.MULTILINE
        )
        self.by = failed[1] if failed else ""
        if outcome != "broken":
            shutil.rmtree(self.directory, ignore_errors=True)
        return outcome


def _outcome(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "survived"
    return "killed" if code in _NOTICED or code < 0 else "broken"


def temporary() -> Path:
    """A directory for one run. Short: sockets are made in it."""
    return Path(tempfile.mkdtemp(prefix="kvm-"))


def deadline(seconds: float) -> float:
    """When tests that take so long must have ended."""
    return time.monotonic() + TIMEOUT_MIN_S + TIMEOUT_FACTOR * seconds


def preface(directory: Path, module: ModuleType, call: str) -> None:
    """Write a `sitecustomize` that has the text of a module and makes a call in it."""
    directory.mkdir()
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    (directory / "sitecustomize.py").write_text(f"{text}\n\n{call}\n", encoding="utf-8")


def put_first(directory: Path) -> None:
    """Processes that this one starts look for their modules in this directory first."""
    sources = [str(ROOT / folder) for folder in ("", "daemon", "client")]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(directory), *sources, os.environ.get("PYTHONPATH", "")])


def change(mutant: Mutant, source: bytes, directory: Path) -> Path:
    """A directory for `put_first`: processes that look there import the changed module."""
    path = directory / "path"
    preface(path, hook, f"Hook({str(ROOT)!r}, {mutant.file!r}, {mutant.applied(source)!r}).install()")
    return path


def start(tests: Sequence[str], mutant: Mutant, source: bytes, seconds: float) -> Run:
    """Begin to run these tests against a change, in a process of its own: in this one the program is imported."""
    directory = temporary()
    path = change(mutant, source, directory)

    def work() -> int:
        put_first(path)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *_PYTEST, f"--basetemp={directory}/t", *tests])  # noqa: S606

    return Run(fork(work, directory / "log"), directory, deadline(seconds) + START_S)


def run_pytest(arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    """Pytest, with the sources of this work tree."""
    import pytest

    os.chdir(ROOT)
    for folder in ("client", "daemon", "."):
        sys.path.insert(0, str((ROOT / folder).resolve()))
    return int(pytest.main(list(arguments), plugins=list(plugins)))


def fork(work: Callable[[], int], log: Path) -> int:
    """Begin something in a fork with a session and output of its own. Returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - the fork's boundary
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)  # a fork must not run what its parent has registered for its end


def forked(work: Callable[[], int], log: Path) -> int:
    """Run something in a fork and wait. Returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1])
