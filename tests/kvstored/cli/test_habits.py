"""What people type by habit: ping, options before the verb, pipes into head, mistakes that become a sentence."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from kvstore.errors import TierUnavailable
from kvstored.access.tokens import digest
from kvstored.cli import cli
from kvstored.cli.exits import BROKEN_PIPE, Unreachable, errors_as_exit_codes
from tests.conftest import environment
from tests.kvstored.conftest import running_daemon


@pytest.fixture(scope="module")
def daemon():
    with running_daemon(store="[store.hot]\ncapacity_nbytes = '64MiB'") as found:
        found.start()
        yield found


@pytest.fixture
def client(daemon):
    found = daemon.client(framework="numpy")
    found.evict(*[info.key for info in found.entries()] or [b"-"])
    return found


@pytest.fixture
def run(daemon, monkeypatch):
    monkeypatch.setenv("KVSTORED_ADDRESS", daemon.address)

    def invoke(*words, code=0, answer=None):
        done = CliRunner().invoke(cli, [*map(str, words)], input=answer, catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.output

    return invoke


def test_a_ping_is_answered_with_its_latency(run, daemon):
    assert run("ping").startswith(f"serving at {daemon.address}, ")
    told = json.loads(run("ping", "--json"))
    assert told["serving"] is True and 0 < told["latency_s"] < 60


def test_a_ping_needs_no_right_and_no_token(tmp_path, monkeypatch):
    entries = [
        f'[[token]]\nname = "{who}"\nsha256 = "{digest(who)}"\nrights = ["{who}"]\n' for who in ("write", "admin")
    ]
    for name, text in (("tokens.toml", "\n".join(entries)), ("write", "write"), ("admin", "admin")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    with running_daemon(f'tokens = "{tmp_path}/tokens.toml"\ntoken_on_unix = true') as daemon:
        monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "admin"))
        daemon.start()
        monkeypatch.delenv("KVSTORED_TOKEN_FILE")
        address = ("--address", daemon.address, "--timeout-s", "60")
        assert CliRunner().invoke(cli, ["ping", *address]).exit_code == 0
        assert CliRunner().invoke(cli, ["ping", *address, "--token-file", str(tmp_path / "write")]).exit_code == 0
        assert CliRunner().invoke(cli, ["stats", *address]).exit_code == 4


def test_a_daemon_that_is_about_to_stop_is_exit_code_4_and_none_is_3(run, monkeypatch):
    from kvstored_client.stream.transport import Transport

    with monkeypatch.context() as m:
        m.setattr(Transport, "health", lambda _: False)
        assert "does not serve" in run("ping", code=4)
    assert "no daemon answers" in run("--address", "unix:/nowhere/k.sock", "ping", code=3)


def test_options_of_every_verb_stand_before_it_too(daemon, tmp_path):
    def invoke(*words):
        return CliRunner().invoke(cli, [*map(str, words)], env={"KVSTORED_ADDRESS": "unix:/nowhere/k.sock"})

    before = invoke("--address", daemon.address, "--timeout-s", 60, "--json", "stats")
    assert before.exit_code == 0, before.output
    assert "tiers" in json.loads(before.output)
    after = invoke("--address", "unix:/nowhere/other.sock", "stats", "--address", daemon.address, "--json")
    assert after.exit_code == 0, "what stands after the verb counts more"
    assert json.loads(invoke("--json", "config", "show").output)["store.ttl_s"]["value"] == 3600.0
    refused = invoke("--timeout-s", 1, "completion", "bash")
    assert (refused.exit_code, refused.stderr) == (2, "kvstored: `kvstored completion` has no option --timeout-s\n")


@pytest.mark.parametrize("place", ["before", "after"])
def test_credentials_are_options_and_leave_no_trace_in_the_environment(daemon, tmp_path, place):
    words = ["--token-file", str(tmp_path / "none"), "--address", daemon.address]
    done = CliRunner().invoke(cli, [*words, "ping"] if place == "before" else ["ping", *words])
    assert done.exit_code == 2 and f"KVSTORED_TOKEN_FILE={tmp_path}/none cannot be read" in done.stderr
    assert "KVSTORED_TOKEN_FILE" not in os.environ


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "TRACE", "--ram", "1GiB", "--layout", "llama4"], "a layout is one of"),
        (["simulate", "TRACE", "--ram", "1GiB", "--layout", "32x²x128"], "a layout is one of"),
        (["simulate", "TRACE", "--ram", "lots"], "'--ram': not a size: 'lots'"),
        (["simulate", "TRACE", "--ram", "1GiB", "--disk", "-1"], "'--disk': not a size"),
        (["simulate", "TRACE", "--ram", "1GiB", "--hot", "much"], "--hot is a share"),
        (["simulate", "TRACE", "--ram", "1GiB", "--policy", "mru"], "policy must be one of"),
        (["simulate", "NOHASH", "--ram", "1GiB"], "not a request with timestamp and hash_ids"),
        (["simulate", "BINARY", "--ram", "1GiB"], "is no trace of JSON lines"),
        (["simulate", "EMPTY", "--ram", "1GiB"], "holds no request"),
        (["simulate", "NOTXZ", "--ram", "1GiB"], "is no trace of JSON lines"),
        (["replay", "NOHASH"], "not a request with timestamp and hash_ids"),
        (["replay", "TRACE", "--embedded", "HERE/none.toml"], "none.toml"),
        (["simulate", "TRACE", "--ram", "1GiB", "--plot", "HERE/none/plot.svg"], "there is no directory"),
        (["explain", "--tokens", "NOHASH", "--identity", "{}"], "token ids"),
    ],
)
def test_a_users_mistake_is_exit_code_2_and_a_sentence(run, tmp_path, words, said):
    files = {
        "TRACE": b'{"timestamp": 0, "hash_ids": [1, 2]}\n', "NOHASH": b'{"timestamp": 0}\n', "BINARY": b"\xff\xfe\x00",
        "EMPTY": b"", "NOTXZ": b"no xz",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / f"{name}{'.xz' if name == 'NOTXZ' else ''}").write_bytes(data)
    paths = {name: str(tmp_path / f"{name}{'.xz' if name == 'NOTXZ' else ''}") for name in files}
    told = run(*(paths.get(word, word.replace("HERE", str(tmp_path))) for word in words), code=2)
    assert said in told and "Traceback" not in told


@pytest.mark.parametrize(
    "words", [["simulate", "TRACE", "--ram", "1GiB"], ["fsck"], ["compact"], ["export", "OUT"], ["import", "TRACE"],
              ["replay", "TRACE", "--embedded", "memory"]],
)  # fmt: skip
def test_a_verb_that_needs_the_engine_names_the_extra(tmp_path, words, daemon):
    for package in ("torch", "lmdb", "zstandard"):
        code = f'raise ModuleNotFoundError("No module named {package}", name="{package}")'
        (tmp_path / f"{package}.py").write_text(code)
    (tmp_path / "TRACE").write_text('{"timestamp": 0, "hash_ids": [1, 2]}\n')
    (tmp_path / "STATE").write_text("")
    given = [str(tmp_path / word) if word in ("TRACE", "OUT") else word for word in words]
    given += [] if words[0] in ("simulate", "replay") else ["--data-dir", str(tmp_path)]
    bare = environment(PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}", KVSTORED_ADDRESS=daemon.address)
    done = subprocess.run([sys.executable, "-m", "kvstored", *given], env=bare, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("pip install 'kvstored[daemon]'\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["ls", "--json"], ["stats"], ["config", "show"]])
def test_a_reader_that_has_gone_is_no_mistake(client, daemon, words):
    """`kvstored stats | head` said "file: Broken pipe", or wrote a traceback while the interpreter ended."""
    for i in range(3):
        client.put(b"%d" % i, {"x": np.zeros(4, np.float32)})
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "kvstored", *words], env=environment(KVSTORED_ADDRESS=daemon.address),
                          stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60, check=False)  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


@pytest.mark.parametrize(
    ("address", "detail", "said"),
    [
        ("tls:h:1", "Tls handshake failed: CERTIFICATE_VERIFY_FAILED: self signed", "--tls-ca"),
        ("tls:h:1", "UNAUTHENTICATED: Hostname Verification Check failed.", "--tls-name"),
        ("tls:h:1", "Tls handshake failed: WRONG_VERSION_NUMBER", "write tcp:"),
        ("tls:h:1", "Failed to create security handshaker.", "no usable PEM"),
        ("tls:h:1", "last error: Socket closed", "--tls-certificate"),
        ("tcp:h:1", "last error: Socket closed", "write tls:"),
    ],
)
def test_a_tls_mistake_says_tls_and_passes_grpcs_detail_on(address, detail, said):
    with pytest.raises(Unreachable) as told, errors_as_exit_codes(address):
        raise TierUnavailable(f"UNAVAILABLE: failed to connect to all addresses; {detail}")
    assert said in str(told.value) and detail in str(told.value) and "kvstored serve" not in str(told.value)


def put(client, **entries):
    for key, (count, namespace) in entries.items():
        client.put(key.encode(), {"x": np.zeros(count, np.float32)}, namespace=namespace, fidelity="exact")


def test_ls_shows_whose_an_entry_is_short_keys_and_totals(client, run):
    put(client, one=(256, "llama@1"), two=(512, ""))
    client.put(b"any key", {"x": np.zeros(1, np.float32)})
    client.put(bytes(range(128, 160)), {"x": np.zeros(1, np.float32)})
    lines = run("ls").splitlines()
    rows = {line.rsplit("  ", 9)[0].split("  ")[0]: line for line in lines[1:-1]}
    assert set(rows) == {"one", "two", "'any key'", "hex:808182838485"}
    assert rows["one"].split()[1:3] == ["llama@1", "-"]
    assert lines[-1].startswith("4 entries, 3.0 KiB decoded, ") and "; hot " in lines[-1]
    assert f"hex:{bytes(range(128, 160)).hex()}" in run("ls", "--full")
    assert {json.loads(line)["key"] for line in run("ls", "--json").splitlines()} >= {"any key"}
    assert "any key" in run("inspect", "any key")


@pytest.mark.parametrize(("by", "first"), [("size", "large"), ("ttl", "brief"), ("hits", "hit"), ("age", "old")])
def test_ls_sorts(client, run, by, first):
    put(client, old=(1, ""), large=(99, ""), hit=(1, ""))
    client.put(b"brief", {"x": np.zeros(1, np.float32)}, ttl_s=5 * 60)
    client.get(b"hit")
    listed = [json.loads(line)["key"] for line in run("ls", "--json", "--sort", by).splitlines()]
    assert listed[0] == first and len(listed) == 4
    assert [json.loads(run("ls", "--json", "--sort", by, "--limit", 1))["key"]] == [first]


def test_flush_asks_and_forgets_all_or_a_namespace(client, run):
    put(client, a=(1, "x"), b=(1, "x@2"), c=(1, ""), d=(1, ""))
    client.pin(b"d")
    assert "Forget 4 entries at" in run("flush", answer="n\n", code=1)
    assert client.get(b"a") is not None
    assert "evicted 2 entries" in run("flush", "--namespace", "x", answer="y\n")
    assert "1 pinned ones stay" in run("flush", "--yes")
    assert [info.key for info in client.entries()] == [b"d"]
    client.unpin(b"d")


def test_ttl_is_shown_and_moved(client, run):
    put(client, k=(1, ""))
    assert run("touch", "k", "--ttl-s", 500) == "touched 1 of 1\n"
    assert 400 < int(run("ttl", "k")) <= 500
    client.pin(b"k")
    assert run("ttl", "k") == "pinned\n"
    assert json.loads(run("ttl", "k", "--json")) == {"key": "k", "ttl_left_s": None, "pinned": True}
    client.unpin(b"k")
    run("ttl", "none", code=1)
    assert run("touch", "k", "none", code=1) == "touched 1 of 2\n"


def test_demote_and_promote_take_filters_and_a_dry_run(client, run):
    put(client, a1=(64, ""), a2=(64, ""), b=(64, ""))
    tiers = lambda: {info.key: info.tiers[0] for info in client.entries()}  # noqa: E731
    assert run("demote", "--prefix", "a", "--dry-run").startswith("would demote 2 entries")
    assert run("demote", "a1", "--dry-run") == "would demote 1 of 1\n"
    assert set(tiers().values()) == {"hot"}
    assert run("demote", "--prefix", "a").startswith("demoted 2 entries")
    assert tiers() == {b"a1": "cold", b"a2": "cold", b"b": "hot"}
    assert run("promote", "--tier", "cold", "--dry-run").startswith("would promote 2 entries")
    assert json.loads(run("promote", "--tier", "cold", "--json"))["promoted"] == 2
    assert set(tiers().values()) == {"hot"}
    run("demote", code=2)


def test_the_clients_package_exports_what_a_worker_names_and_imports_nothing_early():
    code = (
        "import sys, kvstored_client as k; assert not {'grpc', 'numpy', 'torch'} & set(sys.modules), 'imported early';"
        "from kvstored_client import Client, Hit, errors; assert errors.InvalidEntry and Hit.__name__ == 'Hit';"
        "assert Client is k.Client and k.__version__ and set(k.__all__) <= set(dir(k)) and 'torch' not in sys.modules;"
        "assert not hasattr(k, 'Clinet')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
