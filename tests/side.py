"""Wheels that lie beside the environment and not in it: what `tools/engines/side.sh` fetches."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def side() -> Path:
    """Where they are, a folder each."""
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


def adapters_tried(engine: str, folders: Sequence[Path], address: str) -> subprocess.CompletedProcess[str]:
    """The tests of an engine's adapter in a process of their own, over these folders of wheels and this daemon."""
    path = [ROOT, ROOT / "daemon", ROOT / "client", *folders]
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "tests/e2e/adapters", "-q", "--engine", engine, "-W", "ignore",
            "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "KVSTORED_TEST_ADDRESS": address,
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR",
            "LMCACHE_TRACK_USAGE": "false",
        },
    )  # fmt: skip
