"""Runs tests against a change, in a fork of this process: torch and pytest are imported already, the program is not.

The fork gets a session of its own, so that what hangs is ended with everything it started. Processes that the tests
start see the change, too: a `sitecustomize` in front of their path installs the same hook.
"""

import importlib
import os
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

from tests.mutants import hook
from tests.mutants.mutations import Mutant

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch", "numpy", "ml_dtypes", "lmdb", "zstandard", "xxhash", "safetensors.torch", "grpc", "grpc.aio",
    "google.protobuf.message", "cryptography.hazmat.primitives.ciphers.aead", "pytest", "_pytest.assertion.rewrite",
    "click", "asyncio",
)  # fmt: skip
TIMEOUT_MIN_S = 60.0
TIMEOUT_FACTOR = 20
"""A change may make tests slower without being wrong, and the machine may be busy."""
_PYTEST = (
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "--tb=line",
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
    """A fork at work. directory: its temporary files, removed at the end."""

    pid: int
    directory: Path
    deadline: float

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


def start(tests: Sequence[str], mutant: Mutant, source: bytes, seconds: float) -> Run:
    """Begin to run these tests against a change."""
    directory = temporary()
    path = directory / "path"
    path.mkdir()
    (directory / "source.py").write_bytes(mutant.applied(source))
    text = Path(hook.__file__).read_text(encoding="utf-8")
    (path / "sitecustomize.py").write_text(f"{text}\ninstall_from_environment()\n")

    def work() -> int:
        os.environ[hook.ROOT], os.environ[hook.FILE] = str(ROOT), mutant.file
        os.environ[hook.SOURCE] = str(directory / "source.py")
        sources = [str(ROOT / folder) for folder in ("", "daemon", "client")]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(path), *sources, os.environ.get("PYTHONPATH", "")])
        os.chdir(ROOT)
        # A process of its own: in this one the program is imported already.
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *_PYTEST, f"--basetemp={directory}/t", *tests])  # noqa: S606

    return Run(fork(work, directory / "log"), directory, time.monotonic() + TIMEOUT_MIN_S + TIMEOUT_FACTOR * seconds)


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
    return 0


def forked(work: Callable[[], int], log: Path) -> int:
    """Run something in a fork and wait. Returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1])
