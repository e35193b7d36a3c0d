"""Other users of this host, for tests: code of this environment runs where those users can read it, too.

The interpreter, the venv or the checkout may lie in a home directory that nobody else may enter. A mount namespace
shows just these folders there, under a directory that everybody may pass.
"""

import ctypes
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

STRANGER = 3001
"""A user id that no account of a usual system has."""
_CLONE_NEWNS = 0x20000


@cache
def why_not() -> str | None:
    """What keeps this machine from running code as other users; None: nothing."""
    if os.geteuid() != 0:
        return "takes another user's id, or gives files to another user, which only root can"
    code, said = in_child(lambda: 0)
    return f"namespaces or mounts are refused: {said.strip()[-200:]}" if code else None


def in_child(task: Callable[[], int]) -> tuple[int, str]:
    """Run `task` in a forked process, which may give up root's rights for good. Its exit code, and what it printed.

    Forked: importing torch anew would take ten seconds each time.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            _show_to_all()
            code = task()
        except BaseException:  # noqa: BLE001 - nothing may unwind into the test's frames
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def _show_to_all() -> None:
    """Let every user reach the interpreter, the venv and the checkout, in this process and its children."""
    closed: dict[Path, list[Path]] = {}
    for folder in {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT.resolve()}:
        shut = [step for step in (*reversed(folder.parents), folder) if not step.stat().st_mode & 0o001]
        if shut:
            closed.setdefault(shut[0], []).append(folder)
    if not closed:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    lines = ["set -e", "mount --make-rprivate /"]
    for top, folders in closed.items():
        lines.append(f"held=$(mktemp -d); mount --bind {shlex.quote(str(top))} $held")
        lines.append(f"mount -t tmpfs -o mode=0755 shown {shlex.quote(str(top))}")
        for folder in folders:
            shown = shlex.quote(str(folder))
            lines.append(f"mkdir -p {shown}; mount --bind $held/{shlex.quote(str(folder.relative_to(top)))} {shown}")
        lines.append("umount -l $held; rmdir $held")
    subprocess.run(["sh", "-c", "; ".join(lines)], check=True)
