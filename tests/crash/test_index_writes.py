"""LMDB's own writes and syncs failing: by a library loaded before libc, made here where there is a compiler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.history import TIMES, say

HERE = Path(__file__).parent


def test_the_nth_write_and_sync_of_the_index_fails_for_every_n(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler: failing LMDB's own calls is done by a library made here")
    shim = tmp_path / "failing_calls.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "failing_calls.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    path = os.pathsep.join([str(HERE.parent.parent), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.index_writes", str(tmp_path / "trials"), str(shim), str(8 * TIMES)],
        check=False, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"failing: (\d+) trials", done.stdout)
    assert found is not None
    assert int(found[1]) > 10
    say(done.stdout.strip())
