"""`kvstored config show --running` and `config set`, and SIGHUP: settings of a daemon that goes on serving."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from kvstore.errors import ConfigError
from kvstored.cli import cli
from kvstored.live import LIVE, LiveSettings, with_setting
from kvstored.settings import Settings
from tests.conftest import wait_until
from tests.kvstored.conftest import running_daemon

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon():
    with running_daemon(store="ttl_s = 600\n[store.hot]\ncapacity_nbytes = '64MiB'") as found:
        found.start()
        yield found


@pytest.fixture
def run(daemon, monkeypatch):
    monkeypatch.setenv("KVSTORED_ADDRESS", daemon.address)

    def invoke(*words, code=0):
        done = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return invoke


def in_force(run):
    return json.loads(run("config", "show", "--running", "--json").stdout)


def test_the_running_daemon_shows_its_settings_with_their_origins(run, daemon):
    found = in_force(run)
    assert found["store.ttl_s"] == {"value": 600.0, "origin": str(daemon.config), "live": True}
    assert found["store.policy"] == {"value": "lru", "origin": "default", "live": False}
    assert "store.policy" not in run("config", "show", "--running", "--changed").stdout


def test_a_budget_set_is_in_force_at_once_and_says_that_no_file_has_it(run, daemon):
    client = daemon.client(framework="numpy")
    client.put_many([(b"%d" % i, {"x": np.zeros(MIB, np.float32)}) for i in range(8)])
    done = run("config", "set", "store.hot.capacity_nbytes=8MiB", "server.log_level=warning")
    assert f"store.hot.capacity_nbytes is {8 * MIB}, was {64 * MIB}" in done.stdout
    assert "until the next restart or reload" in done.stderr
    hot = client.stats().tiers["hot"]
    assert hot.capacity_nbytes == 8 * MIB >= hot.used_nbytes
    assert all(client.get_many([b"%d" % i for i in range(8)])), "what sank is there"
    found = in_force(run)
    assert found["store.hot.capacity_nbytes"] == {"value": 8 * MIB, "origin": "config set", "live": True}
    again = json.loads(run("config", "set", "store.hot.capacity_nbytes=8MiB", "store.ttl_s=5", "--json").stdout)
    assert again == {"store.ttl_s": {"before": 600.0, "now": 5.0}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["store.hot.capacity=8GiB"], "unknown setting store.hot.capacity; did you mean store.hot.capacity_nbytes?"),
        (["server.threads=3"], "server.threads needs a restart: set it in the file and restart the daemon"),
        (["store.ttl_s=0"], "ttl_s must be from 0.001 to"),
        (["store.hot.capacity_nbytes=much"], "not a size: 'much'"),
        (["store.hot=1"], "unknown setting store.hot; did you mean store."),
        (["server.log_level=loud"], "server.log_level must be one of debug, info, warning, error, got 'loud'"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_a_sentence_and_nothing_changes(run, words, sentence):
    before = in_force(run)
    done = run("config", "set", "store.warm.capacity_nbytes=1GiB", *words, code=4)
    assert sentence in done.stderr
    assert in_force(run) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["set", "store.ttl_s"], "expected NAME=VALUE, such as store.hot.capacity_nbytes=8GiB, got 'store.ttl_s'"),
        (["show", "--running", "k.toml"], "--running asks the daemon for its own settings: leave FILE out"),
    ],
)
def test_what_makes_no_sense_is_exit_code_2(run, words, sentence):
    assert sentence in run("config", *words, code=2).stderr


def test_sighup_takes_the_file_again_and_names_what_needs_a_restart(run, daemon):
    run("config", "set", "store.warm.capacity_nbytes=1GiB")
    before = daemon.config.read_text()
    daemon.config.write_text(before.replace("64MiB", "32MiB").replace("[store]", "threads = 3\n[store]"))
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "settings changed that need a restart names=server.threads" in daemon.log)
    found = in_force(run)
    assert found["store.hot.capacity_nbytes"] == {"value": 32 * MIB, "origin": str(daemon.config), "live": True}
    assert found["store.warm.capacity_nbytes"]["origin"] == "default", "config set holds until a reload"
    assert found["server.threads"]["value"] == 8
    daemon.config.write_text(before.replace("ttl_s = 600", "ttl_s = -1"))
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reload failed error=ttl_s must be from" in daemon.log)
    assert in_force(run) == found


def test_what_is_set_by_hand_is_in_the_log_with_its_values_and_names_no_key(run, daemon):
    run("config", "set", "store.ttl_s=77")
    assert "setting changed name=store.ttl_s from=" in daemon.log
    assert "to=77.0 origin=config set" in daemon.log
    audit = [line for line in daemon.log.splitlines() if "Admin/Configure" in line][-1]
    assert "keys=0 first=-" in audit


def test_a_change_that_fails_to_apply_leaves_the_settings_as_they_were():
    def apply(settings):
        raise ConfigError("no")

    live = LiveSettings(Settings(), apply, lambda: (Settings(), {}), {})
    before = live.rows()
    with pytest.raises(ConfigError):
        live.change({"store.ttl_s": "5"})
    assert live.rows() == before


def test_every_live_setting_exists_and_is_changed_as_a_file_would():
    for name in LIVE:
        value = "debug" if name.endswith("log_level") else "1234567"
        settings = Settings()
        changed = with_setting(settings, name, value)
        assert changed != settings
    store = replace(Settings().store, ttl_s=5.0)
    assert with_setting(Settings(), "store.ttl_s", "5").store == store
