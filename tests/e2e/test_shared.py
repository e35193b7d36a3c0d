"""Daemons as users run them, over real servers: what one puts is a hit on the other; a dead store costs misses."""

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import redis

from kvstored_client import Client
from tests.conftest import ROOT, DaemonProcess, environment, factory, wait_until
from tests.kvstore.shared.engines.servers import Servers

pytestmark = pytest.mark.slow
TOKENS = list(range(1024))
RNG = np.random.default_rng(5)
K, V = (RNG.standard_normal((2, 1024, 2, 64)).astype(np.float32) for _ in range(2))


@pytest.fixture(scope="module", params=[1, 6], ids=["standalone", "cluster"])
def servers(request) -> Iterator[Servers]:
    found = Servers(request.param, cluster=request.param > 1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def hosts(servers: Servers, tmp_path_factory) -> Iterator[list[DaemonProcess]]:
    secrets = tmp_path_factory.mktemp("secrets")
    for name, digit in (("share", "1"), ("seal", "2")):
        (secrets / name).write_text(digit * 64)
        (secrets / name).chmod(0o600)
    table = (
        f'[store.shared]\nurl = "{servers.url}"\nsecret_file = "{secrets}/share"\nlookup_s = 5\nfetch_s = 20\n'
        f'key_files = {{ "*" = "{secrets}/seal" }}\n'
    )
    with factory() as make:
        found = [make(store=table, start=False) for _ in range(2)]
        for host in found:
            host.start(wait=False)
        for host in found:
            host.wait_until_up()
        yield found


def prefixes(client: Client, revision: str):
    return client.namespace(
        model="org/model", revision=revision, dtype="float32", layers=2, kv_heads=2, head_dim=64, layout="lthd"
    )


def value_of(client: Client, name: str) -> float:
    return client.stats().values[name]


def published(client: Client, revision: str) -> None:
    """Put the prefix, and wait until the shared store has its four chunks."""
    space = prefixes(client, revision)
    assert space.put_prefix(TOKENS, K, V) == 4
    wait_until(lambda: [of.shared[:4] for of in client.explain(*space.keys(TOKENS))] == ["yes,"] * 4)


def command(daemon: DaemonProcess, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kvstored", "--address", daemon.address, *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_prefix_put_on_one_host_is_read_on_the_other_as_that_one_holds_it(hosts):
    a, b = (host.client(framework="numpy") for host in hosts)
    published(a, "one")
    space = prefixes(b, "one")
    match = space.match_prefix(TOKENS)
    assert (int(match), match.held[0].tier) == (4, "shared")
    n, k, v = space.get_prefix(TOKENS)
    assert n == 1024
    assert np.abs(k - K).max() < 0.6 > np.abs(v - V).max(), "as NF4"
    hits = value_of(b, "shared_hits")
    n, again, _ = space.get_prefix(TOKENS)
    assert (n, value_of(b, "shared_hits")) == (1024, hits), "the second time it is here"
    assert np.array_equal(k, again)
    assert prefixes(b, "another revision").get_prefix(TOKENS)[0] == 0


def test_an_operator_sees_it_checks_it_and_flushes_it(hosts, servers):
    a, b = (host.client(framework="numpy") for host in hosts)
    published(a, "operated")
    status = json.loads(command(hosts[0], "remote", "status", "--json").stdout)
    assert status["values"]["shared_published"] >= 4, status
    for policy, word in ((None, "is fit"), ("noeviction", "noeviction"), ("allkeys-lru", "is fit")):
        for port in servers.processes if policy else ():
            servers.client(port).config_set("maxmemory-policy", policy)
        # A server that does not tell its settings within a second is named; on a busy machine that may be any.
        wait_until(lambda word=word: word in command(hosts[0], "remote", "check", "--timeout-s", "60").stdout)
    assert command(hosts[0], "remote", "flush", "--yes", "--timeout-s", "60").returncode == 0
    wait_until(lambda: prefixes(b, "operated").match_prefix(TOKENS) == 0, "the other host misses")


def test_a_store_that_dies_costs_misses_and_what_is_here_is_still_served(hosts, servers):
    a, b = (host.client(framework="numpy") for host in hosts)
    published(a, "dies")
    ports = list(servers.processes)
    servers.pause(*ports)
    try:
        assert prefixes(b, "dies").get_prefix(TOKENS)[0] == 0
        assert prefixes(a, "dies").get_prefix(TOKENS)[0] == 1024
        assert prefixes(b, "dies").put_prefix(TOKENS[:512], K[:, :512], V[:, :512]) == 2
    finally:
        servers.resume(*ports)
    wait_until(lambda: prefixes(b, "dies").get_prefix(TOKENS)[0] == 1024, "it is asked again once it answers")
    if len(ports) > 1:
        servers.wait_until_whole()  # what elects a primary meanwhile costs the other tests misses


def test_a_prefix_deleted_on_a_host_does_not_come_back_to_it(hosts):
    a, b = (host.client(framework="numpy") for host in hosts)
    published(a, "deleted")
    wait_until(lambda: prefixes(b, "deleted").get_prefix(TOKENS)[0] == 1024)
    assert a.delete(prefixes(a, "deleted").keys(TOKENS)[0]) == 1
    assert prefixes(a, "deleted").get_prefix(TOKENS)[0] == 0
    assert prefixes(b, "deleted").get_prefix(TOKENS)[0] == 1024, "other hosts keep their own copies"


def test_nothing_in_the_store_tells_a_key_or_a_value(hosts, servers):
    a = hosts[0].client(framework="numpy")
    published(a, "secret")
    keys, found = prefixes(a, "secret").keys(TOKENS), 0
    for port in servers.processes:
        client = servers.client(port)
        for name in client.scan_iter():
            try:
                data = client.get(name)
            except redis.exceptions.MovedError:  # a replica has the name, and its primary the value
                continue
            if data is None:
                continue  # a claim that ended meanwhile
            found += 1
            for key in keys:
                assert key not in name and key.hex().encode() not in name.lower()
                assert key not in data
            assert b"org/model" not in data
            assert K[0, 0, 0, :4].tobytes() not in data
    assert found >= 4
