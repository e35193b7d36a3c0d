"""Tries on a model what its caching rests on: a few short prompts, once for each state of its structure.

No list of families can be complete, so the properties are measured:
1. the keys and values of a prefix do not depend on what follows it (fails: attention to both sides, prefix-LM),
2. the model continues from a filled cache as from the whole prompt (fails: positions kept elsewhere),
3. padding on the left changes nothing for the tokens after it (fails: positions counted from the padding),
4. nothing of the model changes while it runs (fails: `rope_deltas` and other state beside the cache).
1, 2 and 4 are needed to cache at all; without 3, only prompts without padding are cached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from kvstored_client.integrations.transformers.identity import text_config
from kvstored_client.integrations.transformers.rows import Rows

TOKENS, PREFIX = 12, 8
"""Long enough for a prefix, a rest and another rest; short enough to cost about 0.1 s in a small model on one core."""
TOLERANCE = 1e-3
ROUGH_TOLERANCE = 0.05
"""Of the logits' spread, in float32 and in what is less exact. The same values summed in another order differ by about
1e-6 in float32, 1e-2 in bfloat16; what is looked for differs by 0.02 in a model with random weights, by 1 in a trained
one."""

FromState = Callable[[torch.Tensor, Rows], torch.Tensor]
"""The logits after a prompt, computed through a snapshot of its state before the last token."""


@dataclass(frozen=True)
class Shape:
    """Of a cache of full attention. k_dim and v_dim differ in models with compressed keys and values (MLA)."""

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype


class Refuted(Exception):
    """A property does not hold; the message says which."""


@torch.no_grad()
def try_attention(engine: Any) -> Shape:
    """Properties 1 and 2 of a model whose layers all are full attention. Returns its cache's shape. Raises Refuted."""
    ids, other = _prompt(engine, 0, TOKENS), _prompt(engine, 1, TOKENS)
    whole, _ = run(engine, ids)
    _, cache = run(engine, torch.cat([ids[:, :PREFIX], other], 1))
    shape = _shape(cache)
    past = DynamicCache(config=text_config(engine))
    for i, layer in enumerate(cache.layers):
        past.update(layer.keys[:, :, :PREFIX].clone(), layer.values[:, :, :PREFIX].clone(), i)
    continued, _ = run(engine, ids, past_key_values=past)
    if not _close(engine, continued, whole):
        raise Refuted("the keys and values of a prefix depend on what follows it, or on more than the cache holds")
    return shape


@torch.no_grad()
def try_snapshot(engine: Any, through_state: FromState) -> None:
    """Properties 1 and 2 of a model of which snapshots are kept. Raises Refuted."""
    ids = _prompt(engine, 0, TOKENS)
    whole, _ = run(engine, ids)
    if not _close(engine, through_state(ids, Rows(ids.tolist(), [0], TOKENS)), whole):
        raise Refuted("the state before the last token does not continue as the whole prompt does")


@torch.no_grad()
def padding_is_nothing(engine: Any) -> bool:
    """Property 3: whether a row's answer is the same with padding on its left."""
    ids = _prompt(engine, 0, TOKENS)
    alone, _ = run(engine, ids[:, :PREFIX])
    padded = torch.cat([torch.zeros_like(ids[:, PREFIX:]), ids[:, :PREFIX]], 1)
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, : TOKENS - PREFIX] = 0
    both, _ = run(engine, torch.cat([ids, padded]), attention_mask=mask)
    return _close(engine, both[1:], alone)


def run(engine: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
    """One step of generate: the logits after the prompt, (batch, vocabulary), and the cache."""
    # The model's own settings would fill what these leave open.
    own, engine.generation_config = engine.generation_config, GenerationConfig()
    try:
        options = {"attention_mask": torch.ones_like(ids), **options}
        out = type(engine).generate(
            engine, ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
    finally:
        engine.generation_config = own
    return out.logits[0].float(), out.past_key_values


def _prompt(engine: Any, seed: int, tokens: int) -> torch.Tensor:
    """(1, tokens) ids that mean nothing special to the model, the same in every process."""
    values = engine.config.to_dict()
    size = int(engine.get_input_embeddings().weight.shape[0])
    special = set(_special(values))
    ordinary = [i for i in range(1, size) if i not in special]
    ids = [ordinary[(seed * 104729 + i * 7919 + 3) % len(ordinary)] for i in range(tokens)]
    return torch.tensor([ids], device=engine.device)


def _special(values: dict[str, Any]) -> list[int]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _special(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            found += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
    return found


def _shape(cache: Any) -> Shape:
    layers = cache.layers
    if any(type(layer).__name__ != "DynamicLayer" or not layer.is_initialized for layer in layers):
        raise Refuted("some layers of its cache are not filled as full attention is")
    shapes = {(layer.keys.shape, layer.values.shape, layer.keys.dtype, layer.values.dtype) for layer in layers}
    if len(shapes) != 1:
        raise Refuted("the layers of its cache differ in shape")
    k, v, k_dtype, v_dtype = shapes.pop()
    if k[:3] != v[:3] or k_dtype != v_dtype:
        raise Refuted("keys and values differ in heads, tokens or type")
    return Shape(len(layers), k[1], k[3], v[3], k_dtype)


def _close(engine: Any, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    exact = engine.dtype in (torch.float32, torch.float64) and getattr(engine, "hf_quantizer", None) is None
    exact = exact and not torch.is_autocast_enabled(engine.device.type)
    spread = float((b - b.mean(-1, keepdim=True)).norm())
    return float((a - b).norm()) <= (TOLERANCE if exact else ROUGH_TOLERANCE) * spread
