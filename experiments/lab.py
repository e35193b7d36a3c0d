"""The model, one document, and how a restored state is judged.

A document is a prefix (`ids`), its continuation (`rest`) and questions about facts in the prefix. Shapes: the store
has (layers, tokens, kv_heads, head_dim), RoPE applied; transformers holds [1, kv_heads, tokens, head_dim] a layer.
Not thread-safe. One process has one model.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Before transformers is imported: no network is needed, and its progress bars would cut through ours.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from experiments import ExperimentFailed, Step, Tensors
from experiments.needles import Question


@dataclass
class Lab:
    """One document before one model. model: a transformers causal LM in float32; None where a strategy brings its own.

    ids: (1, prefix). rest: (1, continuation). questions: about facts in the prefix.
    """

    model: Any
    tokenizer: Any
    ids: torch.Tensor
    rest: torch.Tensor
    questions: tuple[Question, ...]

    @cached_property
    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the prefix, (layers, tokens, kv_heads, head_dim): computed once a process, never changed."""
        return self.prefill(self.ids)

    def prefill(self, ids: torch.Tensor, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens (1, n) under this model, or another of the same shapes."""
        from transformers import DynamicCache

        cache = DynamicCache()
        with torch.inference_mode():
            (model or self.model)(ids, past_key_values=cache, logits_to_keep=1)
            keys, values = (
                torch.stack([getattr(layer, which)[0].transpose(0, 1) for layer in cache.layers]).contiguous()
                for which in ("keys", "values")
            )
        return keys, values

    def step(self, k: torch.Tensor, v: torch.Tensor, *, model: Any = None, position: int | None = None) -> Step:
        """Continues after K and V of (layers, tokens, kv_heads, head_dim), which are copied.

        position: that of the next token, by default the number of rows.
        """
        from transformers import DynamicCache

        cache, used = DynamicCache(), model or self.model
        with torch.inference_mode():
            for layer, (keys, values) in enumerate(zip(k, v, strict=True)):
                cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)  # a copy
        return stepper(used, cache, k.shape[1] if position is None else position)

    def rotated(self, keys: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """RoPE applied to keys (layers, tokens, heads, dim) from position 0 on; back: taken off again."""
        with torch.inference_mode():
            positions = torch.arange(keys.shape[1])[None]
            cos, sin = self.model.model.rotary_emb(keys[:1, :1, 0], positions)
        cos, sin = cos[0][None, :, None], sin[0][None, :, None]
        half = keys.shape[-1] // 2
        turned = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
        found: torch.Tensor = keys * cos + turned * (-sin if back else sin)
        return found


def stepper(model: Any, cache: Any, position: int, *, at_once: bool = True) -> Step:
    """Runs a model over a cache from a position on. at_once: several tokens in one forward; else one by one."""
    at = position

    def one(ids: torch.Tensor) -> torch.Tensor:
        nonlocal at
        positions = torch.arange(at, at + ids.shape[1])[None]
        with torch.inference_mode():
            logits: torch.Tensor = model(ids, past_key_values=cache, position_ids=positions).logits[0]
        at += ids.shape[1]
        return logits

    return one if at_once else lambda ids: torch.cat([one(ids[:, i : i + 1]) for i in range(ids.shape[1])])


def load_model(home: Path) -> tuple[Any, Any]:
    """A causal LM in float32 and its tokenizer. Raises ExperimentFailed, in a sentence, for what is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - the boundary: each file of a model has a library of its own, and its errors
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ExperimentFailed(f"{home} is no model that transformers can load: {why[0]}") from None
    return model.eval(), tokenizer


def keys_and_values(k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """The usual state: what the store's codecs know as keys and values."""
    return {"k": k.contiguous(), "v": v.contiguous()}


@dataclass(frozen=True)
class Quality:
    """How logits compare with the exact ones, over one continuation. kl in nats, the others in percent."""

    kl: float
    perplexity_change: float
    top1: float


def quality(exact: torch.Tensor, got: torch.Tensor, rest: torch.Tensor) -> Quality:
    """Compare logits (n, vocabulary) of a continuation `rest` (1, n), teacher-forced."""
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (exact, got))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    targets = rest[0, 1:, None]
    worse = float((p[:-1].gather(1, targets) - q[:-1].gather(1, targets)).mean())
    top1 = 100 * float((p.argmax(-1) == q.argmax(-1)).double().mean())
    return Quality(max(kl, 0.0), 100 * (math.exp(min(worse, 50.0)) - 1), top1)


def digest(logits: torch.Tensor) -> str:
    """SHA-256 over the bytes of logits."""
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
