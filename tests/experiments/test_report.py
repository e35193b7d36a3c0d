"""What is printed of a run, from rows that are given."""

import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("torch")

from experiments import Found, report

KEYS = [
    "row", "name", "category", "kept", "bytes_per_token", "encoding", "restore_over_prefill",
    "ms_per_token_over_baseline", "kl", "perplexity_change", "top1", "retrieval", "bit_equal", "worse_than_nothing",
]  # fmt: skip


def row(name: str, nbytes: float, kl: float, **more) -> Found:
    whole = {
        "row": 1, "category": "quantization", "kept": "faithful", "encoding": "raw", "restore_over_prefill": 0.1,
        "ms_per_token_over_baseline": 1.0, "perplexity_change": 1.0, "top1": 99.0, "retrieval": 100.0,
        "bit_equal": True, "worse_than_nothing": False, **more,
    }  # fmt: skip
    return Found(name=name, bytes_per_token=nbytes, kl=kl, **whole)


ROWS = [
    row("baseline", 46_000, 0.0),
    row("no-context", 0, 1.1),
    row("8-bit", 12_000, 0.0002),
    row("4-bit", 6_000, 0.005),
    row("plain", 6_100, 0.09),
    row("rubbish", 5_000, 2.0, worse_than_nothing=True),
    row("other-model", 32, 0.0, category="recurrent"),
    Found(7, "broken", "rank", "faithful", failed="RuntimeError: no"),
]


def test_a_row_of_json_has_exactly_the_promised_keys_in_their_order():
    assert list(json.loads(report.json_line(ROWS[0]))) == KEYS


def test_a_failed_row_is_a_row_without_figures():
    values = json.loads(report.json_line(ROWS[-1]))
    assert list(values) == KEYS
    assert {name for name, x in values.items() if x is not None} == {"row", "name", "category", "kept"}
    assert "failed: RuntimeError: no" in report.cells(ROWS)[-1]


def test_the_front_leaves_out_what_is_beaten_in_both_what_is_worse_than_nothing_and_other_models():
    assert [r.name for r in report.front(ROWS)] == ["4-bit", "8-bit", "baseline"]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"nbytes": 7_000}, "under 7,000 B a token: 4-bit, 6,000 B, KL 0.005;"),
        ({"nbytes": 13_000}, "under 13,000 B a token: 8-bit,"),
        ({"kl": 0.001}, "within KL 0.001: 8-bit,"),
        ({"kl": 0.01}, "within KL 0.01: 4-bit,"),
        ({"nbytes": 100}, "under 100 B a token: nothing measured here"),
        ({}, "nothing is better in both bytes and KL: 4-bit, 6,000 B, KL 0.005, 8-bit,"),
    ],
)
def test_the_advice_is_the_least_harm_within_the_bytes_or_the_fewest_bytes_within_the_harm(budget, said):
    assert report.advice(ROWS, **budget).startswith(said)


def test_the_table_marks_a_strategy_that_is_worse_than_no_context_at_all():
    assert [cells[1] for cells in report.cells(ROWS) if cells[-1] == "worse than nothing"] == ["rubbish"]


def test_the_plot_is_an_svg_with_a_dot_for_each_row_that_can_be_compared_and_the_front(tmp_path):
    report.plot([*ROWS, row("<odd & name>", 900, 0.3)], tmp_path / "f.svg")
    root = ET.parse(tmp_path / "f.svg").getroot()  # noqa: S314 - our own file
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}circle")) == 6
    assert len(root.findall(f"{space}polyline")) == 1
    assert "<odd & name>" in {label.text for label in root.findall(f"{space}text")}


def test_no_name_in_the_plot_lies_on_another_however_near_their_dots_are(tmp_path):
    near = [row(f"alike-{i}", 6_000 + i, 0.005) for i in range(8)]
    report.plot([*ROWS, *near], tmp_path / "f.svg")
    root = ET.parse(tmp_path / "f.svg").getroot()  # noqa: S314 - our own file
    names = {r.name for r in [*ROWS, *near]}
    labels = [x for x in root.findall("{http://www.w3.org/2000/svg}text") if x.text in names]
    boxes = [(float(x.get("x")), float(x.get("y")), report.LETTER_WIDTH * len(x.text)) for x in labels]
    assert len(boxes) == 13
    for i, (x, y, _) in enumerate(boxes):
        for u, v, width in boxes[:i]:
            assert abs(y - v) >= 11 or not u - width < x < u + width, (labels[i].text, x, y, u, v)


def test_a_run_of_which_everything_failed_still_has_a_report(tmp_path):
    rows = [replace(r, kl=None, bytes_per_token=None, failed="x") for r in ROWS]
    report.plot(rows, tmp_path / "f.svg")
    assert report.advice(rows) == "no row has figures to choose by"
    assert report.markdown(rows).count("\n") == len(rows) + 1
