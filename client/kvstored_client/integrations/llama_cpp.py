"""kvstored for llama-cpp-python 0.3: saved states of a `Llama`, shared by processes and kept across restarts.

    from kvstored_client.integrations.llama_cpp import KvstoredLlamaCache
    llama.set_cache(KvstoredLlamaCache(llama))      # the one line

llama.cpp saves its state as one run of bytes in a private format, so a state is kept whole and exactly, under the hash
of the tokens it covers. Beside it there is a pointer for each 32 of its tokens, under the hash of the tokens up to
there: the longest prefix of a prompt is found by one match over its own hashes, however many states are held, and a
state serves every prompt that begins like it (llama.cpp drops the rest of it itself). A hit removes nothing.
Whatever shapes those bytes is in the keys: the model file, LoRA, all parameters of model and context but `_HARMLESS`,
the library's version. With images in the prompt the tokens do not say what was seen: then nothing is kept or found, nor
where a parameter is a pointer that is not understood.
Trouble of the cache is a KeyError, llama-cpp-python's word for a miss. As little thread-safe as a Llama.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from llama_cpp import LlamaState
from llama_cpp import __version__ as llama_cpp_version
from llama_cpp.llama_cache import BaseLlamaCache

from kvstore.keys import chunk_keys, token_bytes
from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import configured
from kvstored_client.integrations.guard import Guard, guarded

__all__ = ["KvstoredLlamaCache"]

logger = logging.getLogger(__name__)

STEP_TOKENS = 32
"""Tokens between pointers. They only choose the state: what is reused of it is counted in single tokens."""
CANDIDATES = 8
"""Deepest pointers looked at: a state may have been evicted while its pointers are still there."""
_THREADS = "how fast, not what"
_HELD = "a pointer to what the Llama holds, and is in the identity by that"
_CALLED = "called while a model is read or a graph runs; changes neither"
_HARMLESS = {
    "*.n_threads": _THREADS,
    "*.n_threads_batch": _THREADS,
    "*.no_perf": "what is measured",
    "*.load_mode": "how the file is read, mapped or locked",
    "*.use_mmap": "the same, before 0.3.36",
    "*.use_mlock": "the same, before 0.3.36",
    "*.check_tensors": "how the file is read",
    "*.tensor_split": _HELD,
    "*.kv_overrides": _HELD,
    "*.progress_callback": _CALLED,
    "*.progress_callback_user_data": _CALLED,
    "*.cb_eval_user_data": _CALLED,
    "*.abort_callback": _CALLED,
    "*.abort_callback_data": _CALLED,
}
"""Parameters that change neither the state's bytes nor what they mean."""


class KvstoredLlamaCache(BaseLlamaCache):  # no __len__: Llama asks `if self.cache`, and an empty one must be true
    """The states of one Llama in a cache.

    llama: the model that this object is then given to. cache: a Client, an embedded Store, a Guard around one, an
    address, or None for the daemon at the default address. revision: your word for the model file; by default an
    XXH3-128 of its bytes, read once. salt: keeps tenants apart.
    hits, misses: lookups of this object. restored_tokens: tokens of prompts that a state found covered.
    """

    def __init__(self, llama: Any, cache: Any = None, *, revision: str | None = None, salt: str = "") -> None:
        super().__init__()
        self.guard: Guard = guarded(cache)
        self._llama = llama
        self._root = b""
        try:
            self._root = _identity(llama, revision, salt)
        except configured.NoStableForm as error:
            logger.warning("nothing is kept or found: %s", error)
        self.hits = self.misses = self.restored_tokens = 0
        self._put_nbytes = 0

    @property
    def cache_size(self) -> int:
        """Bytes of the states this object put. What is held of them is the daemon's to say."""
        return self._put_nbytes

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._usable() and bool(self.guard.match(self._pointers(key)[:1], lookup=ELSEWHERE))

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state that shares the longest prefix with these tokens. Raises KeyError on a miss."""
        try:
            state = self._find(list(key)) if self._usable() else None
        except Exception as error:  # noqa: BLE001 - the boundary: llama-cpp-python only knows KeyError
            logger.warning("restoring failed, recomputing: %s: %s", type(error).__name__, error)
            state = None
        if state is None:
            self.misses += 1
            raise KeyError("no state is held that begins like these tokens")
        self.hits += 1
        return state

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state, on another thread. `key` is not asked: a state knows the tokens it covers."""
        try:
            if self._usable() and value.n_tokens >= STEP_TOKENS:
                self._keep(value)
        except Exception as error:  # noqa: BLE001 - the boundary: the answer is there and must not be lost
            logger.warning("not kept: %s: %s", type(error).__name__, error)

    def _keep(self, value: LlamaState) -> None:
        tokens = np.array(value.input_ids[: value.n_tokens], dtype=np.int32)
        entry: dict[str, Any] = {"tokens": tokens, "state": np.frombuffer(value.llama_state, dtype=np.uint8)}
        if self._llama._logits_all:  # noqa: SLF001 - it has no public name; only then are scores read back
            entry["scores"] = np.array(value.scores, dtype=np.float32)
        own, pointers = self._state_key(tokens.tolist()), self._pointers(tokens.tolist())
        target = {"state": np.frombuffer(own, dtype=np.uint8)}
        guard = self.guard

        def put() -> None:
            if guard.cache.locate([own])[0] is None:
                guard.cache.put(own, entry, fidelity="exact")
            else:
                guard.cache.touch([own])
            guard.cache.put_many([(pointer, target) for pointer in pointers], fidelity="exact", chain=True)

        nbytes = sum(x.nbytes for x in entry.values())
        if guard.later(put, nbytes):
            self._put_nbytes += nbytes

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was kept so far is in the cache. False: it is not, after `timeout_s`."""
        return self.guard.flush(timeout_s)

    def _usable(self) -> bool:
        handler = getattr(self._llama, "chat_handler", None)
        return bool(self._root) and not hasattr(handler, "clip_model_path")

    def _pointers(self, tokens: Sequence[int]) -> list[bytes]:
        whole = len(tokens) // STEP_TOKENS * STEP_TOKENS
        return chunk_keys(self._root, list(tokens[:whole]), STEP_TOKENS)

    def _state_key(self, tokens: list[int]) -> bytes:
        return hashlib.sha256(b"state" + self._root + token_bytes(tokens)).digest()

    def _find(self, tokens: list[int]) -> LlamaState | None:
        pointers = self._pointers(tokens)
        whole = Lookup(len(pointers), len(tokens), STEP_TOKENS)
        held = self.guard.match(pointers, lookup=whole) if pointers else 0
        if not held:
            return None
        deepest = pointers[max(0, held - CANDIDATES) : held]
        hits = self.guard.get_many(deepest, lookup=ELSEWHERE)
        targets = [_bytes(hit.tensors["state"]) for hit in reversed(hits) if hit is not None]
        states = list(dict.fromkeys(targets))  # several pointers lead to one state
        places = self.guard.locate(states) if states else []
        for key, place in zip(states, places, strict=True):
            hit = self.guard.get(key, lookup=ELSEWHERE) if place is not None else None
            if hit is not None:
                return self._state(hit.tensors, tokens)
        return None

    def _state(self, tensors: Any, prompt: list[int]) -> LlamaState | None:
        llama = self._llama
        covered = np.asarray(tensors["tokens"])
        n = len(covered)
        scores = np.asarray(tensors["scores"]) if "scores" in tensors else np.zeros((1, llama.n_vocab()), np.float32)
        if n > llama.n_ctx() or (llama._logits_all and "scores" not in tensors):  # noqa: SLF001 - as above
            return None
        # Behind the covered tokens no token: what is there is compared with the prompt too.
        input_ids = np.full(llama.n_ctx(), -1, dtype=np.intc)
        input_ids[:n] = covered
        state = _bytes(tensors["state"])
        both = min(n, len(prompt))
        differ = np.flatnonzero(covered[:both] != np.asarray(prompt[:both]))
        self.restored_tokens += int(differ[0]) if len(differ) else both
        # The seed is the asker's: another worker's would change what is sampled.
        return LlamaState(
            input_ids=input_ids, scores=scores, n_tokens=n, llama_state=state, llama_state_size=len(state),
            seed=llama._seed,  # noqa: SLF001 - it has no public name
        )  # fmt: skip


def _bytes(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def _identity(llama: Any, revision: str | None, salt: str) -> bytes:
    """Digest of whatever makes saved states interchangeable: the root of all keys, 32 bytes. Raises NoStableForm."""
    path = Path(llama.model_path)
    whole = {
        "version": llama_cpp_version,
        "model": revision if revision is not None else _fingerprint(_parts(path)),
        "lora": _fingerprint([Path(llama.lora_path)]) if llama.lora_path else "",
        "lora_scale": llama.lora_scale,
        "logits_all": llama._logits_all,  # noqa: SLF001 - as above
        "model_params": configured.c_numbers(llama.model_params, _HARMLESS),
        "context_params": configured.c_numbers(llama.context_params, _HARMLESS),
        "kv_overrides": llama.kv_overrides,
        "tensor_split": getattr(llama, "tensor_split", None),
        "salt": salt,
    }
    return configured.digest("llama.cpp", whole)


def _parts(path: Path) -> list[Path]:
    """The files of a model: one, or those of a split one."""
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    return [path] if found is None else sorted(path.parent.glob(f"{found[1]}-?????-of-{found[2]}.gguf"))


def _fingerprint(files: list[Path]) -> str:
    """XXH3-128 of the bytes of files: 98 MB take 0.03 s from the page cache."""
    found = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                found.update(piece)
    return found.hexdigest()
