"""Wheels that lie beside the environment and not in it: what `tools/engines/side.sh` fetches."""

import os
from pathlib import Path


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
