"""What kvstored's cache for llama-cpp-python sees of it, without the library, which has no wheel.

The parameters are C structures with the fields of 0.3.36, in its order and types. The model is a rule: the next token
is made of all tokens before it, so a state of another prompt gives other tokens. What of a state is reused is decided
as `Llama.generate` does.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

VOCABULARY = 97
_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
_I, _U, _F, _B, _P = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool, ctypes.c_void_p


def _same(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class Override(ctypes.Structure):
    """llama_model_kv_override, its value as the longest of the union."""

    _fields_ = (("tag", ctypes.c_int), ("key", ctypes.c_char * 128), ("value", ctypes.c_char * 128))


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        *_same(_P, "devices", "tensor_buft_overrides"),
        *_same(_I, "n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu"),
        ("tensor_split", ctypes.POINTER(_F)), ("progress_callback", _Callback), ("progress_callback_user_data", _P),
        ("kv_overrides", ctypes.POINTER(Override)),
        *_same(_B, "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp"),
    ]  # fmt: skip


class Sampler(ctypes.Structure):
    """llama_sampler_seq_config."""

    _fields_ = (("seq_id", _I), ("sampler", _P))


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        *_same(_U, "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"),
        *_same(_I, "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type"),
        *_same(_I, "flash_attn_type"),
        *_same(_F, "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"),
        *_same(_F, "yarn_beta_slow"), ("yarn_orig_ctx", _U), ("defrag_thold", _F),
        ("cb_eval", _Callback), ("cb_eval_user_data", _P), *_same(_I, "type_k", "type_v"),
        ("abort_callback", _Callback), ("abort_callback_data", _P),
        *_same(_B, "embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified"),
        ("samplers", ctypes.POINTER(Sampler)), ("n_samplers", ctypes.c_size_t), ("ctx_other", _P),
    ]  # fmt: skip


@dataclass
class LlamaState:
    """A saved state."""

    input_ids: Any
    scores: Any
    n_tokens: int
    llama_state: bytes
    llama_state_size: int
    seed: int


class BaseLlamaCache(ABC):
    """What a Llama asks."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> LlamaState: ...

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool: ...

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None: ...


class Llama:
    """A model by rule, with what the cache reads of a Llama."""

    def __init__(self, model_path: str, n_ctx: int = 512, lora_path: str | None = None) -> None:
        self.model_path, self.lora_path, self.lora_scale = model_path, lora_path, 1.0
        self.model_params, self.context_params = ModelParams(split_mode=1, load_mode=1), ContextParams(n_ctx=n_ctx)
        self.kv_overrides: dict[str, Any] | None = None
        self.tensor_split: list[float] | None = None
        self.chat_handler: Any = None
        self._logits_all, self._seed = False, 1
        self.computed = 0
        self._state: list[int] = []

    def n_ctx(self) -> int:
        return int(self.context_params.n_ctx)

    def n_vocab(self) -> int:
        return VOCABULARY

    def save_state(self) -> LlamaState:
        ids = np.full(self.n_ctx(), 7, dtype=np.intc)  # what lies behind the tokens is whatever was there
        ids[: len(self._state)] = self._state
        state = np.array(self._state, dtype=np.int32).tobytes()
        return LlamaState(ids, np.zeros((1, 1), np.float32), len(self._state), state, len(state), self._seed)

    def answer(self, prompt: list[int], cache: Any = None, tokens: int = 8) -> list[int]:
        """So many tokens after a prompt, from an empty context, as create_completion asks its cache."""
        self._state = []
        if cache is not None:
            try:
                found = cache[prompt]
                reused = next(
                    (i for i in range(found.n_tokens) if [*prompt, -2][i] != found.input_ids[i]), found.n_tokens
                )
                self._state = np.frombuffer(found.llama_state, dtype=np.int32).tolist()[: min(reused, len(prompt) - 1)]
            except KeyError:
                pass
        self.computed += len(prompt) - len(self._state)
        self._state += prompt[len(self._state) :]
        for _ in range(tokens):
            self._state.append(hash(tuple(self._state)) % VOCABULARY)
        if cache is not None:
            cache[self._state] = self.save_state()
        return self._state[len(prompt) :]


def modules() -> dict[str, ModuleType]:
    """llama_cpp and what the cache imports from it."""
    top, below = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_cache")
    found: list[tuple[ModuleType, str, Any]] = [
        (top, "LlamaState", LlamaState), (top, "__version__", "0.3.36"), (top, "__path__", []),
        (below, "BaseLlamaCache", BaseLlamaCache),
    ]  # fmt: skip
    for module, name, x in found:
        setattr(module, name, x)
    return {"llama_cpp": top, "llama_cpp.llama_cache": below}
