"""The demo runs as a user runs it, in a short form: two workers, a restart between them, the real model."""

import copy
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

SHORT = ["--tokens", "150", "--chunk-tokens", "64", "--new-tokens", "6", "--repeats", "2"]


def demo_module():
    # Not at the top: it imports transformers, seconds that only these tests should pay.
    pytest.importorskip("transformers")
    from examples import demo

    return demo


def model_installed() -> bool:
    try:
        from experiments.smollm import gguf_file
    except ImportError:
        return False
    return gguf_file() is not None


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    if not model_installed():
        pytest.skip("the model is not installed: make demo")
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--json", *SHORT],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.model
class TestAShortDemo:
    def test_every_line_has_the_form_of_the_benches(self, lines):
        for line in lines:
            assert line.keys() == {"name", "params", "value", "unit", "ratios"}

    def test_it_restores_from_every_tier_after_the_restart(self, lines):
        restored = {(x["params"]["fidelity"], x["params"]["tier"]) for x in lines if x["name"] == "restore"}
        assert restored == {("exact", "hot"), ("exact", "cold"), ("auto", "hot"), ("auto", "warm"), ("auto", "cold")}
        assert {x["params"]["tokens"] for x in lines if x["name"] == "restore"} == {128}

    def test_exact_entries_change_no_token(self, lines):
        agreement = [x["value"] for x in lines if x["name"] == "agreement" and x["params"]["fidelity"] == "exact"]
        assert agreement == [1.0, 1.0]

    def test_nf4_takes_less_than_a_sixth_of_the_bytes(self, lines):
        nbytes = {(x["params"]["fidelity"], x["params"]["tier"]): x["params"]["nbytes"] for x in lines[1:]}
        assert nbytes["auto", "warm"] * 6 < nbytes["exact", "hot"]
        assert nbytes["auto", "cold"] * 6 < nbytes["exact", "cold"]


ROW = {
    "fidelity": "exact", "asked_tier": "cold", "tiers": ["cold"], "encodings": ["raw"], "lossy": False, "tokens": 4,
    "restore": {"best_s": 0.01, "median_s": 0.02, "times": 3}, "nbytes": 10, "value_nbytes": 10, "digest": "d",
    "agreement": 2, "equal": True,
}  # fmt: skip
FOUND = {
    "a": {"tokens": 6, "prefill_s": 1.0, "digests": {"4": "d"}},
    "b": {
        "tokens": 4, "prompt_tokens": 6, "prefill": {"best_s": 1.0, "median_s": 2.0, "times": 3}, "answer": [1, 2],
        "text": "an answer", "rows": [ROW],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"equal": False}, "the answer differs"),
        ({"digest": "other"}, "not the bytes"),
        ({"tiers": ["hot"]}, "answered by hot"),
        ({"fidelity": "auto", "equal": False, "digest": "other"}, None),
    ],
)
def test_the_demo_fails_when_an_exact_entry_is_not_what_was_put(change, complaint):
    found = copy.deepcopy(FOUND)
    found["b"]["rows"][0] |= change
    wrong = demo_module().complaints(found)
    assert (wrong == []) if complaint is None else (complaint in wrong[0])


def test_the_table_says_what_was_found():
    text = demo_module().report(FOUND)
    assert "restore from cold  exact" in text
    assert "100.0x" in text and "2/2" in text
