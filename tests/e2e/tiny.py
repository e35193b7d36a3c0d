"""Tiny models with random weights, sharpened so that a wrong key changes tokens; and what is compared of an answer."""

from typing import Any

import torch
import transformers

BASE = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    **BASE, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {**BASE, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {**BASE, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
BART = {
    **BASE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "eos_token_id": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "forced_eos_token_id": None,
    "max_position_embeddings": 256,
}  # fmt: skip
MLA = {
    **LLAMA, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
QWEN2_VL = {
    "text_config": {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
    "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123,
}  # fmt: skip
MAMBA2 = {
    **BASE, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 16,
    "n_groups": 1, "chunk_size": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 16}),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**BASE, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
         "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**BASE, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconForCausalLM", "FalconConfig",
        {**BASE, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "bart_decoder": ("BartForCausalLM", "BartConfig", BART),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {**BASE, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bert": ("BertLMHeadModel", "BertConfig", BERT),
    "bert_decoder": ("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": True}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN2_VL),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", MAMBA2),
}  # fmt: skip


def build(name: str) -> Any:
    """The model, in evaluation mode, the same each time."""
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(5)
    model.generation_config.pad_token_id = 0
    return model


def prompt(columns: int = 30, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """(rows, columns) ids that are no special token of any of the models."""
    return torch.randint(3, 118, (rows, columns), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, *args: Any, **options: Any) -> Any:
    """What transformers alone answers, or the type of what it raises."""
    torch.manual_seed(0)
    try:
        return type(model).generate(model, *args, **options)
    except Exception as error:  # noqa: BLE001 - what is compared
        return type(error)


def cached(cache: Any, *args: Any, **options: Any) -> Any:
    """What a PrefixCache answers, in the same way."""
    torch.manual_seed(0)
    try:
        return cache.generate(*args, **options)
    except Exception as error:  # noqa: BLE001 - what is compared
        return type(error)


def assert_same(got: Any, expected: Any) -> None:
    """The same tokens, the same kinds of output, the same numbers but for rounding."""
    assert type(got) is type(expected), (got, expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
        assert got.is_inference() == expected.is_inference()
    elif isinstance(expected, transformers.utils.ModelOutput):
        assert list(got) == list(expected)
        for name in expected:
            if name == "past_key_values":
                assert type(got[name]) is type(expected[name])
                if hasattr(expected[name].layers[0], "keys"):
                    assert got[name].get_seq_length() == expected[name].get_seq_length()
            elif name == "sequences":
                assert torch.equal(got[name], expected[name])
            else:
                assert_close(got[name], expected[name])
    else:
        assert got == expected


def assert_close(got: Any, expected: Any) -> None:
    """Nested tuples of tensors, equal but for rounding."""
    if isinstance(expected, torch.Tensor):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    elif expected is None:
        assert got is None
    else:
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)
