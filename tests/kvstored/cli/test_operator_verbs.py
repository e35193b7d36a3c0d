"""The operator's verbs: filters, eviction by filter, live views, settings, doctor, tokens, completion, the manual."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time

import click
import numpy as np
import pytest
from click.testing import CliRunner

from kvstore.errors import ConfigError
from kvstore.stats import Stats, TierStats
from kvstored.access.tokens import digest, read_tokens
from kvstored.cli import cli
from kvstored.cli.manual import man_page, manual
from kvstored.cli.remote import namespaces
from kvstored.cli.top import accounts, rates, screen
from tests.conftest import ROOT, environment
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
    for i in range(3):
        found.put(b"small:%d" % i, {"x": np.full(100, i, np.uint8)}, fidelity="exact")
        found.put(b"large:%d" % i, {"x": np.full(200_000, i, np.float32)})
    return found


@pytest.fixture
def run(daemon):
    def invoke(*words, code=0):
        where = ("--address", daemon.address, "--timeout-s", "60")
        done = CliRunner().invoke(cli, [*map(str, words), *where], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.output

    return invoke


def listed(run, *words):
    return {json.loads(line)["key"] for line in run("ls", "--json", *words).splitlines()}


def test_ls_filters_narrow_each_other(client, run):
    assert listed(run, "--prefix", "small") == {"small:0", "small:1", "small:2"}
    assert listed(run, "--larger-than", "100KB") == {"large:0", "large:1", "large:2"}
    assert listed(run, "--larger-than", "100KB", "--prefix", "small") == set()
    assert listed(run, "--older-than-s", 3600) == set()
    assert len(listed(run, "--older-than-s", 0)) == 6
    assert listed(run, "--encoding", "nf4") == set()
    client.demote(b"large:1")
    assert listed(run, "--encoding", "nf4") == listed(run, "--tier", "warm") == {"large:1"}
    assert len(listed(run, "--larger-than", "1B", "--limit", 2)) == 2


def test_namespaces_and_tenants_are_filters_too(client, run):
    x = {"x": np.zeros(10, np.uint8)}
    for key, namespace in ((b"n1", "llama@0a"), (b"n2", "llama@0b"), (b"n3", "llama2")):
        client.put(key, x, namespace=namespace)
    assert listed(run, "--namespace", "llama") == {"n1", "n2"}
    assert listed(run, "--namespace", "llama@0a") == {"n1"}
    assert listed(run, "--namespace", "lla") == set()
    assert listed(run, "--namespace", "llama", "--tenant", "nobody") == set()
    assert "would evict 2 entries" in run("evict", "--namespace", "llama", "--dry-run")
    assert json.loads(run("evict", "--namespace", "llama", "--json"))["evicted"] == 2
    assert listed(run, "--namespace", "llama2") == {"n3"}
    assert re.search(r"namespace: +llama2\n", run("inspect", "n3"))
    assert "llama2" in run("top", "--count", 1)


def test_evict_by_filter_counts_and_a_dry_run_changes_nothing(client, run):
    before = listed(run)
    assert "would evict 3 entries" in run("evict", "--prefix", "small", "--dry-run")
    assert json.loads(run("evict", "--prefix", "small", "--dry-run", "--json"))["would_evict"] == 3
    assert listed(run) == before
    client.pin(b"small:1")
    assert re.fullmatch(r"evicted 2 entries, \S+ K?i?B; 1 pinned ones stay\n", run("evict", "--prefix", "small"))
    assert listed(run, "--prefix", "small") == {"small:1"}
    client.demote(b"large:0")
    found = json.loads(run("evict", "--tier", "warm", "--json"))
    assert (found["asked"], found["evicted"]) == (1, 1)
    client.unpin(b"small:1")
    run("evict", "--older-than-s", 0)
    assert listed(run) == set()


def test_evict_takes_keys_or_filters_and_never_everything_by_accident(client, run):
    for words in ((), ("small:0", "--prefix", "s")):
        assert "one of the two" in run("evict", *words, code=2)
    assert "would evict 1 of 2" in run("evict", "small:0", "absent", "--dry-run", code=1)
    assert "evicted 1 of 2" in run("evict", "small:0", "absent", code=1)


def test_drain_writes_what_is_only_in_memory(client, run):
    assert re.fullmatch(r"wrote \d+ entries to the cold tier\n", run("drain"))
    assert {info.tiers[-1] for info in client.entries()} == {"cold"}
    assert json.loads(run("drain", "--json"))["written"] == 0


def test_top_and_watch_show_the_numbers_again_and_again(client, run):
    client.get(b"small:0")
    text = run("top", "--count", 2, "--interval-s", 0.1)
    assert text.count("TIER") == 2
    assert "hit ratio" in text
    assert "SLOWEST CALLS" in text
    lines = run("top", "--count", 2, "--interval-s", 0.1, "--json").splitlines()
    assert {"tiers", "rates"} <= set(json.loads(lines[1]))
    assert "COUNTER" in run("stats")


def test_rates_begin_anew_after_a_restart():
    def stats(gets, uptime_s):
        return Stats({"gets": gets, "hits": gets / 2, "uptime_s": uptime_s}, {})

    assert rates(stats(100, 10), stats(150, 20), 10)["gets"] == 5
    assert rates(None, stats(100, 10), 0)["gets"] == 10
    assert rates(stats(1000, 100), stats(20, 4), 10)["gets"] == 5


def test_top_shows_the_namespaces_that_are_hit_now_before_those_that_were():
    def stats(new, old, uptime_s):
        counted = {"namespace_hits_new": new, "namespace_hits_old": old, "namespace_nbytes_new": 3 << 20}
        return Stats({**counted, "namespace_entries_new": 7, "tenant_hits_t": 5, "uptime_s": uptime_s}, {})

    before, now = stats(0, 1000, 10), stats(50, 1000, 20)
    assert [(one.name, one.hits_per_s) for one in accounts("namespace", before, now, 10)] == [("new", 5), ("old", 0)]
    text = "\n".join(screen(before, now, 10))
    assert re.search(r"HOTTEST NAMESPACES +HITS/S +HITS +ENTRIES +BYTES\nnew +5\.0 +50 +7 +3\.0 MiB\nold +0\.0", text)
    assert re.search(r"TENANTS .*\nt +0\.0 +5 ", text)


def test_a_failing_disk_and_an_empty_tier_are_seen_in_top():
    text = "\n".join(screen(None, Stats({"cold_healthy": 0.0}, {"warm": TierStats(0, 0, 0)}), 1))
    assert "DISK FAILING" in text
    assert "0%" in text


def test_top_waits_for_no_daemon_when_told_how_often_to_look(tmp_path):
    done = CliRunner().invoke(cli, ["top", "--count", "1", "--address", f"unix:{tmp_path}/none", "--timeout-s", "1"])
    assert done.exit_code == 3


def test_config_shows_every_setting_with_its_origin(tmp_path, monkeypatch):
    file = tmp_path / "k.toml"
    file.write_text("[server]\nsilence_s = 3\n[store.hot]\ncapacity_nbytes = '2GiB'\n")
    monkeypatch.setenv("KVSTORED_STORE__TTL_S", "77")
    done = CliRunner().invoke(cli, ["config", "show", str(file), "--json"])
    found = json.loads(done.output)
    assert found["server.silence_s"] == {"value": 3.0, "origin": str(file), "live": False}
    assert found["store.hot.capacity_nbytes"] == {"value": 2 << 30, "origin": str(file), "live": True}
    assert found["store.ttl_s"] == {"value": 77.0, "origin": "KVSTORED_STORE__TTL_S", "live": True}
    assert found["store.promote_after"] == {"value": 2, "origin": "default", "live": False}
    assert found["server.data_dir"]["origin"] == "this host"
    changed = CliRunner().invoke(cli, ["config", "show", str(file), "--changed"]).output
    assert "server.silence_s" in changed
    assert "promote_after" not in changed


def test_config_check_finds_what_serve_would_refuse(tmp_path):
    file = tmp_path / "k.toml"
    for text, code, words in (
        ("[server]\nsilence_s = 3\n", 0, "good"),
        ("[server]\nsilense_s = 3\n", 2, "did you mean server.silence_s"),
        (f"[server]\ntokens = '{tmp_path}/none'\n", 2, "cannot read"),
        (f"[server]\ntls_certificate = '{tmp_path}/c'\ntls_key = '{tmp_path}/k'\n", 2, f"{tmp_path}/c"),
    ):
        file.write_text(text)
        done = CliRunner().invoke(cli, ["config", "check", str(file)])
        assert (done.exit_code, words in done.output) == (code, True), done.output


def test_doctor_finds_what_is_wrong_and_says_what_to_do(tmp_path, daemon):
    good = CliRunner().invoke(cli, ["doctor", "--config", str(daemon.config), "--json"], catch_exceptions=False)
    found = [json.loads(line) for line in good.output.splitlines()]
    assert any("is up for" in one["what"] for one in found)
    assert any("has mode 0660" in one["what"] for one in found)
    config = tmp_path / "k.toml"
    config.write_text(
        f"[server]\naddress = 'unix:{tmp_path}/k.sock'\ndata_dir = '{tmp_path}/d'\n"
        "[store.hot]\ncapacity_nbytes = '900TiB'\n[store.cold]\ncapacity_nbytes = '900TiB'\n"
    )
    done = CliRunner().invoke(cli, ["doctor", "--config", str(config), "--json"], catch_exceptions=False)
    assert done.exit_code == 4
    bad = [json.loads(line) for line in done.output.splitlines() if '"bad"' in line]
    assert len(bad) == 3
    assert bad[-1]["what"].startswith("no answer at unix:")
    assert all(one["todo"] for one in bad)
    config.write_text(f"[server]\naddress = 'unix:{tmp_path}/k.sock'\ndata_dir = '{tmp_path}/d'\n"
                      "[store.hot]\ncapacity_nbytes = '1MiB'\n[store.warm]\ncapacity_nbytes = '1MiB'\n"
                      "[store.cold]\ncapacity_nbytes = '1MiB'\n")  # fmt: skip
    done = CliRunner().invoke(cli, ["doctor", "--config", str(config), "--json"], catch_exceptions=False)
    assert done.exit_code == 3, "nothing answers, and nothing else is wrong"


def test_a_tokens_file_or_a_key_that_others_may_change_or_read_is_refused_everywhere(tmp_path):
    from kvstored.access.tls import Certificates

    (tmp_path / "t").write_text("")
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----")
    (tmp_path / "pem").write_text("-----BEGIN CERTIFICATE-----")
    config = tmp_path / "k.toml"
    config.write_text(
        f"[server]\naddress = 'unix:{tmp_path}/k.sock'\ntokens = '{tmp_path}/t'\n"
        f"tls_certificate = '{tmp_path}/pem'\ntls_key = '{tmp_path}/key'\n"
    )
    for name, mode, words in (
        ("t", 0o646, "everybody on this host can write"),
        ("t", 0o660, "its group can write"),
        ("t", 0o644, "note: everybody on this host can read"),
        ("key", 0o644, "everybody on this host can read"),
        ("key", 0o602, "everybody on this host can write"),
    ):
        (tmp_path / "t").chmod(0o640)
        (tmp_path / "key").chmod(0o640)
        assert CliRunner().invoke(cli, ["config", "check", str(config)]).exit_code == 0
        (tmp_path / name).chmod(mode)
        checked = CliRunner().invoke(cli, ["config", "check", str(config)])
        refused = not words.startswith("note")
        assert (checked.exit_code, words in checked.output) == (2 if refused else 0, True), checked.output
        doctor = CliRunner().invoke(cli, ["doctor", "--config", str(config), "--json"]).output
        found = [json.loads(line) for line in doctor.splitlines() if str(tmp_path / name) in line and "chmod" in line]
        assert [one["verdict"] for one in found] == ["bad" if refused else "note"]
        if refused:
            with pytest.raises(ConfigError, match=words):
                read_tokens(tmp_path / "t") if name == "t" else Certificates(
                    str(tmp_path / "pem"), str(tmp_path / "key")
                ).credentials()


def test_the_overflow_uid_is_refused_as_an_identity(tmp_path):
    from kvstore.ownership import overflow_uid
    from kvstored.access.interceptor import Access

    file = tmp_path / "tokens.toml"
    file.write_text(f'[[token]]\nname = "a"\nsha256 = "{"a" * 64}"\nrights = ["read"]\nuid = {overflow_uid()}\n')
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="names nobody"):
        read_tokens(file)
    access = Access(None, token_on_unix=False)
    assert access.of_user(overflow_uid()) is None, "users of one number share no memory"
    assert access.of_user(overflow_uid() - 1) is not None


def test_a_user_whom_the_lease_socket_refuses_leaves_a_line_a_minute(caplog):
    from kvstored.access.interceptor import Access
    from kvstored.access.refusals import Lines
    from kvstored.access.tokens import Tokens

    access, now = Access(Tokens(), token_on_unix=False), [0.0]
    access.user_lines = Lines(1, lambda: now[0])
    with caplog.at_level("INFO", "kvstored.audit"):
        assert access.of_user(4_000_000_000) is None
        assert not caplog.records, "who is only looked up is not refused"
        for _ in range(3):
            access.refuse_user(4_000_000_000)
        now[0] = 61.0
        access.refuse_user(4_000_000_000)
    line = "lease verb=connect who=nobody peer=lease:4000000000 result=UNAUTHENTICATED left_out=%d reason=no entry"
    assert [record.getMessage() for record in caplog.records] == [line % 0, line % 2]


def test_a_delete_and_a_pin_leave_a_line_through_either_door(daemon):
    for shared in (True, False):
        with daemon.client(framework="numpy", shared_memory=shared) as client:
            for _ in range(2):  # the second one of a kind leaves its line as well
                client.pin(b"audited")
                client.delete(b"audited", b"other")
    first = b"audited".hex()  # other tests use this daemon, too
    for door in ("Lease/delete", "Lease/pin", "Cache/Delete", "Cache/Pin"):
        keys = 1 if door.lower().endswith("pin") else 2
        lines = re.findall(rf"verb={door} who=local peer=\S+ keys={keys} first={first} result=OK", daemon.log)
        assert len(lines) == 2, door


def test_a_token_is_shown_once_and_its_entry_lets_it_in(tmp_path):
    out = tmp_path / "worker.token"
    done = CliRunner().invoke(cli, ["token", "worker-a", "--tenant", "team", "--right", "read", "-o", str(out)])
    assert done.exit_code == 0, done.output
    token = out.read_text().strip()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert token not in done.output
    assert digest(token) in done.output
    (tmp_path / "tokens.toml").write_text(done.output)
    identity = read_tokens(tmp_path / "tokens.toml").of_token(token)
    assert (identity.name, identity.tenant, identity.rights) == ("worker-a", "team", frozenset({"read"}))
    again = CliRunner().invoke(cli, ["token", "worker-a", "-o", str(out)])
    assert again.exit_code == 2
    assert out.read_text().strip() == token


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_what_their_shells_parse(shell):
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert "_KVSTORED_COMPLETE" in done.output
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.output, text=True, check=True)


def test_ls_sums_by_namespace_or_tenant_the_largest_first(client, run):
    for key, size, namespace in ((b"a", 1000, "small"), (b"b", 100_000, "big"), (b"c", 100_000, "big")):
        client.put(key, {"x": np.zeros(size, np.uint8)}, namespace=namespace, fidelity="exact")
    client.get(b"b")
    rows = [json.loads(line) for line in run("ls", "--by", "namespace", "--json").splitlines()]
    held = {row["namespace"]: row for row in rows}
    assert {**held["big"], "tier_nbytes": 0} == {
        "namespace": "big", "entries": 2, "value_nbytes": 200_000, "hits": 1, "tier_nbytes": 0,
    }  # fmt: skip
    assert 200_000 <= held["big"]["tier_nbytes"]["hot"] < 210_000
    assert [row["namespace"] for row in rows if row["namespace"]] == ["big", "small"]
    shown = run("ls", "--by", "namespace", "--namespace", "big")
    assert re.search(r"^big +2 +19\d\.\d KiB +100\.0% +1 +hot 19\d\.\d KiB$", shown, re.MULTILINE)
    client.demote(b"b")
    below = [json.loads(line) for line in run("ls", "--by", "tenant", "--tier", "hot", "--json").splitlines()]
    assert [row["tenant"] for row in below] == [""]
    assert set(below[0]["tier_nbytes"]) == {"hot"}


def completed(words, *, address, shell="bash"):
    """What a shell shows after the words, the last one begun."""
    typed = " ".join(["kvstored", *words])
    how = {"_KVSTORED_COMPLETE": f"{shell}_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", "from kvstored.cli import cli; cli(prog_name='kvstored')"],
        env=environment(KVSTORED_ADDRESS=address, **how), check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_the_namespaces_of_the_running_daemon(client, daemon):
    x = {"x": np.zeros(10, np.uint8)}
    for namespace in ("org/llama@0a", "qwen@01"):
        client.put(namespace.encode(), x, namespace=namespace)
        client.get(namespace.encode())
    assert {"org/llama@0a", "qwen@01"} <= set(completed(["ls", "--namespace", ""], address=daemon.address))
    assert completed(["flush", "--namespace", "qw"], address=daemon.address) == ["qwen@01"]


def test_completion_is_silent_and_quick_where_no_daemon_answers(tmp_path):
    started = time.monotonic()
    context = click.Context(cli, info_name="kvstored")
    with socket.socket(socket.AF_UNIX) as silent:  # it accepts, and never answers
        silent.bind(str(tmp_path / "k.sock"))
        silent.listen()
        for address in (f"unix:{tmp_path}/k.sock", f"unix:{tmp_path}/absent.sock", "http://nonsense"):
            context.params = {"address": address}
            assert namespaces(context, click.Option(["--namespace"]), "") == []
    assert time.monotonic() - started < 20  # 0.5 s each, on a machine with nothing else to do


def test_verify_reads_every_record_while_the_daemon_serves_and_drops_what_is_damaged():
    with running_daemon(store="[store.cold]\ncapacity_nbytes = '64MiB'") as daemon:
        daemon.start()
        client = daemon.client(framework="numpy")
        for i in range(4):
            client.put(b"key:%d" % i, {"x": np.full(5000, 0x50 + i, np.uint8)}, fidelity="exact")
        client.drain()

        def verify(code):
            words = [sys.executable, "-m", "kvstored", "verify", "--json", "--address", daemon.address]
            done = subprocess.run([*words, "--timeout-s", "60"], check=False, capture_output=True, text=True)
            assert done.returncode == code, done.stderr
            return json.loads(done.stdout)

        found = verify(0)
        assert (found["checked"], found["total"], found["corrupt"]) == (4, 4, 0)
        assert found["nbytes"] > 4 * 5000
        (segment,) = (daemon.directory / "data/cold/segments").iterdir()
        data = segment.read_bytes()
        with segment.open("r+b") as file:  # in place: the daemon has it open
            file.seek(data.index(b"\x52" * 5000) + 77)
            file.write(b"!")
        assert verify(4)["corrupt"] == 1
        assert verify(0)["total"] == 3
        client.evict(b"key:0")  # a verb in between, and memory answers as before
        assert client.get(b"key:1") is not None


def test_the_manual_is_current():
    """`make cli-docs` writes it."""
    assert (ROOT / "docs/cli.md").read_text() == manual()
    assert (ROOT / "docs/kvstored.1").read_text() == man_page()


def test_man_reads_its_page_without_a_warning_and_has_every_verb():
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man or groff is not installed")
    done = subprocess.run(
        ["man", "--warnings", "-E", "ascii", "-l", str(ROOT / "docs/kvstored.1")], capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "MANWIDTH": "100", "MAN_KEEP_FORMATTING": "", "PAGER": "cat"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for name in cli.commands:
        assert re.search(rf"^ +kvstored {name}\b", done.stdout, re.MULTILINE), name
