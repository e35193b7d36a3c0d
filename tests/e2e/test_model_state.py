"""What a model computes changes under a PrefixCache: the answers are always those of the model as it is now."""

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.llama import modeling_llama

from kvstore.store import Store
from kvstored_client.integrations.transformers import PrefixCache
from kvstored_client.integrations.transformers import weights as weights_module

from .conftest import Patient
from .tiny import assert_same, build, cached, plain, prompt

peft = pytest.importorskip("peft")

ALL = os.environ.get("KVSTORED_GENERATE_ALL") == "1"
"""Also what is nearly the same as another case."""
PROMPT = 24
OPTIONS = {"max_new_tokens": 3, "do_sample": False}
Make = Callable[..., PrefixCache]


@pytest.fixture
def make(store: Store, patient: Patient) -> Make:
    return lambda model, **options: PrefixCache(model, patient(store), chunk_tokens=16, **options)


def restored(cache: PrefixCache, **options: Any) -> int | None:
    """Asks once, checks the answer against the model alone. Returns the tokens restored; None: passed on."""
    before = (cache.usage.restored_tokens, cache.usage.passed_on)
    got = cached(cache, prompt(PROMPT), **OPTIONS, **options)
    assert_same(got, plain(cache.model, prompt(PROMPT), **OPTIONS, **options))
    assert cache.flush()
    assert cache.guard.failures == cache.guard.dropped == 0
    return None if cache.usage.passed_on > before[1] else cache.usage.restored_tokens - before[0]


def query(model: Any) -> torch.nn.Parameter:
    return model.model.layers[0].self_attn.k_proj.weight


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(prompt(), labels=prompt()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        query(model).mul_(-1)


def new_memory(model: Any) -> None:
    query(model).data = query(model).data * -1


def through_numpy(model: Any) -> None:
    query(model).detach().numpy()[3, 5] += 4


def load(model: Any) -> None:
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})


def new_parameter(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(32, 48))


def new_module(model: Any) -> None:
    model.model.layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()


def faster_rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(3)


def scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def fewer_layers(model: Any) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


CHANGES: dict[str, Callable[[Any], object]] = {
    "an optimizer's step": step,
    "a write torch counts": lambda model: torch.nn.init.ones_(query(model)),
    "data.mul_": lambda model: query(model).data.mul_(-1),
    "data.copy_": lambda model: query(model).data.copy_(query(model).data.flip(0)),
    "one element of data": lambda model: query(model).data[3, 5].add_(4),
    "inference mode": in_inference_mode,
    "other memory": new_memory,
    "through numpy": through_numpy,
    "load_state_dict": load,
    "another parameter": new_parameter,
    "another module": new_module,
    "RoPE in place": faster_rope,
    "an attribute": scaling,
    "a norm's epsilon": epsilon,
    "fewer layers": fewer_layers,
    "tied weights": tied,
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "another attention": eager,
    "another head dimension's scale in the configuration": lambda model: setattr(model.config, "sliding_window", 4),
}


VOUCHED = ("an optimizer's step", "data.mul_", "one element of data", "inference mode", "load_state_dict", "bfloat16")
"""Changes tried with the caller's word for the weights, too."""


@pytest.mark.parametrize(("name", "revision"), [*((n, None) for n in CHANGES), *((n, "mine") for n in VOUCHED)])
def test_a_change_in_place_is_noticed_at_the_next_call(name: str, revision: str | None, make: Make) -> None:
    model = build("llama")
    cache = make(model, revision=revision)
    assert restored(cache) == 0
    assert restored(cache) == PROMPT - 1
    CHANGES[name](model)
    assert restored(cache) in (0, None)


def test_the_same_state_in_another_process_is_the_same_identity(make: Make) -> None:
    first, second = make(build("llama")), make(build("llama"))
    assert restored(first) == 0
    assert restored(second) == PROMPT - 1


def test_weights_changed_before_the_first_call_are_not_vouched_for(make: Make) -> None:
    good, bad = make(build("llama"), revision="r"), make(build("llama"), revision="r")
    query(bad.model).data.mul_(-1)
    assert restored(good) == 0
    assert restored(bad) == 0


def test_an_element_that_no_sample_holds_is_found_when_its_block_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "BLOCK_NBYTES", 1024)
    monkeypatch.setattr(weights_module, "LEAST_NBYTES", 1024)
    monkeypatch.setattr(weights_module, "BUDGET_NBYTES", 8 * 1024)
    x = torch.zeros(10, 1024)
    watched, calls = weights_module.Weights(), 40 * 1024 // (8 * 1024)
    watched.look({1: x})
    watched.content(1, x)
    x.data[4, 7] = 1
    found = [watched.look({1: x}) for _ in range(calls)]
    assert [1] in map(list, found)
    assert not any(watched.look({1: x}) for _ in range(calls))


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_write_that_torch_does_not_count_is_found_before_any_block_is_read(rows: int) -> None:
    x, other = torch.zeros(rows, 64), torch.zeros(3)
    watched = weights_module.Weights()
    assert watched.look({1: x, 2: other}, read=False) == {1, 2}
    assert not watched.look({1: x, 2: other}, read=False)
    before = watched.content(1, x)
    x.data.add_(1)
    assert watched.look({1: x, 2: other}, read=False) == {1}
    assert watched.content(1, x) != before
    assert not watched.look({1: x, 2: other}, read=False)


def patched_rope(*args: Any, **options: Any) -> Any:
    q, k = modeling_llama.rotate_half(args[0]), args[1]
    return q, k * 1.25


def test_a_function_replaced_in_the_models_module_is_another_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(build("llama"))
    restored(cache)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", patched_rope)
    assert restored(cache) == 0


def test_a_forward_replaced_on_the_class_is_another_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(build("llama"))
    restored(cache)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert restored(cache) == 0


def test_autocast_is_another_state(make: Make) -> None:
    cache = make(build("llama"))
    restored(cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert restored(cache) == 0
    assert restored(cache) == PROMPT - 1


def steer(module: Any, args: Any, output: Any) -> Any:
    return output + 1 if isinstance(output, torch.Tensor) else output


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(steer)


def hooked_before(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(x.repeat(1, 1, 2)[..., :48])


@pytest.mark.parametrize("change", [hooked, hooked_before, replaced])
def test_what_cannot_be_read_off_a_model_is_passed_on(
    change: Callable[[Any], object], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    cache = make(model)
    assert restored(cache) == 0
    change(model)
    caplog.set_level(logging.WARNING)
    assert restored(cache) is None
    assert restored(cache) is None
    assert len(caplog.records) == 1


def test_training_mode_is_passed_on_and_evaluation_mode_finds_all_again(make: Make) -> None:
    model = build("llama")
    cache = make(model)
    restored(cache)
    model.model.layers[1].train()
    assert restored(cache) is None
    model.eval()
    assert restored(cache) == PROMPT - 1


def test_hidden_states_asked_for_once_leave_the_cache_in_use(make: Make) -> None:
    cache = make(build("llama"))
    restored(cache)
    assert restored(cache, output_hidden_states=True, return_dict_in_generate=True) is None
    assert restored(cache) == PROMPT - 1


# ---- adapters -------------------------------------------------------------------------------------------------------


def lora(seed: int) -> Any:
    torch.manual_seed(seed)
    return peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def with_two_adapters() -> Any:
    model = peft.get_peft_model(build("llama"), lora(1), adapter_name="one")
    model.add_adapter("two", lora(2))
    return model.eval()


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["one"] *= 3


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    model(prompt(), labels=prompt()).loss.backward()
    optimizer.step()


def loaded_over(model: Any) -> None:
    model.delete_adapter("one")
    model.add_adapter("one", lora(7))
    model.set_adapter("one")
    model.eval()


def one_element(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "lora_A.one" in name).data[0, 0] += 9


def mixed(model: Any) -> None:
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type="linear")
    model.set_adapter("both")
    model.eval()


ADAPTERS: dict[str, Callable[[Any], object]] = {
    "set_adapter": lambda model: model.set_adapter("two"),
    "merged": lambda model: model.merge_adapter(),
    "scaled": scaled,
    "trained": trained,
    "one element": one_element,
    "loaded over the same name": loaded_over,
    "deleted": lambda model: model.delete_adapter("one"),
    "mixed": mixed,
    "unloaded": lambda model: model.unload(),
}


BY_THE_BASE = ("set_adapter", "unloaded")
"""Changes tried with the cache around the base model, too."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "wrapped"),
    [(name, "adapted") for name in ADAPTERS] + [(name, "base") for name in (ADAPTERS if ALL else BY_THE_BASE)],
)
def test_an_adapter_changed_in_any_way_is_another_state(name: str, wrapped: str, make: Make) -> None:
    model = with_two_adapters()
    cache = make(model.get_base_model() if wrapped == "base" else model, revision="base")
    assert restored(cache) == 0
    assert restored(cache) == PROMPT - 1
    ADAPTERS[name](model)
    assert restored(cache) in (0, None)


@pytest.mark.filterwarnings("ignore")
def test_adapters_switched_to_and_fro_find_their_own_entries(make: Make) -> None:
    model = with_two_adapters()
    cache = make(model)
    for adapter, expected in (("one", 0), ("two", 0), ("one", PROMPT - 1), ("two", PROMPT - 1)):
        model.set_adapter(adapter)
        assert restored(cache) == expected
    for expected in (0, PROMPT - 1):
        with model.disable_adapter():
            assert restored(cache) == expected


@pytest.mark.filterwarnings("ignore")
def test_the_one_line_before_peft_wraps_the_model(make: Make) -> None:
    base = build("llama")
    cache = make(base)
    base.generate = cache.generate
    restored(cache)
    model = peft.get_peft_model(base, lora(1)).eval()
    for expected in (0, PROMPT - 1):
        before = cache.usage.restored_tokens
        got = model.generate(prompt(PROMPT), **OPTIONS)
        assert_same(got, plain(base, prompt(PROMPT), **OPTIONS))
        assert cache.usage.restored_tokens - before == expected
        assert cache.flush()


@pytest.mark.filterwarnings("ignore")
def test_transformers_own_adapters_are_read_as_state(make: Make) -> None:
    model = build("llama")
    cache = make(model)
    assert restored(cache) == 0
    model.add_adapter(lora(1), adapter_name="x")
    model.eval()
    assert restored(cache) == 0
    model.disable_adapters()
    assert restored(cache) == 0
    model.enable_adapters()
    assert restored(cache) == PROMPT - 1


@pytest.mark.filterwarnings("ignore")
def test_a_batch_of_several_adapters_is_passed_on(make: Make) -> None:
    model = with_two_adapters()
    cache = make(model)
    restored(cache)
    for name in ("two", "__base__"):
        assert restored(cache, adapter_names=[name]) is None


PROMPT_LEARNING = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=16, num_transformer_submodules=1
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", num_attention_heads=2, token_dim=16
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", ["base", "adapted"])
@pytest.mark.parametrize("name", PROMPT_LEARNING)
def test_virtual_tokens_are_passed_on(name: str, wrapped: str, make: Make) -> None:
    base = build("llama")
    cache = make(base)
    assert restored(cache) == 0
    model = peft.get_peft_model(base, PROMPT_LEARNING[name]()).eval()
    cache = make(base if wrapped == "base" else model)
    expected = model.generate(input_ids=prompt(PROMPT), **OPTIONS)
    if wrapped == "base":
        base.generate = cache.generate
        got = model.generate(input_ids=prompt(PROMPT), **OPTIONS)
    else:
        got = cache.generate(input_ids=prompt(PROMPT), **OPTIONS)
    assert torch.equal(got, expected)
    assert (cache.usage.calls, cache.usage.passed_on) == (0, 1)


# ---- families -------------------------------------------------------------------------------------------------------

SERVED = {"gpt2", "qwen3", "gemma2", "opt", "bloom", "falcon", "neox", "deepseek_v2", "deepseek_v3", "bert_decoder"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*sorted(SERVED), "bart_decoder", "bart", "t5", "bert", "qwen2_vl"])
def test_a_family_is_served_where_its_cache_says_all(name: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name)
    cache = make(model)
    due = PROMPT - 1 if name in SERVED or name == "bart_decoder" else None
    assert restored(cache) == (0 if due else None)
    assert restored(cache) == due
    if due is None:
        assert len(caplog.records) == 1


@pytest.mark.parametrize(("name", "served"), [("llama", True), ("bloom", True), ("opt", True), ("bart_decoder", False)])
def test_padding_is_served_only_where_it_moves_no_position(name: str, served: bool, make: Make) -> None:
    model = build(name)
    cache = make(model)
    ids, mask = prompt(PROMPT, rows=2), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :9] = 0
    row = ids[1:, 9:]
    options = {"max_new_tokens": 3, "do_sample": False}
    for given in ({"inputs": ids, "attention_mask": mask}, {"inputs": ids, "attention_mask": mask}, {"inputs": row}):
        assert_same(cached(cache, **given, **options), plain(model, **given, **options))
        assert cache.flush()
    assert cache.usage.passed_on == (0 if served else 2)


def test_positions_left_on_a_vision_model_by_a_picture_touch_no_later_text(make: Make) -> None:
    model = build("qwen2_vl")
    cache = make(model)
    restored(cache)
    model.model.rope_deltas = torch.tensor([[-7]])
    assert restored(cache) is None


def test_keys_and_values_of_two_widths_come_back_bit_for_bit(make: Make) -> None:
    model = build("deepseek_v3")
    cache = make(model)
    with torch.no_grad():
        past = cache.restore(prompt(PROMPT))
        model(prompt(PROMPT), past_key_values=past)
        cache.commit(past, prompt(PROMPT))
        assert cache.flush()
        found = cache.restore(prompt(PROMPT))
    assert found.restored == PROMPT - 1
    for one, other in zip(found.layers, past.layers, strict=True):
        assert one.keys.shape[-1] != one.values.shape[-1]
        assert torch.equal(one.keys, other.keys[:, :, : PROMPT - 1])
        assert torch.equal(one.values, other.values[:, :, : PROMPT - 1])


def test_nothing_is_kept_by_hand_of_a_model_that_changed_in_between(make: Make) -> None:
    model = build("llama")
    cache = make(model)
    with torch.no_grad():
        past = cache.restore(prompt(PROMPT))
        model(prompt(PROMPT), past_key_values=past)
        query(model).mul_(-1)
        cache.commit(past, prompt(PROMPT))
    assert cache.flush()
    assert cache.restore(prompt(PROMPT)).restored == 0


def test_the_models_own_settings_stay_what_they_were(make: Make) -> None:
    model = build("llama")
    model.generation_config = own = GenerationConfig(pad_token_id=0, num_beams=2)
    make(model).generate(prompt(PROMPT), num_beams=1, max_new_tokens=2)
    assert model.generation_config is own
    assert own.num_beams == 2
