"""transformers with the real model: the same tokens as without the store, whatever the store does."""

import signal
import threading
import time
from typing import Any

import pytest
import torch

from kvstore.store import Store
from kvstored_client import Client
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers import PrefixCache
from tests.conftest import ROOT, DaemonProcess

from .conftest import Patient
from .faults import FAULTS, SLOW_S, Faulty

pytestmark = pytest.mark.model
NEW = {"max_new_tokens": 4, "do_sample": False}
TEXT = (ROOT / "LICENSE").read_text()


@pytest.fixture(scope="module")
def prompt(smollm: Any) -> torch.Tensor:
    """90 tokens, as a batch of one."""
    return torch.tensor([smollm[1](TEXT)["input_ids"][:90]])


@pytest.fixture(scope="module")
def expected(smollm: Any, prompt: torch.Tensor) -> torch.Tensor:
    """What the model answers without a store."""
    return smollm[0].generate(prompt, **NEW)


@pytest.fixture(scope="module")
def revision(smollm: Any) -> str:
    return "test"


def test_a_second_process_gets_the_same_tokens_and_computes_one_token_of_the_prompt(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, daemon: DaemonProcess, patient: Patient
) -> None:
    first = PrefixCache(smollm[0], patient(daemon.client()))
    assert torch.equal(first.generate(prompt, **NEW), expected)
    assert first.usage.restored_tokens == 0
    assert first.flush()
    second = PrefixCache(smollm[0], patient(daemon.client()))
    assert torch.equal(second.generate(prompt, **NEW), expected)
    assert second.usage.restored_tokens == prompt.shape[1] - 1
    assert second.guard.failures == 0


def test_logits_from_a_restored_prefix_are_bit_equal(
    smollm: Any, prompt: torch.Tensor, store: Store, patient: Patient
) -> None:
    model = smollm[0]
    cache = PrefixCache(model, patient(store))
    with torch.inference_mode():
        past = cache.restore(prompt)
        assert past.restored == 0
        model(prompt[:, :-1], past_key_values=past)
        cache.commit(past, prompt)
        assert cache.flush()
        never_stored = model(prompt[:, -1:], past_key_values=past).logits
        restored = cache.restore(prompt)
        assert restored.get_seq_length() == restored.restored == prompt.shape[1] - 1
        assert torch.equal(model(prompt[:, -1:], past_key_values=restored).logits, never_stored)


def test_the_next_turn_of_a_chat_starts_after_the_last_answer(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, store: Store, patient: Patient
) -> None:
    model, tokenizer = smollm
    cache = PrefixCache(model, patient(store))
    cache.generate(prompt, **NEW)
    assert cache.flush()
    turn = torch.cat([expected, torch.tensor([tokenizer(" And what else?")["input_ids"]])], 1)
    without = model.generate(turn, **NEW)
    assert torch.equal(cache.generate(turn, **NEW), without)
    assert cache.usage.restored_tokens == expected.shape[1] - 1


def test_turns_of_a_chat_through_a_pipeline_answer_as_without_a_store(
    smollm: Any, store: Store, patient: Patient
) -> None:
    """Messages, the model's own template, three turns: each but the first begins with what the last one kept."""
    from transformers import pipeline

    model, tokenizer = smollm
    new = {"max_new_tokens": 6, "do_sample": False}

    def talk() -> list[str]:
        chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
        messages: list[dict[str, str]] = []
        for question in ("What is a licence?", "Who may copy it?", "Thank you. And sell it?"):
            messages.append({"role": "user", "content": question})
            messages = chat(messages, **new)[0]["generated_text"]
            cache.flush()
        return [message["content"] for message in messages if message["role"] == "assistant"]

    cache = PrefixCache(model, patient(store))
    expected = talk()
    assert cache.usage.calls == 0
    model.generate = cache.generate
    try:
        restored = []
        for _ in range(2):
            assert talk() == expected
            restored.append(cache.usage.restored_tokens)
    finally:
        del model.generate
    assert cache.usage.calls == 6
    assert cache.usage.passed_on == 0
    assert restored[0] > cache.usage.prompt_tokens / 6  # two of the first three calls continued what was kept
    assert restored[1] - restored[0] == cache.usage.prompt_tokens // 2 - 3  # all but the last token of each prompt


def test_a_left_padded_batch_restores_what_all_rows_have(smollm: Any, store: Store, patient: Patient) -> None:
    model, tokenizer = smollm
    tokenizer.padding_side = "left"
    batch = tokenizer([TEXT[:300], TEXT[:150], TEXT[900:1100]], return_tensors="pt", padding=True)
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    expected = model.generate(**batch, **NEW)
    cache = PrefixCache(model, patient(store))
    assert torch.equal(cache.generate(**batch, **NEW), expected)
    assert cache.flush()
    assert torch.equal(cache.generate(**batch, **NEW), expected)
    assert cache.usage.restored_tokens == int((lengths - 1).sum())
    # One of the rows, alone and without its padding.
    row = torch.tensor([tokenizer(TEXT[900:1100])["input_ids"]])
    assert torch.equal(cache.generate(row, **NEW), model.generate(row, **NEW))
    assert cache.usage.restored_tokens == int((lengths - 1).sum()) + row.shape[1] - 1


def test_model_generate_can_be_replaced_by_one_line(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, store: Store, patient: Patient
) -> None:
    model = smollm[0]
    cache = PrefixCache(model, patient(store))
    model.generate = cache.generate
    try:
        out = model.generate(input_ids=prompt, return_dict_in_generate=True, **NEW)
        assert torch.equal(out.sequences, expected)
        assert cache.usage.calls == 1
    finally:
        del model.generate


def test_other_weights_and_other_tenants_share_nothing(
    smollm: Any, prompt: torch.Tensor, store: Store, patient: Patient
) -> None:
    model = smollm[0]
    guard = patient(store)
    mine = PrefixCache(model, guard, salt="a")
    mine.generate(prompt, **NEW)
    assert mine.flush()
    theirs = PrefixCache(model, guard, salt="b")
    assert theirs.restore(prompt).restored == 0
    weight = model.model.layers[3].mlp.down_proj.weight
    kept = weight.data[0, 0].item()
    weight.data[0, 0] += 0.125
    try:
        assert PrefixCache(model, guard, salt="a").restore(prompt).restored == 0
    finally:
        weight.data[0, 0] = kept
    assert PrefixCache(model, guard, salt="a").restore(prompt).restored == prompt.shape[1] - 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"attention_mask": torch.tensor([[1] * 19 + [0]])},
        {"position_ids": torch.arange(20).unsqueeze(0)},
    ],
)
def test_what_is_not_understood_is_passed_on(
    smollm: Any, prompt: torch.Tensor, store: Store, patient: Patient, options: dict[str, Any]
) -> None:
    cache = PrefixCache(smollm[0], patient(store), revision="r")
    torch.manual_seed(0)
    out = cache.generate(prompt[:, :20], **{**NEW, "max_new_tokens": 2, **options})
    assert out.shape[1] == 22
    assert (cache.usage.passed_on, cache.usage.calls) == (1, 0)


def test_nf4_entries_answer_nearly_the_same(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, store: Store, patient: Patient
) -> None:
    cache = PrefixCache(smollm[0], patient(store), fidelity="auto")
    cache.generate(prompt, **NEW)
    assert cache.flush()
    assert store.demote(*[entry.key for entry in store.entries()]) > 0
    out = cache.generate(prompt, **NEW)
    assert cache.usage.restored_tokens == prompt.shape[1] - 1
    agreement = int((out == expected)[0, prompt.shape[1] :].sum())
    print(f"NF4: {agreement} of {NEW['max_new_tokens']} tokens agree")  # noqa: T201 - the figure is what is asked for
    assert out.shape == expected.shape


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_cache_costs_no_token_and_no_deadline(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, store: Store, patient: Patient, fault: str
) -> None:
    good = PrefixCache(smollm[0], patient(store), revision="r")
    good.generate(prompt, **NEW)
    assert good.flush()
    guard = Guard(Faulty(store, fault))
    cache = PrefixCache(smollm[0], guard, revision="r")
    start = time.monotonic()
    cache.restore(prompt)
    # Two lookups (whole chunks, then tails), 50 ms each, and a fetch where one was promised.
    assert time.monotonic() - start < SLOW_S / 2
    assert torch.equal(cache.generate(prompt, **NEW), expected)


def test_a_daemon_killed_between_the_lookup_and_the_get_costs_no_token(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, daemon: DaemonProcess, patient: Patient
) -> None:
    good = PrefixCache(smollm[0], patient(daemon.client()), revision="r")
    good.generate(prompt, **NEW)
    assert good.flush()
    client = Client(daemon.address)
    killed = threading.Event()

    def kill() -> None:
        if not killed.is_set():
            killed.set()
            daemon.signal(signal.SIGKILL)

    faulty = Faulty(client, "none")
    faulty.before_get = kill
    cache = PrefixCache(smollm[0], Guard(faulty, lookup_timeout_s=10), revision="r")
    assert torch.equal(cache.generate(prompt, **NEW), expected)
    assert killed.is_set()
    assert cache.usage.restored_tokens == 0
    assert torch.equal(cache.generate(prompt, **NEW), expected)
    client.close()


def test_a_stopped_daemon_holds_nobody_up(
    smollm: Any, prompt: torch.Tensor, expected: torch.Tensor, daemon: DaemonProcess
) -> None:
    guard = Guard(daemon.client(on_error="miss"))
    cache = PrefixCache(smollm[0], guard, revision="r")
    daemon.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert cache.restore(prompt).restored == 0
        assert time.monotonic() - start < SLOW_S / 2  # the client's own deadline is longer
        assert torch.equal(cache.generate(prompt, **NEW), expected)
    finally:
        daemon.signal(signal.SIGCONT)
