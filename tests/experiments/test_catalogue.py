"""The list of strategies: the 25 rows in their order, the controls first, and what a word means."""

import re

import pytest

pytest.importorskip("torch")

from experiments import ExperimentFailed
from experiments.catalogue import CATEGORIES, STRATEGIES, chosen
from experiments.run import checked_model, checked_text, settings
from kvstore.config import StoreConfig, from_mapping
from tests.conftest import ROOT

SEED = [
    "baseline", "attention-sink", "minicache", "vllm", "transformers", "h2o", "pyramidkv", "8-bit", "8-bit-by-error",
    "4-bit", "sliding-window", "grouped-query-attention", "lorc-8-bit", "lorc-8-bit-uniform", "lorc-fp16",
    "scheduling-fcfs", "scheduling-prefix-aware", "smoothquant", "smoothquant-0.5", "smoothquant-0.8", "rwkv", "mamba",
    "architecture-alteration", "architecture-alteration-10x", "architecture-alteration-20x",
]  # fmt: skip


def test_the_25_rows_have_their_numbers_names_and_order():
    assert [(s.row, s.name) for s in STRATEGIES if 1 <= s.row <= 25] == list(enumerate(SEED, start=1))


def test_the_two_controls_come_first_and_every_number_and_name_is_one_strategy():
    assert [s.name for s in STRATEGIES[:2]] == ["baseline", "no-context"]
    assert len({s.row for s in STRATEGIES}) == len({s.name for s in STRATEGIES}) == len(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_a_strategy_says_where_it_is_from_and_what_differs(strategy):
    assert strategy.source and strategy.kept
    assert len(type(strategy).__doc__ or "") > 10


def test_a_word_is_a_name_a_category_or_all_and_brings_the_controls():
    assert [s.name for s in chosen(["4-bit"])] == ["baseline", "no-context", "4-bit"]
    assert {s.category for s in chosen(["rank"])} == {"control", "rank"}
    assert chosen(["all"]) == chosen([]) == STRATEGIES


@pytest.mark.parametrize(("typo", "nearest"), [("minicach", "minicache"), ("h20", "h2o"), ("evicton", "eviction")])
def test_an_unknown_name_names_the_nearest(typo, nearest):
    with pytest.raises(ExperimentFailed, match=f"no strategy or category '{typo}'; the nearest is '{nearest}'"):
        chosen([typo])


def test_the_daemons_settings_are_ones_it_takes_with_a_namespace_for_each_lossy_strategy():
    import tomllib

    config = from_mapping(StoreConfig, tomllib.loads(settings(STRATEGIES))["store"])
    lossy = {s.name: s.policy for s in STRATEGIES if s.policy is not None}
    assert dict(config.warm.namespaces) == lossy


def test_a_wrong_text_or_model_is_one_sentence(tmp_path):
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    for wrong in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(ExperimentFailed, match=str(wrong)) as caught:
            checked_text(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExperimentFailed, match="is no model") as caught:
        checked_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_category_has_a_colour():
    from experiments.report import COLOURS

    assert set(CATEGORIES) == set(COLOURS)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_every_row_has_a_paragraph_of_its_own(strategy):
    page = (ROOT / "docs" / "experiments.md").read_text()
    found = re.search(
        rf"^\*\*{strategy.row} {re.escape(strategy.name)}\.?\*\*(.+?)\n\n", page, re.MULTILINE | re.DOTALL
    )
    assert found and len(found[1]) > 40
