"""The contract suite over every adapter, each engine's in a process of its own with its wheel on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, DaemonProcess

pytestmark = pytest.mark.slow
ENGINES = {
    "drop-in": [], "transformers": [], "lmcache": ["shared", "lmcache"], "sglang": ["shared", "sglang"],
    "vllm": ["shared", "vllm"], "kvpress": ["kvpress", "shared"], "llama": ["llama"],
}  # fmt: skip
"""Each engine's folders of wheels."""


def side() -> Path:
    """Where `tools/engines/side.sh` puts the wheels."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kvstored" / "engines" / "side"


def why_missing(folder: str) -> str:
    """Why a folder of wheels is not there; "" where it is."""
    if (side() / folder / ".wheels").exists():
        return ""
    told = side() / f"why-{folder}"
    if told.exists():
        return told.read_text().strip()
    script = "llama.sh" if folder == "llama" else "side.sh"
    return f"{folder} is not installed: tools/engines/{script} .venv/bin/python"


@pytest.mark.parametrize("engine", ENGINES)
def test_adapter(engine: str, daemon: DaemonProcess) -> None:
    for folder in ENGINES[engine]:
        if missing := why_missing(folder):
            pytest.skip(missing)
    path = [ROOT, ROOT / "daemon", ROOT / "client", *(side() / folder for folder in ENGINES[engine])]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "tests/e2e/adapters", "-q", "--engine", engine, "-W", "ignore",
            "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=560, check=False,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "KVSTORED_TEST_ADDRESS": daemon.address,
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR",
            "LMCACHE_TRACK_USAGE": "false",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
