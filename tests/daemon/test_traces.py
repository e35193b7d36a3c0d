"""simulate and its plot from the command line, without a daemon."""

import json
from pathlib import Path

from click.testing import CliRunner

from kvstored.cli import cli

TRACE = Path(__file__).parent.parent / "data" / "mooncake_conversation.jsonl.xz"


def test_simulate_prints_one_json_object_and_draws_the_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    asked = ["simulate", str(TRACE), "--ram", "64GiB", "--disk", "1TiB", "--requests", "60", "--json"]
    done = CliRunner().invoke(cli, [*asked, "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["requests"] == 60
    assert 0 < report["hits"] < report["blocks"]
    assert plot.read_text().startswith("<svg ")
    assert "hot 10 : NF4 90" in plot.read_text()


def test_a_size_or_layout_that_is_none_is_refused() -> None:
    for wrong in (["--ram", "much"], ["--ram", "1GiB", "--layout", "gpt"]):
        done = CliRunner().invoke(cli, ["simulate", str(TRACE), *wrong, "--requests", "5"])
        assert done.exit_code != 0
