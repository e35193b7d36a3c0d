"""One contract over all strategies of this environment, on a tiny model: what the store gives back goes on the same."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from experiments import Strategy, Tensors, order
from experiments.catalogue import STRATEGIES, named
from experiments.lab import Lab, digest, quality
from experiments.needles import answered
from experiments.order import Waiting, first_come, longest_prefix
from experiments.worker import Bench, Job
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

HERE = [s for s in STRATEGIES if not s.engine and s.name != "vllm"]


@pytest.fixture(scope="module")
def bench(tiny_model: Path, text: Path) -> Bench:
    torch.set_num_threads(1)
    return Bench(Job("get", "", str(tiny_model), str(text), 96, 12, 1, ()))


@pytest.fixture(scope="module")
def state_of(bench: Bench) -> Callable[[Strategy], Tensors]:
    """A strategy's state, made once: some are trained."""
    return lru_cache(maxsize=None)(lambda strategy: strategy.state(bench.lab(strategy.units)))


def through_a_store(strategy, state):
    """What a store gives back once the state has left hot, encoded as the strategy's policy lets it."""
    policy = strategy.policy
    warm = WarmConfig(1 << 28)
    if policy is not None:
        warm = WarmConfig(1 << 28, policy.codec, policy.max_relative_error, policy.layers)
    with Store.open(StoreConfig(HotConfig(1 << 28), warm), framework="torch", background=False) as store:
        assert store.put(b"key", state, fidelity="exact" if policy is None else "auto")
        store.demote(b"key")
        hit = store.get(b"key")
        assert hit is not None
        return hit


@pytest.mark.parametrize("strategy", HERE, ids=lambda s: s.name)
def test_a_state_goes_on_from_the_store_as_if_it_had_never_been_there(bench: Bench, state_of, strategy):
    lab, state = bench.lab(strategy.units), state_of(strategy)
    never_stored = digest(strategy.resume(lab, {n: x.clone() for n, x in state.items()})(lab.rest))
    if not state:
        assert strategy.name == "no-context"
        return
    hit = through_a_store(strategy, state)
    logits = strategy.resume(lab, hit.tensors)(lab.rest)
    assert logits.shape == (12, 256)
    if strategy.policy is None:
        assert digest(logits) == never_stored
    else:
        assert hit.lossy
        assert quality(strategy.resume(lab, state)(lab.rest), logits, lab.rest).kl < 0.01


@pytest.mark.parametrize("strategy", HERE, ids=lambda s: s.name)
def test_resuming_twice_goes_on_twice_alike(bench: Bench, state_of, strategy):
    lab, state = bench.lab(strategy.units), state_of(strategy)
    first, second = (strategy.resume(lab, state)(lab.rest) for _ in range(2))
    assert torch.equal(first, second)


def test_steps_one_by_one_are_as_good_as_all_at_once(bench: Bench):
    lab = bench.lab("tokens")
    for name in ("baseline", "architecture-alteration", "cartridge-10x"):
        strategy = named(name)
        state = strategy.state(lab)
        whole = strategy.resume(lab, state)(lab.rest)
        step = strategy.resume(lab, state)
        assert torch.allclose(whole, torch.cat([step(lab.rest[:, i : i + 1]) for i in range(12)]), atol=1e-4)


def test_minicache_gives_back_magnitudes_and_the_tokens_it_kept(bench: Bench):
    lab, strategy = bench.lab("tokens"), named("minicache")
    k = lab.prefix[0]
    back = strategy._parted("k", strategy.state(lab))
    first = k.shape[0] - 2 * (k.shape[0] - strategy.state(lab)["k"].shape[0])
    assert torch.equal(back[:first], k[:first])
    norms = [x[first:].flatten(2).norm(dim=-1) for x in (k, back)]
    assert torch.allclose(*norms, rtol=2e-3)
    kept = (back[first:] - k[first:]).flatten(2).norm(dim=-1) < 2e-3 * norms[0]
    assert int(kept.sum(1).min()) >= int(0.05 * k.shape[1])


def test_lorc_of_full_rank_loses_nothing_but_half_precision(bench: Bench):
    class Full(type(named("lorc-fp16"))):
        share = 1.0

    lab = bench.lab("tokens")
    logits = Full().resume(lab, Full().state(lab))(lab.rest)
    assert quality(bench.exact, logits, lab.rest).kl < 1e-6


def test_training_makes_a_cartridge_better_than_the_rows_it_began_with(bench: Bench):
    class Untrained(type(named("cartridge-10x"))):
        steps = 0

    lab = bench.lab("tokens")
    kls = []
    for strategy in (named("cartridge-10x"), Untrained()):
        ids = lab.ids[:, 24:72]
        after = Lab(lab.model, lab.tokenizer, lab.ids, ids, ())
        exact = named("baseline").resume(after, named("baseline").state(lab))(ids)
        kls.append(quality(exact, strategy.resume(after, strategy.state(lab))(ids), ids).kl)
    assert kls[0] < kls[1]


def test_a_needle_is_found_by_a_model_that_says_it_and_not_by_one_that_errs_in_a_digit(bench: Bench):
    question = bench.lab("tokens", "needles").questions[0]

    def says(answer):
        def step(ids):
            logits = torch.zeros(ids.shape[1], 256)
            for i, token in enumerate(answer.tolist()):
                logits[question.ids.shape[1] - 1 + i, token] = 1.0
            return logits

        return step

    wrong = question.answer.clone()
    wrong[-1] += 1
    assert answered(says(question.answer), question)
    assert not answered(says(wrong), question)


def test_the_needles_are_in_the_document_and_have_text_behind_them(bench: Bench):
    lab = bench.lab("tokens", "needles")
    document = bytes(lab.tokenizer.decode(lab.ids[0]), "utf-8").decode()
    assert lab.ids.shape[1] == 96
    for question in lab.questions:
        fact = lab.tokenizer.decode(torch.cat((question.ids[0], question.answer))).strip()
        assert fact in document
        assert not document.endswith(f"{fact}.\n")


class TestTheOrderOfAQueue:
    def test_longest_prefix_goes_first_and_the_oldest_of_those(self):
        queue = [Waiting([1]), Waiting([2, 2]), Waiting([2, 3])]
        assert longest_prefix(queue, lambda tokens: tokens[0]) == 1
        assert first_come(queue, lambda tokens: tokens[0]) == 0

    def test_nobody_is_overtaken_more_often_than_the_bound(self):
        # One request that shares nothing, before a flood of those that do.
        queue = [Waiting([0]), *(Waiting([9]) for _ in range(40))]
        overtaken = 0
        while True:
            at = longest_prefix(queue, lambda tokens: tokens[0], most=5)
            if at == 0:
                break
            for waiting in queue[:at]:
                waiting.overtaken += 1
            queue.pop(at)
            overtaken += 1
        assert overtaken == queue[0].overtaken == 5

    @pytest.mark.parametrize("tokens", [128, 512, 1024])
    def test_prefix_aware_computes_a_third_and_reads_no_disk_where_first_come_does(self, bench: Bench, tokens):
        lab = bench.lab("tokens")
        # The text again and again, each time another beginning.
        ids = torch.cat([lab.ids.roll(i, 1) for i in range(11)], dim=1)[:, :tokens]
        long = Lab(lab.model, lab.tokenizer, ids, lab.rest, ())
        runs = {
            (name, disk): order.measured(long, rule, disk=disk, counted=True)
            for name, rule in (("fcfs", first_come), ("prefix", longest_prefix))
            for disk in (False, True)
        }
        assert runs["prefix", False].computed * 3 <= runs["fcfs", False].computed
        assert runs["prefix", True].chunks.get("cold", 0) == 0 < runs["fcfs", True].chunks["cold"]
        assert max(run.overtaken_most for run in runs.values()) <= order.OVERTAKEN_MAX

    def test_what_is_computed_is_the_same_where_the_model_runs(self, bench: Bench):
        for rule in (first_come, longest_prefix):
            real, counted = (order.measured(bench.lab("tokens"), rule, disk=False, counted=x) for x in (False, True))
            assert (real.computed, real.chunks, real.overtaken_most) == (
                counted.computed, counted.chunks, counted.overtaken_most,
            )  # fmt: skip
