"""Recurrent, windowed and mixed models of transformers: saved mid-sequence, continued as if never stopped.

Tiny models with random weights, sharpened so that a wrong state changes tokens; always against transformers alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from kvstore.store import Store
from kvstored_client.integrations.transformers import PrefixCache
from kvstored_client.integrations.transformers.rows import read_rows

from .conftest import Patient
from .faults import FAULTS, Faulty

BASE = {"vocab_size": 128, "hidden_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {**ATTENTION, "head_dim": 16, "sliding_window": 32}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {"num_hidden_layers": 2, **WINDOW}, "snapshot"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"num_hidden_layers": 6, **WINDOW}, "snapshot"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": 2}, "mamba"),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {"num_hidden_layers": 2}, "mamba"),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16},
        "mamba",
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig", {"num_hidden_layers": 4, "head_dim": 16, **ATTENTION, **LINEAR},
        "snapshot",
    ),
    "lfm2": (
        "Lfm2ForCausalLM", "Lfm2Config",
        {"num_hidden_layers": 2, "full_attn_idxs": [1], "block_auto_adjust_ff_dim": False, **ATTENTION}, "snapshot",
    ),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
         "use_mamba_kernels": False, **ATTENTION}, "snapshot",
    ),
    "rwkv": (
        "RwkvForCausalLM", "RwkvConfig", {"num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 256},
        "rwkv",
    ),
}  # fmt: skip
NEW = {"max_new_tokens": 8, "do_sample": False}
PROMPT, PADDING = 75, 20


def build(name: str) -> Any:
    torch.manual_seed(0)
    model_class, config_class, options, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**BASE, **options)).eval()
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tokens(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cached(store: Store, patient: Patient) -> Callable[[Any], PrefixCache]:
    return lambda model: PrefixCache(model, patient(store), chunk_tokens=16)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_seen_before_continues_from_its_state(name: str, cached: Callable[[Any], PrefixCache]) -> None:
    model = build(name)
    ids = tokens(1, PROMPT)
    expected = model.generate(ids, use_cache=False, **NEW)
    assert len(set(expected[0, PROMPT:].tolist())) > 1 or name == "gemma3"
    cache = cached(model)
    assert cache.kind == MODELS[name][3]
    for restored in (0, PROMPT - 1):
        before = cache.usage.restored_tokens
        assert torch.equal(cache.generate(ids, **NEW), expected)
        assert cache.usage.restored_tokens - before == restored
        assert cache.flush()
    assert cache.guard.failures == cache.usage.passed_on == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_state_saved_mid_sequence_gives_the_logits_of_the_whole(
    name: str, cached: Callable[[Any], PrefixCache]
) -> None:
    model = build(name)
    ids = tokens(1, PROMPT)
    cache = cached(model)
    cache.generate(ids, **NEW)
    assert cache.flush()
    rows, profile = read_rows(ids), cache._profile()
    assert rows is not None and profile is not None
    with torch.no_grad():
        state, at = cache._restored(profile, rows)
        assert at == PROMPT - 1
        argument = {"mamba": "cache_params", "rwkv": "state"}.get(cache.kind, "past_key_values")
        got = model(ids[:, -1:], **{argument: state}).logits[:, -1]
        whole = model(ids, use_cache=False).logits[:, -1]
    assert float((got - whole).abs().max()) <= 1e-3 * float(whole.abs().max())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "rwkv"])
def test_a_left_padded_batch_and_then_its_shorter_row_alone(name: str, cached: Callable[[Any], PrefixCache]) -> None:
    model = build(name)
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    expected = model.generate(ids, attention_mask=mask, **NEW)
    cache = cached(model)
    for restored in (0, 2 * (PROMPT - 1) - PADDING):
        before = cache.usage.restored_tokens
        assert torch.equal(cache.generate(ids, attention_mask=mask, **NEW), expected)
        assert cache.usage.restored_tokens - before == restored
        assert cache.flush()
    row = ids[1:, PADDING:]
    before = cache.usage.restored_tokens
    assert torch.equal(cache.generate(row, **NEW), model.generate(row, **NEW))
    assert cache.usage.restored_tokens - before == row.shape[1] - 1


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3] == "snapshot"])
def test_the_next_turn_starts_after_the_last_answer(name: str, cached: Callable[[Any], PrefixCache]) -> None:
    model = build(name)
    ids = tokens(1, PROMPT)
    cache = cached(model)
    answer = cache.generate(ids, **NEW)
    assert cache.flush()
    turn = torch.cat([answer, tokens(1, 6, seed=2)], 1)
    before = cache.usage.restored_tokens
    assert torch.equal(cache.generate(turn, **NEW), model.generate(turn, use_cache=False, **NEW))
    assert cache.usage.restored_tokens - before == answer.shape[1] - 1


def test_rwkv_in_a_batch_is_passed_on(cached: Callable[[Any], PrefixCache]) -> None:
    cache = cached(build("rwkv"))
    cache.generate(tokens(2, 20), **NEW)
    assert cache.usage.passed_on == 1


def test_a_rope_that_depends_on_the_length_is_not_cached(cached: Callable[[Any], PrefixCache]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**BASE, **ATTENTION, num_hidden_layers=1, rope_parameters=rope)
    cache = cached(transformers.LlamaForCausalLM(config).eval())
    assert cache.kind == "unknown"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["mistral", "mamba2", "rwkv"])
def test_a_faulty_cache_costs_no_token(
    name: str, fault: str, store: Store, patient: Patient, cached: Callable[[Any], PrefixCache]
) -> None:
    model = build(name)
    ids = tokens(1, PROMPT)
    expected = model.generate(ids, **NEW)
    good = cached(model)
    good.generate(ids, **NEW)
    assert good.flush()
    cache = PrefixCache(model, Faulty(store, fault), chunk_tokens=16)
    assert torch.equal(cache.generate(ids, **NEW), expected)
