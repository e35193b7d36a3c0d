"""`generate` in all the ways it is called: the same answer as without a store, cold, warm and at the next turn."""

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from kvstore.store import Store
from kvstored_client.integrations.transformers import PrefixCache, attention, calls, profile

from .conftest import Patient
from .tiny import assert_same, build, cached, plain, prompt

PROMPT = 30
Make = Callable[..., PrefixCache]


class Favour(LogitsProcessor):
    """A processor of the caller's that looks at the whole prompt."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[1] >= PROMPT
        scores[:, input_ids[0, 3]] += 2
        return scores


class Recorder:
    """A streamer that remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.given.append([-1])


def own_decoding(model: Any, input_ids: Any, **_: Any) -> Any:
    return input_ids[:, :5]


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "top_p": {"do_sample": True, "top_p": 0.8, "min_p": 0.01},
    "typical": {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "max_length": {"max_new_tokens": None, "max_length": 50},
    "max_length too short": {"max_new_tokens": None, "max_length": 20},
    "no length": {"max_new_tokens": None},
    "min_length": {"eos_token_id": [5, 7, 9], "min_length": 48},
    "min_new_tokens": {"eos_token_id": [5, 7, 9], "min_new_tokens": 3},
    "end of sequence": {"eos_token_id": list(range(2, 100))},
    "max_time": {"max_time": 60.0},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 2, "do_sample": True},
    "beams that return all": {"num_beams": 2, "num_return_sequences": 2},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "group beams": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constraints": {"num_beams": 2, "force_words_ids": [[5, 6]]},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "high"},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 8},
    "guidance": {"guidance_scale": 1.5},
    "token healing": {"token_healing": True},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "hidden states, not returned": {"output_hidden_states": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "dict": {"return_dict_in_generate": True},
    "repetition penalty": {"repetition_penalty": 1.5},
    "encoder repetition penalty": {"encoder_repetition_penalty": 1.5},
    "no repeated ngrams": {"no_repeat_ngram_size": 2},
    "encoder ngrams": {"encoder_no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[5], [6, 7]]},
    "sequence bias": {"sequence_bias": [[[5], 2.0], [[6, 7], 1.0]]},
    "forced end": {"forced_eos_token_id": 9},
    "forced begin": {"forced_bos_token_id": 9},
    "suppressed": {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]},
    "decay": {"eos_token_id": 9, "exponential_decay_length_penalty": (1, 1.5)},
    "watermark": {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
    "stop strings without a tokenizer": {"stop_strings": ["a"]},
    "a setting that there is not": {"no_such_setting": 3},
}  # fmt: skip

ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "processors": lambda _: {"logits_processor": LogitsProcessorList([Favour()])},
    "stopping": lambda _: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(PROMPT + 2)])},
    "allowed tokens": lambda _: {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[4]), 11, 12]},
    "assistant": lambda model: {"assistant_model": model},
    "own decoding": lambda _: {"custom_generate": own_decoding},
    "nothing in particular": lambda _: {"past_key_values": None, "attention_mask": None, "streamer": None},
    "mask of ones": lambda _: {"attention_mask": torch.ones(1, PROMPT, dtype=torch.long)},
    "mask of truth": lambda _: {"attention_mask": torch.ones(1, PROMPT, dtype=torch.bool)},
    "mask with a hole": lambda _: {"attention_mask": torch.tensor([[1] * 9 + [0] + [1] * (PROMPT - 10)])},
    "padding on the left": lambda _: {"attention_mask": torch.tensor([[0] * 7 + [1] * (PROMPT - 7)])},
    "padding on the right": lambda _: {"attention_mask": torch.tensor([[1] * (PROMPT - 2) + [0] * 2])},
    "positions": lambda _: {"position_ids": torch.arange(3, PROMPT + 3).unsqueeze(0)},
    "positions with a gap": lambda _: {"position_ids": (torch.arange(PROMPT) + 40 * (torch.arange(PROMPT) > 9))[None]},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(prompt(PROMPT, seed=5)).detach()},
    "own cache": lambda model: {"past_key_values": model(prompt(PROMPT)[:, :20]).past_key_values},
    "logits to keep": lambda _: {"logits_to_keep": 1},
    "negative prompt": lambda _: {"negative_prompt_ids": prompt(5, seed=3), "guidance_scale": 1.5},
    "a keyword that there is not": lambda _: {"nonsense": 1},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture
def make(store: Store, patient: Patient) -> Make:
    return lambda model, **options: PrefixCache(model, patient(store), chunk_tokens=16, **options)


def by_keyword(model: Any, settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), settings


def by_object(model: Any, settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"generation_config": GenerationConfig(**settings)}


def by_position(model: Any, settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (GenerationConfig(**settings),), {}


def by_model(model: Any, settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    model.generation_config = GenerationConfig(pad_token_id=0, **settings)
    return (), {}


TURNS = (prompt(PROMPT), torch.cat([prompt(PROMPT), prompt(6, seed=2)], 1))
"""A prompt, and one that goes on from it."""


def alone(model: Any, args: Any, options: dict[str, Any]) -> list[Any]:
    """What transformers alone answers to both turns."""
    return [plain(model, turn, *args, **copy.deepcopy(options)) for turn in TURNS]


def check(cache: PrefixCache, args: Any, options: dict[str, Any], expected: list[Any]) -> None:
    """Cold, warm, and at the next turn: as expected."""
    for turn in (0, 0, 1):
        assert_same(cached(cache, TURNS[turn], *args, **copy.deepcopy(options)), expected[turn])
        assert cache.flush()
    assert cache.guard.failures == cache.guard.dropped == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_means_the_same_whichever_way_it_comes(name: str, llama: Any, make: Make) -> None:
    settings = {"max_new_tokens": 3, "do_sample": False, **SETTINGS[name]}
    settings = {key: value for key, value in settings.items() if value is not None}
    own, passed = llama.generation_config, set()
    expected = alone(llama, (), settings)
    unknown = name == "a setting that there is not"
    try:
        for route in (by_keyword, by_position if len(name) % 2 else by_object, by_model):
            llama.generation_config = copy.deepcopy(own)
            args, options = route(llama, settings)
            cache = make(llama, salt=route.__name__)
            # As a keyword it is an error, in a configuration it is only carried along.
            check(cache, args, options, alone(llama, args, options) if unknown else expected)
            passed.add(cache.usage.passed_on)
    finally:
        llama.generation_config = own
    assert len(passed) == 1 or unknown, passed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_does_what_it_does_without_a_store(name: str, llama: Any, make: Make) -> None:
    cache = make(llama)
    ids = prompt(PROMPT)
    for given in (ARGUMENTS[name], ARGUMENTS[name], lambda _: {}, ARGUMENTS[name]):
        got, expected = (
            answer(ids, max_new_tokens=4, do_sample=False, **given(llama))
            for answer in (lambda *a, **o: cached(cache, *a, **o), lambda *a, **o: plain(llama, *a, **o))
        )
        assert_same(got, expected)
        assert cache.flush()


@pytest.mark.parametrize("served", ["greedy", "sampling", "max_length", "no length", "scores", "repetition penalty"])
@pytest.mark.filterwarnings("ignore")
def test_common_settings_are_served_from_the_cache(served: str, llama: Any, make: Make) -> None:
    cache = make(llama)
    settings = {"max_new_tokens": 4, **SETTINGS[served]}
    options = {key: value for key, value in settings.items() if value is not None}
    for _ in range(2):
        cached(cache, prompt(PROMPT), **options)
        assert cache.flush()
    assert (cache.usage.passed_on, cache.usage.restored_tokens) == (0, PROMPT - 1)


FEW = ("greedy", "sampling", "max_length", "beams", "prompt lookup", "no cache", "hidden states", "logits", "bad words")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_name", ["gpt2", "gemma2", "bloom", "deepseek_v3", "bart_decoder", "mamba2", "qwen2_vl"])
def test_other_families_answer_as_without_a_store(model_name: str, make: Make) -> None:
    model = build(model_name)
    own = model.generation_config
    for name in FEW:
        settings = {"max_new_tokens": 3, "do_sample": False, **SETTINGS[name]}
        settings = {key: value for key, value in settings.items() if value is not None}
        model.generation_config = copy.deepcopy(own)
        args, options = by_model(model, settings)
        check(make(model, salt=name), args, options, alone(model, args, options))


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "mamba2"])
def test_a_streamer_is_given_the_prompt_and_each_token_as_without_a_store(model_name: str, make: Make) -> None:
    model = build(model_name)
    cache, alone = make(model), Recorder()
    plain(model, prompt(PROMPT), streamer=alone, max_new_tokens=3, do_sample=False)
    assert alone.given[0] == prompt(PROMPT)[0].tolist()
    for _ in range(2):
        streamer = Recorder()
        cached(cache, prompt(PROMPT), streamer=streamer, max_new_tokens=3, do_sample=False)
        assert streamer.given == alone.given
        assert cache.flush()
    assert (cache.usage.passed_on, cache.usage.restored_tokens) == (0, PROMPT - 1)


def test_an_answer_can_be_trained_on(llama: Any, make: Make) -> None:
    cache = make(llama)
    for _ in range(2):
        out = cache.generate(prompt(PROMPT), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        assert not out.sequences.is_inference()
        llama(out.sequences, labels=out.sequences).loss.backward()
        llama.zero_grad()
        assert cache.flush()


def test_a_returned_cache_is_the_callers_to_write_into(llama: Any, make: Make) -> None:
    cache = make(llama)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    written = threading.Event()
    cache.guard.later(written.wait, 0)  # the put waits behind this
    out = cache.generate(prompt(PROMPT), **options)
    for layer in out.past_key_values.layers:
        layer.keys.zero_()
    written.set()
    assert cache.flush()
    assert_same(cached(cache, prompt(PROMPT), max_new_tokens=4), plain(llama, prompt(PROMPT), max_new_tokens=4))


@pytest.mark.parametrize("model_name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (calls, "read_rows"), (profile.Profiles, "now"), (profile.Profiles, "still"), (attention.Attention, "restore"),
        (attention.Attention, "keep"), (profile.Snapshots, "find"), (profile.Snapshots, "keep"),
        (profile.Recurrent, "advance"), (PrefixCache, "_with_answer"),
    ],
)  # fmt: skip
def test_an_error_of_ours_costs_no_answer(
    model_name: str, owner: Any, name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(model_name)
    cache = make(model)
    ids = prompt(PROMPT)
    expected = plain(model, ids, max_new_tokens=3, do_sample=False)
    assert_same(cached(cache, ids, max_new_tokens=3, do_sample=False), expected)
    assert cache.flush()

    def fails(*args: Any, **options: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(owner, name, fails)
    assert_same(cached(cache, ids, max_new_tokens=3, do_sample=False), expected)


def test_an_error_of_the_engine_is_the_callers(llama: Any, make: Make) -> None:
    def stop(ids: torch.Tensor, scores: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make(llama).generate(prompt(PROMPT), stopping_criteria=StoppingCriteriaList([stop]), max_new_tokens=3)


def test_a_reason_is_logged_once(llama: Any, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cache = make(llama)
    for _ in range(3):
        cache.generate(prompt(PROMPT), num_beams=2, max_new_tokens=2)
    assert [record.message for record in caplog.records if "num_beams" in record.message] == [
        "passed on to the model, or not kept: the setting num_beams is 2"
    ]


def test_a_deep_copy_answers_by_its_own_weights_from_the_same_cache(make: Make) -> None:
    model = build("llama")
    cache = make(model)
    model.generate = cache.generate
    ids, options = prompt(PROMPT), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    assert cache.flush()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, **options), expected)
    other = twin.generate.__self__
    assert other.model is twin
    assert other.usage.restored_tokens == PROMPT - 1
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
        twin.model.embed_tokens.weight.mul_(0.5)
    assert_same(twin.generate(ids, **options), plain(twin, ids, **options))
    assert other.usage.restored_tokens == PROMPT - 1
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_saved_model_loads_as_a_plain_one(make: Make) -> None:
    model = build("llama")
    model.generate = make(model).generate
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ids, options = prompt(PROMPT), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    assert loaded.generate.__self__.usage.passed_on == 1
    assert loaded.generate.__self__.flush()


def test_padding_that_also_ends_sequences_is_no_padding(llama: Any, make: Make) -> None:
    cache = make(llama)
    ids = prompt(PROMPT)
    ids[0, 5] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for ends, passed_on in ((0, 0), (9, 1)):
        assert_same(cached(cache, ids, eos_token_id=ends, **options), plain(llama, ids, eos_token_id=ends, **options))
        assert cache.usage.passed_on == passed_on
