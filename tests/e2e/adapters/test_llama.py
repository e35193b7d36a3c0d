"""llama-cpp-python itself: the same tokens with its cache in a store, whatever the store does."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.store import Store
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.llama_cpp import KvstoredLlamaCache
from tests.conftest import ROOT, DaemonProcess
from tests.e2e.adapters.conftest import open_llama
from tests.e2e.faults import FAULTS, Faulty

TEXT = (ROOT / "LICENSE").read_text()
PROMPT, OTHER = TEXT[:900], TEXT[:600] + " What else does it say?"
GREEDY = {"max_tokens": 8, "temperature": 0}


def patient(cache: Any) -> Guard:
    return Guard(cache, lookup_timeout_s=30, fetch_timeout_s=60)


@pytest.fixture
def llama() -> Iterator[Any]:
    found = open_llama(512)
    yield found
    found.close()


def answer(llama: Any, prompt: str = PROMPT, cache: Any = None, **options: Any) -> str:
    """From an empty context."""
    llama.reset()
    llama.set_cache(cache)
    return str(llama.create_completion(prompt, **{**GREEDY, **options})["choices"][0]["text"])


def test_another_process_finds_the_state_and_gives_the_same_tokens(llama: Any, daemon: DaemonProcess) -> None:
    without = {prompt: answer(llama, prompt) for prompt in (PROMPT, OTHER)}
    first = KvstoredLlamaCache(llama, patient(daemon.client()))
    assert answer(llama, PROMPT, first) == without[PROMPT]
    assert (first.hits, first.misses) == (0, 1)
    assert first.flush(60)
    assert first.cache_size > 0
    second = open_llama(512)
    cache = KvstoredLlamaCache(second, patient(daemon.client()))
    tokens = len(second.tokenize(PROMPT.encode()))
    for times in (1, 2):  # a hit removes nothing
        assert answer(second, PROMPT, cache) == without[PROMPT]
        assert (cache.hits, cache.restored_tokens) == (times, times * tokens)
    # Another question: what both prompts begin with is found, to the token.
    assert answer(second, OTHER, cache) == without[OTHER]
    shared = second.longest_token_prefix(second.tokenize(PROMPT.encode()), second.tokenize(OTHER.encode()))
    assert cache.restored_tokens == 2 * tokens + shared
    assert shared % 32 != 0
    second.close()


def test_the_longest_of_many_states_is_found_without_looking_at_the_others(llama: Any, store: Store) -> None:
    tokens = llama.tokenize(PROMPT.encode())
    first = KvstoredLlamaCache(llama, patient(store))
    for n in (96, 160, 128):
        llama.reset()
        llama.eval(tokens[:n])
        first[tokens[:n]] = llama.save_state()
    for i in range(8):
        llama.reset()
        llama.eval([1000 + i, *tokens[1:33]])
        first[[]] = llama.save_state()
    assert first.flush(60)
    counted = Faulty(store, "none")
    cache = KvstoredLlamaCache(llama, patient(counted))
    counted.calls = 0
    assert cache[tokens].n_tokens == 160
    assert counted.calls == 4  # match, pointers, where, the state
    assert cache.cache_size == 0
    assert cache[tokens[:130]].n_tokens >= 128
    # Its state evicted, its pointers still there: the next longest.
    store.evict(cache._state_key(tokens[:160]))
    assert cache[tokens].n_tokens == 128
    with pytest.raises(KeyError):
        _ = cache[[7, *tokens]]
    assert tokens in cache
    assert [7, *tokens] not in cache


def test_other_models_parameters_and_tenants_share_nothing(llama: Any, store: Store) -> None:
    answer(llama, PROMPT, mine := KvstoredLlamaCache(llama, patient(store), salt="a"))
    assert mine.flush(60)
    tokens = llama.tokenize(PROMPT.encode())
    assert tokens in KvstoredLlamaCache(llama, patient(store), salt="a")
    assert tokens not in KvstoredLlamaCache(llama, patient(store), salt="b")
    assert tokens not in KvstoredLlamaCache(llama, patient(store), salt="a", revision="another")
    other = open_llama(256)
    assert tokens not in KvstoredLlamaCache(other, patient(store), salt="a")
    other.close()
    llama.chat_handler = type("Sees", (), {"clip_model_path": "mmproj.gguf"})()
    assert tokens not in mine


def test_a_state_brings_no_seed_with_it(llama: Any, store: Store) -> None:
    llama.set_seed(99)
    answer(llama, cache=(cache := KvstoredLlamaCache(llama, patient(store))))
    assert cache.flush(60)
    llama.set_seed(5)
    assert cache[llama.tokenize(PROMPT.encode())].seed == 5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_cache_costs_no_token(llama: Any, store: Store, fault: str) -> None:
    without = answer(llama)
    answer(llama, cache=(good := KvstoredLlamaCache(llama, patient(store), revision="r")))
    assert good.flush(60)
    faulty = Faulty(store, fault, slow_s=30)
    cache = KvstoredLlamaCache(llama, Guard(faulty), revision="r")
    assert answer(llama, cache=cache) == without
    assert (cache.hits, cache.misses) == (0, 1)
    faulty.gate.set()
