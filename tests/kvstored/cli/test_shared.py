"""`kvstored remote`: what the shared store brought, whether it is fit, and emptying it for all hosts."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvstore.clock import SystemClock
from kvstore.config import SharedConfig
from kvstored.cli import cli
from kvstored.cli.top import shared_line
from kvstored.telemetry.metrics import _SHARED, StoreCollector
from tests.kvstore.shared.memory import MemoryEngine, MemoryServer
from tests.kvstored.inside import InsideDaemon, daemon_inside

WAIT_S = 60.0


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(SystemClock())


@pytest.fixture
def settings(tmp_path: Path) -> SharedConfig:
    secret = tmp_path / "share.key"
    secret.write_text("1" * 64)
    secret.chmod(0o600)
    return SharedConfig(url="valkey://nowhere:1", secret_file=str(secret), clear=True, tokens_min=0, lookup_s=30.0)


@pytest.fixture
def daemon(settings: SharedConfig, server: MemoryServer) -> Iterator[InsideDaemon]:
    with daemon_inside(outside={"shared": settings, "engine": MemoryEngine(server)}) as found:
        yield found


def ask(daemon: InsideDaemon, *arguments: str, answer: str = "") -> Result:
    asked = ["--address", f"unix:{daemon.socket_path}", "--timeout-s", "60", "remote", *arguments]
    return CliRunner().invoke(cli, asked, input=answer)


def put(daemon: InsideDaemon, server: MemoryServer) -> list[bytes]:
    done = threading.Event()
    server.at["put:done"] = lambda names: done.set()
    keys = [b"chunk %d" % i + bytes(24) for i in range(3)]
    chunk = np.arange(2048, dtype=np.float32)
    daemon.client().put_many([(key, {"x": chunk}) for key in keys], chain=True)
    assert done.wait(WAIT_S)
    return keys


def test_status_says_what_was_published_and_that_the_store_answers(daemon, server):
    put(daemon, server)
    shown = ask(daemon, "status")
    assert shown.exit_code == 0, shown.output
    assert "closed: it is asked" in shown.output
    assert "3 chunks" in shown.output
    values = json.loads(ask(daemon, "status", "--json").output)
    assert values["shared"] is True
    assert values["values"]["shared_published"] == 3


def test_check_is_silent_about_a_store_that_is_fit_and_names_what_is_wrong_with_one_that_is_not(daemon, server):
    assert ask(daemon, "check").exit_code == 0
    assert json.loads(ask(daemon, "check", "--json").output) == {"good": True, "complaints": []}
    server.down = True
    shown = ask(daemon, "check")
    assert shown.exit_code == 1
    assert "put of a probe failed" in shown.output
    found = json.loads(ask(daemon, "check", "--json").output)
    assert found["good"] is False
    assert len(found["complaints"]) == 5
    assert "settings are not known" in found["complaints"][-1]


def test_flush_asks_first_and_then_no_host_finds_what_was_there(daemon, server, settings):
    keys = put(daemon, server)
    refused = ask(daemon, "flush", answer="n\n")
    assert refused.exit_code == 1
    with daemon_inside(outside={"shared": settings, "engine": MemoryEngine(server)}) as other:
        assert len(other.client().match(keys).held) == 3
    assert ask(daemon, "flush", answer="y\n").exit_code == 0
    with daemon_inside(outside={"shared": settings, "engine": MemoryEngine(server)}) as other:
        assert len(other.client().match(keys).held) == 0


def test_flush_of_a_store_that_does_not_answer_says_so(daemon, server):
    server.down = True
    done = ask(daemon, "flush", "--yes")
    assert done.exit_code == 4
    assert "no answer" in done.output


def test_a_daemon_that_shares_nothing_says_that_it_does_not():
    with daemon_inside() as alone:
        for verb in (["status"], ["check"], ["flush", "--yes"]):
            done = ask(alone, *verb)
            assert done.exit_code in (1, 2), done.output
            assert "store.shared.url" in done.output
            assert "Traceback" not in done.output
        assert json.loads(ask(alone, "status", "--json").output.splitlines()[0]) == {"shared": False, "values": {}}
        assert shared_line(alone.store.stats().values) == ""


def test_every_number_of_a_shared_store_has_a_metric_and_top_a_line(daemon, server):
    put(daemon, server)
    daemon.store._sharing.source.numbers.drop("full", 2)
    daemon.store._sharing.source.numbers.failed("timeout")
    found = {metric.name: metric for metric in StoreCollector(daemon.store.stats).collect()}
    assert not found["kvstored_other"].samples
    assert {family.name.removesuffix("_total") for family in _SHARED} <= set(found)
    assert [(s.labels, s.value) for s in found["kvstored_shared_dropped"].samples] == [({"reason": "full"}, 2.0)]
    assert "1 of 1 nodes up" in shared_line(daemon.store.stats().values | {"shared_nodes": 1, "shared_nodes_up": 1})
    assert "not published: 2 full" in shared_line(daemon.store.stats().values)
    assert "not published" not in shared_line({"shared_lookups": 0.0})
    assert "BREAKER OPEN" in shared_line({"shared_lookups": 0.0, "shared_breaker": 2.0})
