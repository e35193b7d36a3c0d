"""The contract suite over every adapter, each engine's in a process of its own with its wheel on the path."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, DaemonProcess
from tests.side import side, why_missing

pytestmark = [pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(1800)]
ENGINES = {
    "drop-in": [], "transformers": [], "lmcache": ["shared", "lmcache"], "sglang": ["shared", "sglang"],
    "vllm": ["shared", "vllm"], "kvpress": ["kvpress", "shared"], "llama": ["llama"],
}  # fmt: skip
"""Each engine's folders of wheels."""


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
        cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "KVSTORED_TEST_ADDRESS": daemon.address,
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR",
            "LMCACHE_TRACK_USAGE": "false",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
