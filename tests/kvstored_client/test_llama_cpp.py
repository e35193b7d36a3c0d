"""kvstored's cache for llama-cpp-python over a stand-in for it: identity, save and restore."""

import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.store import Store
from kvstored_client.integrations.configured import NoStableForm
from kvstored_client.integrations.guard import Guard
from tests.kvstored_client import llama_stand_in
from tests.kvstored_client.llama_stand_in import Llama

ADAPTER = "kvstored_client.integrations.llama_cpp"
PROMPT = [i * 7 % 97 for i in range(100)]


@pytest.fixture
def mine() -> Iterator[Any]:
    """The adapter, imported over the stand-in; gone again after the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in llama_stand_in.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, ADAPTER, raising=False)
        yield importlib.import_module(ADAPTER)
        sys.modules.pop(ADAPTER, None)


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    (tmp_path / "model.gguf").write_bytes(b"weights")
    return str(tmp_path / "model.gguf")


def guard(store: Store) -> Guard:
    return Guard(store, lookup_timeout_s=60, fetch_timeout_s=60)


def test_another_llama_finds_the_state_and_computes_the_rest_only(mine: Any, gguf: str) -> None:
    with Store.open() as store:
        first, second = Llama(gguf), Llama(gguf)
        cache = mine.KvstoredLlamaCache(first, guard(store))
        without = first.answer(PROMPT)
        assert first.answer(PROMPT, cache) == without
        assert cache.flush(60)
        other = mine.KvstoredLlamaCache(second, guard(store))
        assert PROMPT in other
        assert second.answer(PROMPT, other) == without
        assert (other.hits, other.misses, other.restored_tokens, second.computed) == (1, 0, 100, 1)
        forked = [*PROMPT[:70], 6, 6]
        computed = second.computed
        assert second.answer(forked, other) == first.answer(forked)
        assert second.computed - computed == 2
        second._seed = 5
        assert other[PROMPT].seed == 5


def test_each_parameter_is_in_the_identity_unless_the_list_names_it(mine: Any, gguf: str) -> None:
    before = mine._identity(Llama(gguf), None, "")
    assert mine._identity(Llama(gguf), None, "") == before
    changed = 0
    for owner in ("model_params", "context_params"):
        for name, kind in getattr(Llama(gguf), owner)._fields_:
            if not issubclass(kind, ctypes._SimpleCData) or kind is ctypes.c_void_p:
                continue
            llama = Llama(gguf)
            params = getattr(llama, owner)
            setattr(params, name, not getattr(params, name))
            same = mine._identity(llama, None, "") == before
            assert same == (f"*.{name}" in mine._HARMLESS), name
            changed += 1
    assert changed > 35


def test_what_is_beside_the_parameters_is_in_the_identity(mine: Any, gguf: str, tmp_path: Path) -> None:
    (tmp_path / "lora.gguf").write_bytes(b"lora")
    found = [mine._identity(Llama(gguf), None, ""), mine._identity(Llama(gguf), None, "tenant")]
    found.append(mine._identity(Llama(gguf), "another revision", ""))
    found.append(mine._identity(Llama(gguf, lora_path=str(tmp_path / "lora.gguf")), None, ""))
    changes: list[tuple[str, Any]] = [
        ("kv_overrides", {"a.rope": 1}), ("kv_overrides", {"a.rope": True}), ("tensor_split", [0.5, 0.5]),
        ("_logits_all", True), ("lora_scale", 0.5),
    ]  # fmt: skip
    for name, x in changes:
        llama = Llama(gguf)
        setattr(llama, name, x)
        found.append(mine._identity(llama, None, ""))
    Path(gguf).write_bytes(b"other weights")
    found.append(mine._identity(Llama(gguf), None, ""))
    assert len(set(found)) == 10


@pytest.mark.parametrize("name", ["devices", "tensor_buft_overrides", "ctx_other"])
def test_a_pointer_that_is_not_understood_turns_the_cache_off(
    mine: Any, gguf: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    llama = Llama(gguf)
    setattr(llama.context_params if name == "ctx_other" else llama.model_params, name, 1)
    with pytest.raises(NoStableForm, match=name):
        mine._identity(llama, None, "")
    with Store.open() as store:
        cache = mine.KvstoredLlamaCache(llama, guard(store))
        assert llama.answer(PROMPT, cache) == llama.answer(PROMPT)
        assert cache.flush(60)
        assert not list(store.entries())
    assert "nothing is kept or found" in caplog.text


def test_what_an_image_added_to_the_prompt_is_never_kept(mine: Any, gguf: str) -> None:
    llama = Llama(gguf)
    llama.chat_handler = type("Sees", (), {"clip_model_path": "mmproj.gguf"})()
    with Store.open() as store:
        cache = mine.KvstoredLlamaCache(llama, guard(store))
        llama.answer(PROMPT, cache)
        assert cache.flush(60)
        assert PROMPT not in cache
        assert not list(store.entries())
