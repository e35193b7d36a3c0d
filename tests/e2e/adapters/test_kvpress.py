"""kvpress itself: pressed caches kept, rebuilt in a fresh wrapper and continued, as its own pipeline answers."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvstore.store import Store
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.kvpress import PressedCache
from tests.conftest import ROOT, DaemonProcess
from tests.e2e.adapters import stubs
from tests.e2e.faults import FAULTS, Faulty

stubs.install(names=stubs.KVPRESS)
kvpress = importlib.import_module("kvpress")  # it asks for modules that have stand-ins, so not before them

TOKENS = 96
Make = Callable[[], Any]
HALF = TOKENS // 2
PRESSES: dict[str, tuple[Make, list[int] | None, int]] = {
    "uniform": (lambda: kvpress.SnapKVPress(0.5), [HALF] * 30, TOKENS),
    "quarter": (lambda: kvpress.KnormPress(0.75), [TOKENS // 4] * 30, TOKENS),
    "ragged": (lambda: kvpress.PyramidKVPress(0.5, window_size=8), None, TOKENS),
    "re-rotated": (lambda: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(0.5)), [HALF] * 30, HALF),
    "head-wise": (lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5)), [TOKENS] * 30, TOKENS),
    "channels": (lambda: kvpress.ThinKPress(0.5), [TOKENS] * 30, TOKENS),
    "composed": (lambda: kvpress.ComposedPress([kvpress.ThinKPress(0.5), kvpress.TOVAPress(0.5)]), [HALF] * 30, TOKENS),
}
"""For each kind: the press, the rows of each layer where they are known, and the position of the next token."""


def patient(cache: Any) -> Guard:
    return Guard(cache, lookup_timeout_s=30, fetch_timeout_s=60)


@pytest.fixture(scope="module")
def model(smollm: tuple[Any, Any]) -> Any:
    return smollm[0]


@pytest.fixture(scope="module")
def context(smollm: tuple[Any, Any]) -> torch.Tensor:
    return torch.tensor([smollm[1]((ROOT / "LICENSE").read_text())["input_ids"][:TOKENS]])


@pytest.fixture(scope="module")
def question(smollm: tuple[Any, Any]) -> torch.Tensor:
    return torch.tensor([smollm[1](" What is this?")["input_ids"]])


@pytest.mark.parametrize("kind", PRESSES)
def test_a_pressed_cache_is_continued_by_another_worker_as_by_kvpress_itself(
    smollm: tuple[Any, Any], context: torch.Tensor, question: torch.Tensor, store: Store, kind: str
) -> None:
    model, tokenizer = smollm
    make, rows, position = PRESSES[kind]
    # kvpress's pipeline runs several tokens at once, which a ragged cache does not allow.
    asked = question if kind != "ragged" else question[:, :1]
    pipeline = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    own = pipeline._forward({"context_ids": context, "questions_ids": [asked]}, max_new_tokens=6, press=make())
    first = PressedCache(model, make(), patient(store), revision="r")
    computed = first.generate(context, asked, 6)
    assert tokenizer.decode(computed, skip_special_tokens=True) == own[0]
    assert first.flush(60)
    for module in first._modules():
        module.masked_key_indices = None  # as in a worker that never pressed
    second = PressedCache(model, make(), patient(store), revision="r")
    past = second.restore(context)
    assert past is not None and past.restored
    assert rows is None or past.rows == rows
    assert len(set(past.rows)) == (1 if kind != "ragged" else 30)
    assert past.position == position
    assert torch.equal(second.generate(context, asked, 6), computed)


def test_a_ragged_cache_takes_questions_of_several_tokens(
    model: Any, context: torch.Tensor, question: torch.Tensor, store: Store
) -> None:
    caches = [
        PressedCache(model, kvpress.PyramidKVPress(0.5, window_size=8), patient(store), revision="r") for _ in range(2)
    ]
    computed = caches[0].generate(context, question, 4)
    assert caches[0].flush(60)
    assert caches[1].prefill(context).restored
    assert torch.equal(caches[1].generate(context, question, 4), computed)


def test_another_press_parameter_weight_or_prompt_is_another_entry(
    model: Any, context: torch.Tensor, store: Store
) -> None:
    guard = patient(store)
    press = kvpress.SnapKVPress(0.5)
    mine = PressedCache(model, press, guard, revision="r")
    mine.prefill(context)
    assert mine.flush(60)
    assert mine.restore(context) is not None
    for other in (
        kvpress.SnapKVPress(0.6), kvpress.SnapKVPress(0.5, window_size=32), kvpress.KnormPress(0.5),
        kvpress.AdaKVPress(kvpress.SnapKVPress(0.5)), kvpress.ComposedPress([kvpress.SnapKVPress(0.5)]),
    ):  # fmt: skip
        assert PressedCache(model, other, guard, revision="r").restore(context) is None
    assert PressedCache(model, kvpress.SnapKVPress(0.5), guard, revision="another").restore(context) is None
    assert PressedCache(model, kvpress.SnapKVPress(0.5), guard, revision="r", salt="b").restore(context) is None
    # A pressed cache is not a prefix: neither a part of the context nor more of it finds it.
    assert mine.restore(context[:, :-1]) is None
    press.compression_ratio = 0.25
    assert mine.restore(context) is None


def test_a_process_that_has_pressed_and_one_that_has_not_find_the_same_weights(model: Any, store: Store) -> None:
    """kvpress hangs the model's rotary embedding into each layer, which is then another buffer of it."""
    ids = torch.tensor([[1, 2, 3]])
    before = PressedCache(model, kvpress.KnormPress(0.5), patient(store))._key(ids)
    with kvpress.KnormPress(0.5)(model):
        pass
    assert before is not None
    assert PressedCache(model, kvpress.KnormPress(0.5), patient(store))._key(ids) == before


@pytest.mark.parametrize(
    ("press", "told"),
    [
        (lambda: kvpress.DecodingPress(kvpress.KnormPress(0.5)), "while decoding"),
        (lambda: type("Mine", (kvpress.KnormPress,), {"__module__": "mine"})(0.5), "positions="),
    ],
)
def test_a_press_that_is_not_understood_is_refused(model: Any, store: Store, press: Make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PressedCache(model, press(), patient(store), revision="r")


@pytest.mark.parametrize("fault", [*FAULTS, "killed"])
def test_a_faulty_cache_costs_no_token(
    model: Any, context: torch.Tensor, question: torch.Tensor, daemon: DaemonProcess, fault: str
) -> None:
    good = PressedCache(model, kvpress.KnormPress(0.5), patient(daemon.client()), revision="r")
    computed = good.generate(context, question, 4)
    assert good.flush(60)
    faulty = Faulty(daemon.client(), fault, slow_s=30)
    if fault == "killed":
        faulty.before_get = daemon.kill
    cache = PressedCache(model, kvpress.KnormPress(0.5), Guard(faulty, fetch_timeout_s=1), revision="r")
    assert torch.equal(cache.generate(context, question, 4), computed)
    faulty.gate.set()


@pytest.mark.parametrize(("kind", "most"), [("channels", 0.8), ("head-wise", 0.6), ("composed", 0.4)])
def test_what_a_press_took_away_is_not_stored_and_comes_back_as_zeros(
    model: Any, context: torch.Tensor, store: Store, kind: str, most: float
) -> None:
    """ThinK leaves zeros in half the key channels, head-wise presses rows that decoding never looks at."""
    make, _rows, _position = PRESSES[kind]
    first = PressedCache(model, make(), patient(store))
    made = first.prefill(context)
    marks = [getattr(module, "masked_key_indices", None) for module in first._modules()]
    assert first.flush(60)
    hit = store.get(first._key(context))
    assert hit is not None
    dense = len(marks) * 2 * TOKENS * made.cache.layers[0].keys.shape[1] * made.cache.layers[0].keys.shape[3] * 4
    assert sum(x.numel() * x.element_size() for x in hit.tensors.values()) <= most * dense
    again = first.restore(context)
    assert again is not None
    for was, now, gone in zip(made.cache.layers, again.cache.layers, marks, strict=True):
        for x, y in ((was.keys, now.keys), (was.values, now.values)):
            due = x.clone()
            if gone is not None:
                due[gone] = 0
            assert torch.equal(y, due)
    for module, gone in zip(first._modules(), marks, strict=True):
        found = module.masked_key_indices
        assert (found is None) == (gone is None)
        if gone is not None:
            pairs = (set(zip(*(x.tolist() for x in marked), strict=True)) for marked in (gone, found))
            assert next(pairs) == next(pairs)
