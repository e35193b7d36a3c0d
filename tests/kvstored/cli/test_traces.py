"""simulate and its plot without a daemon; replay on a daemon and embedded; explain for a prompt's tokens."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvstored.cli import cli
from kvstored_client import Client
from tests.conftest import DaemonProcess

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation.jsonl.xz"


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


def test_simulate_learns_the_share_of_hot() -> None:
    asked = ["simulate", str(TRACE), "--ram", "32GiB", "--hot", "auto", "--requests", "300", "--json"]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["hot_fraction"] != 0.1
    for wrong in ("much", "2"):
        assert CliRunner().invoke(cli, [*asked[:5], wrong, "--requests", "5"]).exit_code != 0


def test_a_size_or_layout_that_is_none_is_refused() -> None:
    for wrong in (["--ram", "much"], ["--ram", "1GiB", "--layout", "gpt"]):
        done = CliRunner().invoke(cli, ["simulate", str(TRACE), *wrong, "--requests", "5"])
        assert done.exit_code != 0


def running(top: Path) -> DaemonProcess:
    config = top / "kvstored.toml"
    config.write_text(f'[server]\naddress = "unix:{top}/k.sock"\ndata_dir = "{top}/data"\n')
    process = DaemonProcess(top, f"unix:{top}/k.sock", config)
    process.start()
    return process


def test_replay_hits_as_often_on_a_daemon_as_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["replay", str(TRACE), "--requests", "40", "--block-nbytes", "256", "--json"]
    with tempfile.TemporaryDirectory(prefix="kvd-") as top:
        process = running(Path(top))
        try:
            monkeypatch.setenv("KVSTORED_ADDRESS", process.address)
            on_daemon = CliRunner().invoke(cli, asked)
        finally:
            process.kill()
    assert on_daemon.exit_code == 0, on_daemon.output
    monkeypatch.setenv("KVSTORED_ADDRESS", "unix:/nonexistent/k.sock")  # nobody is asked
    embedded = CliRunner().invoke(cli, [*asked, "--embedded", "memory"])
    assert embedded.exit_code == 0, embedded.output
    first, second = json.loads(on_daemon.output), json.loads(embedded.output)
    assert first["requests"] == second["requests"] == 40
    assert first["hits"] == second["hits"] > 0
    assert first["puts"] == second["puts"]


def test_an_embedded_replay_takes_the_settings_of_a_file(tmp_path: Path) -> None:
    settings = tmp_path / "store.toml"
    settings.write_text("[hot]\ncapacity_nbytes = 4096\n[warm]\ncapacity_nbytes = 0\n")
    asked = ["replay", str(TRACE), "--requests", "40", "--block-nbytes", "256", "--embedded", str(settings)]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    assert "blocks hit" in done.output


IDENTITY = {
    "model": "m", "revision": "r", "dtype": "float32", "layers": 1, "kv_heads": 1, "head_dim": 4, "layout": "lthd",
}  # fmt: skip


def test_explain_finds_every_chunk_of_a_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = list(range(40))
    as_json, as_words, identity = tmp_path / "t.json", tmp_path / "t.txt", tmp_path / "identity.json"
    as_json.write_text(json.dumps({"input_ids": [tokens]}))
    as_words.write_text("\n".join(map(str, tokens)))
    identity.write_text(json.dumps(IDENTITY))
    k = np.ones((1, 32, 1, 4), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="kvd-") as top:
        process = running(Path(top))
        try:
            monkeypatch.setenv("KVSTORED_ADDRESS", process.address)
            with Client(process.address, framework="numpy", on_error="raise") as client:
                namespace = client.namespace(chunk_tokens=16, **IDENTITY)
                assert namespace.put_prefix(tokens[:32], k, k) == 2
                namespace.pin_prefix(tokens[:16])
            for file in (as_json, as_words):
                words = [
                    "explain",
                    "--tokens",
                    str(file),
                    "--identity",
                    str(identity),
                    "--chunk-tokens",
                    "16",
                    "--json",
                ]
                done = CliRunner().invoke(cli, words)
                assert done.exit_code == 0, done.output
                rows = [json.loads(line) for line in done.output.splitlines()]
                assert [(row["first_token"], row["tokens"]) for row in rows] == [(0, 16), (16, 16), (32, 8)]
                assert [row["state"] for row in rows] == ["held", "held", "never put"]
                assert rows[0]["entry"]["pinned"]
                assert not rows[1]["entry"]["pinned"]
            shown = CliRunner().invoke(cli, [*words[:-1]])
            assert "m@" in shown.output  # who pins it
            other = json.dumps({**IDENTITY, "revision": "other"})
            missed = CliRunner().invoke(cli, [*words[:3], "--identity", other, "--json"])
            assert {json.loads(line)["state"] for line in missed.output.splitlines()} == {"never put"}
        finally:
            process.kill()


def test_explain_says_what_is_wrong_with_what_it_was_given(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_text("one two")
    good.write_text("1 2 3")
    for words, message in (
        ([], "give KEYS, or --tokens FILE"),
        (["--tokens", good], "together with --identity"),
        (["k", "--tokens", good, "--identity", "{}"], "give KEYS, or"),
        (["--tokens", bad, "--identity", "{}"], "not token ids"),
        (["--tokens", good, "--identity", "{}"], "missing 7 required"),
        (["--tokens", good, "--identity", "{"], "no JSON"),
        (["--tokens", good, "--identity", tmp_path / "none"], "cannot read"),
    ):
        done = CliRunner().invoke(cli, ["explain", *map(str, words)])
        assert done.exit_code != 0
        assert message in done.output


FLEET = ["simulate", str(TRACE), "--ram", "1000blocks", "--hot", "0", "--requests", "120"]


def test_simulate_of_fleets_prints_a_json_line_each_and_draws_hits_and_bytes_against_hosts(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    asked = [*FLEET, "--hosts", "4,1", "--shared", "all", "--publish-delay", "0", "--plot", str(plot), "--json"]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    one, four = map(json.loads, done.output.splitlines())
    assert (one["hosts"], four["hosts"]) == (1, 4)
    assert 0 < four["hit_ratio"] <= one["hit_ratio"] + 1e-9
    assert four["shared_bytes_per_request"] > one["shared_bytes_per_request"] == 0
    assert {"requests", "by_tier", "puts", "writes_per_put"} <= set(four)
    drawn = plot.read_text()
    assert drawn.count("<svg ") == 3
    assert "random, alone" in drawn
    assert "bytes a request" in drawn


def test_a_size_may_be_said_in_blocks_or_as_a_share_of_the_trace() -> None:
    by_share = CliRunner().invoke(cli, [*FLEET, "--hosts", "4", "--shared", "20%", "--churn", "60", "--json"])
    assert by_share.exit_code == 0, by_share.output
    found = json.loads(by_share.output)
    assert 0 < found["shared_blocks"] == found["shared_peak_blocks"]
    assert found["replaced"] > 0
    once = CliRunner().invoke(cli, [*FLEET, "--hosts", "4", "--churn"])
    assert once.exit_code == 0, once.output


@pytest.mark.parametrize("wrong", [
    ["--shared", "5%"], ["--hosts", "0"], ["--hosts", "x"], ["--hosts", "4", "--cells", "3"], ["--cells", "2"],
    ["--hosts", "4", "--shared", "-3%"], ["--hosts", "4", "--shared", "1"], ["--hosts", "4", "--churn", "0"],
    ["--hosts", "4", "--publish", "evict"], ["--hosts", "4", "--routing", "best"], ["--hosts", "5000"],
    ["--hosts", "4", "--shared", "all", "--publish-delay", "-1"], ["--hosts", "4", "--churn", "nan"],
])  # fmt: skip
def test_a_fleet_that_cannot_be_is_a_sentence_and_exit_code_2(wrong: list[str]) -> None:
    done = CliRunner().invoke(cli, [*FLEET, *wrong])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output


def test_simulate_says_what_more_memory_would_bring(tmp_path):
    trace = tmp_path / "trace.jsonl"
    # Ten prompts of one block each, twice: 4 blocks of room forget all of them, 12 remember.
    asked = [{"timestamp": i, "hash_ids": [i % 10]} for i in range(20)]
    trace.write_text("".join(json.dumps(one) + "\n" for one in asked))
    words = ["simulate", str(trace), "--ram", "4blocks", "--hot", "0", "--more", "8blocks"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "8blocks more RAM: 50.00% hit, +50.00 points" in done.stdout
    told = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert (told["hits"], told["more"]["hits"]) == (0, 10)
    done = CliRunner().invoke(cli, [*words, "--hosts", "2"])
    assert done.exit_code == 2
    assert "--more is about one host" in done.output
