"""The command line, against a real daemon: what it prints, what it exits with, what it leaves on disk."""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from kvstore.printable import size
from kvstored.cli import cli
from kvstored.cli.keytext import key_text, parse_key, show_key
from kvstored.cli.tensorfile import read_tensors, write_tensors
from kvstored.cli.text import duration, table
from kvstored_client import Client
from tests.conftest import DaemonProcess, environment

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def running() -> Iterator[DaemonProcess]:
    """One daemon for all tests here: each uses keys of its own."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as top:
        directory = Path(top)
        config = directory / "kvstored.toml"
        config.write_text(f'[server]\naddress = "unix:{top}/k.sock"\ndata_dir = "{top}/data"\n')
        process = DaemonProcess(directory, f"unix:{top}/k.sock", config)
        process.start()
        yield process
        process.kill()


@pytest.fixture
def run(running: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("KVSTORED_ADDRESS", running.address)
    return lambda *words: CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "k": rng.standard_normal((2, 16, 3, 8), dtype=np.float32),
        "v": rng.standard_normal((2, 16, 3, 8)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 5), dtype=np.float16),
        "complex": np.arange(4, dtype=np.complex64),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "in.safetensors"
    write_tensors(path, tensors, {})
    return path


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_what_was_put_from_a_file_comes_back_to_a_file(run, file, tensors, tmp_path):
    assert run("put", "there-and-back", file, "--exact").exit_code == 0
    out = tmp_path / "out.safetensors"
    result = run("get", "there-and-back", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "5 tensors" in result.stdout and "hot" in result.stdout
    back = read_tensors(out)
    assert back.keys() == tensors.keys()
    assert all(same(back[name], x) for name, x in tensors.items())


def test_a_file_of_the_safetensors_library_is_taken_and_ours_is_read_by_it(run, tmp_path):
    theirs = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float16)}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    assert run("put", "library", tmp_path / "theirs.safetensors").exit_code == 0
    assert run("get", "library", "-o", tmp_path / "ours.safetensors").exit_code == 0
    ours = load_file(tmp_path / "ours.safetensors")
    assert all(same(ours[name], x) for name, x in theirs.items())


def test_the_json_of_get_says_which_tier_answered(run, file, tmp_path):
    run("put", "json-get", file)
    told = json.loads(run("get", "json-get", "-o", tmp_path / "o.safetensors", "--json").stdout)
    assert (told["key"], told["tier"], told["encoding"], told["lossy"]) == ("json-get", "hot", "raw", False)
    assert told["tensors"]["v"] == {"dtype": "bfloat16", "shape": [2, 16, 3, 8]}


def test_a_key_that_is_not_held_is_exit_code_1_and_no_file(run, tmp_path):
    result = run("get", "never-put", "-o", tmp_path / "o.safetensors")
    assert result.exit_code == 1
    assert result.stderr == "kvstored: not held: never-put\n"
    assert list(tmp_path.iterdir()) == []
    assert run("inspect", "never-put").exit_code == 1


def test_inspect_shows_what_put_was_told(run, file):
    assert run("put", "told", file, "--exact", "--pin", "--ttl-s", "100").exit_code == 0
    text = run("inspect", "told").stdout
    assert "bit for bit as put" in text and "float32 [2, 16, 3, 8]" in text
    facts = json.loads(run("inspect", "told", "--json").stdout)
    assert facts["fidelity"] == "exact" and facts["pinned"] is True and facts["ttl_left_s"] is None
    assert run("unpin", "told").exit_code == 0
    assert 0 < json.loads(run("inspect", "told", "--json").stdout)["ttl_left_s"] <= 100


def test_get_inspect_explain_and_stats_show_the_receipt(run, tmp_path):
    """The error measured when the entry was encoded, of each tensor."""
    save_file({"w": np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)}, tmp_path / "w.safetensors")
    run("put", "receipt", tmp_path / "w.safetensors")
    assert json.loads(run("inspect", "receipt", "--json").stdout)["receipt"] == {"w": 0.0}
    run("demote", "receipt")
    got = json.loads(run("get", "receipt", "-o", tmp_path / "o.safetensors", "--json").stdout)["receipt"]
    assert 0.05 < got["w"] < 0.15
    assert json.loads(run("inspect", "receipt", "--json").stdout)["receipt"] == got
    assert json.loads(run("explain", "receipt", "--json").stdout)["entry"]["receipt"] == got
    assert f"float32 [64, 64], relative error {got['w']:.3g}" in run("inspect", "receipt").stdout
    assert f"relative error {got['w']:.3g}" in run("get", "receipt", "-o", tmp_path / "o.safetensors").stdout
    assert f"{got['w']:.3g}" in run("explain", "receipt").stdout
    assert "MEAN RELATIVE ERROR" in run("stats").stdout


def test_ls_lists_by_prefix_tier_and_limit(run, file):
    for i in range(3):
        run("put", f"listed-{i}", file)
    run("demote", "listed-1")
    lines = run("ls", "--prefix", "listed-").stdout.splitlines()
    assert lines[0].split() == [
        "KEY",
        "NAMESPACE",
        "TENANT",
        "TIERS",
        "ENCODING",
        "VALUE",
        "HELD",
        "AGE",
        "TTL",
        "HITS",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == ["listed-0", "listed-1", "listed-2"]
    warm = run("ls", "--prefix", "listed-", "--tier", "warm", "--json").stdout.splitlines()
    assert [json.loads(line)["key"] for line in warm] == ["listed-1"]
    assert len(run("ls", "--prefix", "listed-", "--limit", 2, "--json").stdout.splitlines()) == 2
    assert run("ls", "--prefix", "nothing-begins-so", "--json").stdout == ""


def test_entries_move_between_tiers(run, file):
    def tiers(key: str) -> list[str]:
        return json.loads(run("inspect", key, "--json").stdout)["tiers"]

    run("put", "moving", file)
    assert run("demote", "moving").stdout == "demoted 1 of 1\n"
    assert tiers("moving") == ["warm"]
    assert json.loads(run("promote", "moving", "--json").stdout) == {"verb": "promote", "asked": 1, "promoted": 1}
    assert tiers("moving") == ["hot", "warm"]
    assert run("promote", "moving").exit_code == 1  # it is there already


def test_delete_and_evict_count_each_key_once(run, file):
    for verb, done in (("delete", "deleted"), ("evict", "evicted")):
        run("put", f"{verb}-a", file)
        result = run(verb, f"{verb}-a", f"{verb}-a", f"{verb}-b")
        assert result.stdout == f"{done} 1 of 2\n"
        assert result.exit_code == 1
        assert run("inspect", f"{verb}-a").exit_code == 1


def test_binary_keys_are_written_as_hex_and_read_back_so(run, running, file):
    key = bytes(range(32))
    with Client(running.address, framework="numpy") as client:
        client.put(key, {"x": np.zeros(3, np.float32)})
    word = f"hex:{key.hex()}"
    assert word in run("ls", "--full", "--prefix", "hex:0001").stdout
    assert json.loads(run("inspect", word, "--json").stdout)["key_hex"] == key.hex()
    assert run("pin", word).exit_code == 0
    assert run("unpin", word).exit_code == 0


@pytest.mark.parametrize("key", [b"a", "Schlüssel".encode(), b"hex:ff", b"a b", b"\xff\xfe", b"-x", b"\n", b"x" * 256])
def test_every_key_survives_being_printed_and_typed(key):
    assert parse_key(key_text(key)) == key
    (typed,) = shlex.split(show_key(key))
    assert parse_key(typed) == key


def test_stats_shows_all_tiers_and_counters(run, file):
    run("put", "counted", file)
    text = run("stats").stdout
    assert all(word in text for word in ("hot", "warm", "cold", "hit_ratio", "CAPACITY"))
    numbers = json.loads(run("stats", "--json").stdout)
    assert set(numbers["tiers"]) == {"hot", "warm", "cold"}
    assert numbers["values"]["puts"] >= 1


def test_no_daemon_is_a_sentence_and_exit_code_3(run, tmp_path):
    for words in (["stats"], ["ls"], ["inspect", "k"], ["evict", "k"], ["get", "k", "-o", tmp_path / "o"]):
        result = run(*words, "--address", f"unix:{tmp_path}/none.sock")
        assert result.exit_code == 3
        assert result.stderr == (
            f"kvstored: no daemon answers at unix:{tmp_path}/none.sock; "
            "start one with `kvstored serve` or set KVSTORED_ADDRESS\n"
        )


def test_bad_usage_is_exit_code_2(run, file, tmp_path):
    (tmp_path / "no.safetensors").write_bytes(b"not a safetensors file at all")
    assert run("stats", "--address", "nonsense").exit_code == 2
    assert run("get", "k").exit_code == 2
    assert run("put", "k" * 257, file).exit_code == 2
    assert run("put", "hex:0g", file).exit_code == 2
    assert run("put", "k", tmp_path / "absent").exit_code == 2
    assert run("get", "k", "-o", tmp_path / "no" / "where").exit_code in (1, 2)


def test_a_file_that_is_no_safetensors_file_is_refused_with_its_name(run, tmp_path):
    path = tmp_path / "no.safetensors"
    for content in (b"", b"junk", b"\xff" * 64, (10).to_bytes(8, "little") + b'{"a": 1}  '):
        path.write_bytes(content)
        result = run("put", "k", path)
        assert result.exit_code == 2, content
        assert str(path) in result.stderr


def test_a_refusal_of_the_daemon_is_exit_code_4(run, file):
    result = run("put", "too-long", file, "--ttl-s", "1e12")
    assert result.exit_code == 4
    assert "ttl_s" in result.stderr


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.safetensors"
    write_tensors(path, {"x": np.ones(4, np.float32)}, {})
    before = path.read_bytes()

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"x": np.zeros(4, np.float32)}, {}, stop)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_serve_refuses_a_bad_configuration_with_exit_code_2(tmp_path):
    (tmp_path / "c.toml").write_text("[store]\ntll_s = 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "kvstored", "serve", "--config", str(tmp_path / "c.toml")],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean store.ttl_s?" in done.stderr


def test_serve_without_the_engine_names_the_extra_and_client_verbs_go_on(running, tmp_path):
    for package in ("torch", "lmdb", "safetensors", "zstandard", "grpc_health"):
        code = f'raise ModuleNotFoundError("No module named {package}", name="{package}")'
        (tmp_path / f"{package}.py").write_text(code)
    path = environment()["PYTHONPATH"]
    bare = environment(PYTHONPATH=f"{tmp_path}:{path}", KVSTORED_ADDRESS=running.address)
    command = [sys.executable, "-m", "kvstored"]
    serve = subprocess.run(
        [*command, "serve", "--data-dir", str(tmp_path / "d"), "--address", f"unix:{tmp_path}/s"],
        env=bare, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert serve.returncode == 2
    assert "pip install 'kvstored[daemon]'" in serve.stderr
    stats = subprocess.run([*command, "stats", "--json"], env=bare, capture_output=True, timeout=60, check=False)
    assert stats.returncode == 0, stats.stderr
    assert "tiers" in json.loads(stats.stdout)


def test_what_the_daemon_holds_outlives_it(daemon_factory, file, tmp_path):
    daemon = daemon_factory()
    address = ["--address", daemon.address]
    runner = CliRunner()
    assert runner.invoke(cli, ["put", "kept", str(file), "--exact", *address]).exit_code == 0
    assert daemon.stop() == 0
    assert runner.invoke(cli, ["stats", *address]).exit_code == 3
    daemon.start()
    out = tmp_path / "out.safetensors"
    told = json.loads(runner.invoke(cli, ["get", "kept", "-o", str(out), "--json", *address]).stdout)
    assert told["tier"] == "cold"
    assert out.read_bytes()[-64:] == file.read_bytes()[-64:]


def test_numbers_for_people():
    assert [size(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB", "3.0 TiB"]
    assert [duration(s) for s in (0.0123, 5, 61, 3599.9, 7325, 93784)] == [
        "12ms", "5.0s", "1m1s", "59m59s", "2h2m", "1d2h",
    ]  # fmt: skip
    assert table(("A", "N"), [("long", "1"), ("b", "100")]) == ["A       N", "long    1", "b     100"]
