"""The command as a user runs it: two workers, a daemon that restarts between them, rows as JSON."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")

from experiments import ExperimentFailed
from experiments.daemon import child
from experiments.lab import load_model
from kvstored.cli import cli
from tests.conftest import ROOT, environment
from tests.experiments.test_report import KEYS
from tests.side import why_missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(*words: object, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kvstored", "experiments", *map(str, words)],
        cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip


def rows_of(done: "subprocess.CompletedProcess[str]") -> dict[str, dict]:
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture
def invoked() -> Iterator[Callable[..., Result]]:
    """The command in this process, whose signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield lambda *words: CliRunner().invoke(cli, words)
    for number, handler in before.items():
        signal.signal(number, handler)


KILLED = ("8-bit", "4-bit", "lorc-fp16", "vllm", "rwkv")


@pytest.fixture(scope="module")
def done(tiny_model: Path, text: Path) -> "subprocess.CompletedProcess[str]":
    """A run in which the worker that restores dies in the middle of one strategy."""
    pytest.importorskip("transformers")
    asked = ("run", *KILLED, "--model", tiny_model, "--text", text, "--tokens", "96+12", "--json")
    return command(*asked, "--kl", "0.5", EXPERIMENTS_KILL="get:4-bit")


class TestAStrategyKilledInTheMiddle:
    def test_leaves_the_others_their_rows_and_is_named(self, done):
        rows = rows_of(done)
        assert list(rows) == ["baseline", "no-context", "vllm", "8-bit", "4-bit", "lorc-fp16", "rwkv"], done.stderr
        assert done.returncode == 1
        assert "kvstored: 4-bit failed: the worker was ended by SIGABRT" in done.stderr
        assert rows["4-bit"]["kl"] is None
        for name in ("baseline", "8-bit", "lorc-fp16", "rwkv"):
            assert rows[name]["kl"] is not None, name

    def test_every_row_has_the_promised_keys(self, done):
        assert all(list(row) == KEYS for row in rows_of(done).values())

    def test_exact_rows_go_on_bit_for_bit_in_another_process(self, done):
        rows = rows_of(done)
        assert {name for name in rows if rows[name]["bit_equal"]} == {"baseline", "no-context", "lorc-fp16", "rwkv"}
        assert rows["8-bit"]["encoding"] == "int8"

    def test_vllms_row_is_the_record_of_make_engines_with_its_date(self, done):
        row = rows_of(done)["vllm"]
        assert "make engines on 20" in row["kept"]
        assert 0 < row["restore_over_prefill"] < 1

    def test_the_advice_is_on_standard_error_where_the_rows_are_json(self, done):
        assert "within KL 0.5: " in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "minicach"], "no strategy or category 'minicach'; the nearest is 'minicache'"),
        (["run", "4-bit", "--text", "/missing"], "/missing: No such file or directory"),
        (["run", "4-bit", "--model", "/missing"], "/missing is no model"),
        (["run", "4-bit", "--plot", "/missing/f.svg"], "/missing is no directory"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_before_anything_starts(invoked, words, sentence):
    pytest.importorskip("transformers")
    done = invoked("experiments", *words)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("words", [[], ["run", "all"]])
@pytest.mark.parametrize("gone", [["torch"], ["transformers", "lmdb"]])
def test_without_the_extra_the_command_says_what_to_install(invoked, monkeypatch, words, gone):
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    done = invoked("experiments", *words)
    assert done.exit_code == 2
    assert f"{', '.join(gone)} cannot be imported: pip install 'kvstored[experiments]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_without_the_extra_the_alias_says_so_too():
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('experiments', run_name='__main__')"
    alias = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (alias.returncode, "pip install 'kvstored[experiments]'" in alias.stderr) == (2, True), alias.stderr


def test_a_text_that_is_too_short_or_a_model_without_weights_is_one_sentence(tiny_model: Path, text: Path, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "short.txt").write_text("short")
    done = command("run", "baseline", "--model", tiny_model, "--text", tmp_path / "short.txt", "--tokens", "64+8")
    assert done.returncode == 2
    assert "short.txt has 5 tokens, 72 are needed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("damage", [{"config.json": b"{}"}, {"model.safetensors": b"no tensors"}])
def test_a_damaged_model_is_one_sentence(tiny_model: Path, tmp_path, damage):
    home = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name, data in damage.items():
        (home / name).write_bytes(data)
    with pytest.raises(ExperimentFailed, match="is no model that transformers can load: ") as caught:
        load_model(home)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_that_comes_while_a_child_starts_is_answered_when_it_can_be_ended(monkeypatch, number, raised):
    """A run hung for ever after Ctrl-C between the start of its worker and the `try` that would have ended it."""
    real, started = subprocess.Popen, []

    def popen(command, **how):
        started.append(real(command, **how))
        signal.raise_signal(number)
        return started[0]

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        with pytest.raises(raised), child(["sleep", "60"], signal.SIGKILL):
            pytest.fail("the signal was not answered")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].poll() == -signal.SIGKILL


def test_ctrl_c_leaves_no_process_and_no_file_behind(tiny_model: Path, text: Path, tmp_path):
    """As Ctrl-C does it: the signal goes to the command and to all that it started."""
    pytest.importorskip("transformers")
    asked = ("run", "baseline", "--model", tiny_model, "--text", text, "--tokens", "64+8")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstored", "experiments", *map(str, asked)],
        cwd=ROOT, env=environment(TMPDIR=str(tmp_path)), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("kvx-*/workers.log")):  # the daemon serves, a worker begins
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_alias_and_the_list_know_the_same_strategies(invoked):
    alias = subprocess.run(
        [sys.executable, "-m", "experiments", "--experiments", "nothing-like-it"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert alias.returncode == 2
    assert "no strategy or category 'nothing-like-it'" in alias.stderr
    listed = invoked("experiments")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:4]] == ["1", "0", "2"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """The real model's, of the strategies that promises were made about; of all with EXPERIMENTS_ALL=1."""
    pytest.importorskip("transformers")
    from experiments.smollm import gguf_file

    gpl = Path("/usr/share/common-licenses/GPL-3")
    if gguf_file() is None or not gpl.exists():
        pytest.skip("the model is not installed: make demo" if gpl.exists() else f"{gpl} is not there")
    if missing := why_missing("kvpress"):
        pytest.skip(missing)
    names = ("minicache", "lorc-fp16", "4-bit", "attention-sink", "sliding-window", "h2o", "h2o-4-bit")
    whole = os.environ.get("EXPERIMENTS_ALL") == "1"
    times = () if whole else ("--no-times",)
    done = command("run", *(("all",) if whole else names), *times, "--text", gpl, "--tokens", "256+64", "--json")
    assert done.returncode == 0, done.stderr
    return rows_of(done)


@pytest.mark.model
class TestTheRealModel:
    """What the issue of this package promised, at 256 + 64 tokens of GPL-3."""

    def test_half_of_h2os_rows_in_nf4_are_13_times_smaller_at_a_kl_of_at_most_0_012(self, rows):
        assert rows["baseline"]["bytes_per_token"] >= 13 * rows["h2o-4-bit"]["bytes_per_token"]
        assert rows["h2o-4-bit"]["kl"] <= 0.012

    def test_a_window_without_sinks_collapses_and_with_them_does_not(self, rows):
        assert rows["attention-sink"]["kl"] <= 0.05
        assert rows["sliding-window"]["kl"] >= 10 * rows["attention-sink"]["kl"]

    def test_minicache_and_lorc_as_published_are_as_bad_as_they_are_on_this_model(self, rows):
        assert rows["minicache"]["kl"] > 0.4
        assert rows["lorc-fp16"]["kl"] > 0.4

    def test_whoever_is_worse_than_no_context_is_marked_and_nobody_else(self, rows):
        nothing = rows["no-context"]["kl"]
        comparable = [row for row in rows.values() if row["kl"] is not None]
        assert all(row["worse_than_nothing"] == (row["kl"] > nothing * (1 + 1e-6)) for row in comparable)

    def test_exact_rows_are_bit_equal_and_the_lossy_one_is_not(self, rows):
        exact = {name for name, row in rows.items() if row["bit_equal"]}
        assert {"baseline", "no-context", "minicache", "lorc-fp16", "attention-sink", "h2o"} <= exact
        assert not {"4-bit", "h2o-4-bit"} & exact

    def test_no_time_is_taken_where_none_is_wanted(self, rows):
        if os.environ.get("EXPERIMENTS_ALL") != "1":
            times = {(row["ms_per_token_over_baseline"], row["restore_over_prefill"]) for row in rows.values()}
            assert times == {(None, None)}

    def test_the_baseline_finds_needles_and_no_context_finds_none(self, rows):
        assert rows["baseline"]["retrieval"] >= 75
        assert rows["no-context"]["retrieval"] == 0
