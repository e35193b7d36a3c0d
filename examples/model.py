"""The demo's model, and its cache in the store's shape and back.

`experiments.smollm` converts it once to float32 safetensors.
Shapes: transformers keeps keys and values as [batch, kv_heads, tokens, head_dim] for each layer, RoPE already applied;
the store's layout "lthd" is (layers, tokens, kv_heads, head_dim).
"""

import os
from pathlib import Path
from typing import Any

# Before transformers is imported: the demo needs no network, and progress bars of libraries would cut through ours.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from experiments.smollm import MODEL_NAME

logging.disable_progress_bar()


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
