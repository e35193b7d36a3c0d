"""The contract suite over every adapter, each engine's in a process of its own with its wheel on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, DaemonProcess

pytestmark = pytest.mark.slow
ENGINES = ["drop-in", "lmcache", "sglang", "vllm"]


def side() -> Path:
    """Where `tools/engines/side.sh` puts the wheels."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kvstored" / "engines" / "side-1"


@pytest.mark.parametrize("engine", ENGINES)
def test_adapter(engine: str, daemon: DaemonProcess) -> None:
    wheels = [side() / "shared", side() / engine]
    if engine != "drop-in" and not (side() / ".installed").exists():
        pytest.skip("the engines' wheels are not fetched: run tools/engines/side.sh .venv/bin/python")
    path = [ROOT, ROOT / "daemon", ROOT / "client", *(wheels if engine != "drop-in" else [])]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "tests/e2e/adapters", "-q", "--engine", engine, "-W", "ignore",
            "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "KVSTORED_TEST_ADDRESS": daemon.address,
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
