"""What kind of cache a model has, and what its entries' identity says beside the state (`state`)."""

import json
from typing import Any

from transformers import DynamicCache
from transformers.generation import GenerationMixin

from kvstored_client.integrations.transformers import snapshot

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Their keys depend on how long the whole prompt was: a prefix of a long prompt is not that of a short one."""


def engine_of(model: Any) -> Any:
    """The transformers model itself, where PEFT has wrapped it."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None or isinstance(model, GenerationMixin) else unwrap()


def text_config(model: Any) -> Any:
    """The decoder's configuration."""
    return model.config.get_text_config(decoder=True)


def kind_of(engine: Any) -> tuple[str, str]:
    """How a model's cache is kept (attention, snapshot, mamba, rwkv, or unknown: not at all), and why not."""
    why = _refused(engine)
    if why:
        return "unknown", why
    name = type(engine).__name__.lower()
    if "rwkv" in name:
        return "rwkv", ""
    layers = {type(layer).__name__ for layer in DynamicCache(config=text_config(engine)).layers}
    if layers == {"DynamicLayer"}:
        return "attention", ""
    if not layers or not layers <= snapshot.KNOWN:
        return "unknown", f"its cache has layers that are not understood: {', '.join(sorted(layers)) or 'none'}"
    return ("mamba" if "mamba" in name else "snapshot"), ""  # transformers' own rule for the argument's name


def _refused(engine: Any) -> str:
    if getattr(type(engine), "generate", None) is not GenerationMixin.generate:
        return f"{type(engine).__name__} has a generate of its own"
    if getattr(engine.config, "is_encoder_decoder", False):
        return "it is an encoder with a decoder"
    if rope_depends_on_length(engine):
        return "its RoPE depends on the length of the prompt"
    own = "rwkv" not in type(engine).__name__.lower() and not engine._supports_default_dynamic_cache()  # noqa: SLF001 - what transformers' generate asks
    return "it has a cache of its own" if own else ""


def attention_shape(model: Any) -> tuple[int, int]:
    """(kv_heads, head_dim) as the configuration says."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return kv_heads, head_dim


def wrapper_reason(model: Any) -> str:
    """Why a model that PEFT has wrapped cannot be cached; empty if it can, or is not wrapped."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return ""
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            return "prompt learning puts tokens into the cache that are not in the ids"
        if getattr(config, "alora_invocation_tokens", None):
            return "an activated LoRA depends on where its invocation tokens stand in the whole prompt"
    return ""


def rope_depends_on_length(model: Any) -> bool:
    """Whether a token's key depends on the length of the whole prompt."""
    found = json.dumps(model.config.to_dict(), default=str)
    return any(f'"rope_type": "{kind}"' in found or f'"type": "{kind}"' in found for kind in _LENGTH_DEPENDENT_ROPE)
