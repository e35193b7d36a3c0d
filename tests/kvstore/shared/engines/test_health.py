"""What an operator is told of servers and buckets that would lose, block or refuse."""

import re

import pytest

from kvstore.clock import ManualClock, SystemClock
from kvstore.shared import s3_health
from kvstore.shared.addresses import Address, S3Url, parse_url
from kvstore.shared.link import Login
from kvstore.shared.nodes import SLOTS, Shard, Topology
from kvstore.shared.valkey import Valkey

from .conftest import BUCKET, valkey_of

GOOD = {
    "maxmemory": "268435456",
    "maxmemory-policy": "allkeys-lru",
    "maxmemory-samples": "64",
    "proto-max-bulk-len": "536870912",
    "client-output-buffer-limit": "replica 1073741824 536870912 60",
}


@pytest.fixture
def complaints_with(standalone):
    """Complaints with some settings changed."""
    client = standalone.client(standalone.ports[0])

    def complaints(clock=None, topology=None, **settings):
        for name, value in settings.items():
            client.config_set(name.replace("_", "-"), value)
        engine = Valkey(parse_url(standalone.url).seeds, Login(), clock or SystemClock())
        if topology is not None:
            engine.nodes.adopt(topology)
            engine.keeper._learn = lambda address: topology
        try:
            return engine.health(20.0).complaints
        finally:
            engine.close()

    yield complaints
    for name, value in GOOD.items():
        client.config_set(name, value)


def test_good_settings_are_no_complaint(complaints_with):
    assert complaints_with() == []


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"maxmemory_policy": "noeviction"}, "maxmemory-policy is noeviction: once full it refuses every write"),
        ({"maxmemory": "0"}, "maxmemory is 0, no limit"),
        ({"maxmemory_samples": "5"}, "maxmemory-samples is 5: once full it evicts much that is still read; set 64"),
        ({"proto_max_bulk_len": "1048576"}, "proto-max-bulk-len is 1048576, less than a piece of 2097152"),
    ],
)
def test_a_setting_that_loses_or_refuses_is_named_with_its_value(complaints_with, standalone, setting, sentence):
    (complaint,) = complaints_with(**setting)
    assert sentence in complaint
    assert complaint.startswith(f"127.0.0.1:{standalone.ports[0]}: ")


def test_an_output_buffer_that_is_small_for_replicas_is_a_complaint_where_there_are_replicas(
    complaints_with, standalone
):
    small = {"client_output_buffer_limit": "replica 67108864 33554432 60"}
    assert complaints_with(**small) == []
    address = Address("127.0.0.1", standalone.ports[0])
    topology = Topology((Shard(0, SLOTS - 1, address, (Address("localhost", standalone.ports[0]),)),), cluster=False)
    (complaint,) = complaints_with(topology=topology, **small)
    assert "client-output-buffer-limit replica is 67108864 33554432" in complaint


def test_a_server_whose_clock_is_off_is_a_complaint(complaints_with):
    (complaint,) = complaints_with(clock=ManualClock(SystemClock().now() + 3600))
    assert re.search(r"its clock is -36\d\d s from this host's", complaint)


def test_memory_and_evictions_are_the_primaries_sum(cluster):
    engine = valkey_of(cluster)
    health = engine.health(20.0)
    engine.close()
    assert (health.nodes, health.nodes_up) == (6, 6)
    assert health.nbytes_max == 3 * 268435456
    assert 0 < health.nbytes < health.nbytes_max
    assert health.evicted == 0
    assert health.round_trip_s > 0


def test_clear_text_to_another_host_is_a_complaint(standalone, monkeypatch):
    monkeypatch.setattr("kvstore.shared.server_health.is_loopback", lambda host: False)
    engine = valkey_of(standalone)
    assert any("in clear: use valkeys://" in sentence for sentence in engine.health(20.0).complaints)
    engine.close()


RULE = """<LifecycleConfiguration><Rule><ID>a</ID><Filter><Prefix>{prefix}</Prefix></Filter>
<Status>{status}</Status><Expiration><Days>1</Days></Expiration></Rule></LifecycleConfiguration>"""


@pytest.mark.parametrize(
    ("prefix", "status", "removes"),
    [("", "Enabled", True), ("kv/", "Enabled", True), ("kv/other", "Enabled", False), ("", "Disabled", False)],
)
def test_a_bucket_needs_a_rule_that_is_on_and_covers_the_prefix(monkeypatch, prefix, status, removes):
    text = RULE.format(prefix=prefix, status=status).encode()
    monkeypatch.setattr(s3_health, "_ask_lifecycle", lambda *arguments: (200, text, 1000.0))
    url = S3Url("bucket", "kv", "https://h", "r")
    found = s3_health.complaints(url, {"access_key_id": "a"}, lambda: 1000.0, 1.0)
    assert bool(found) != removes
    if not removes:
        assert "no lifecycle rule that expires kv" in found[0]


@pytest.mark.parametrize("date", [900.0, 1100.0])
def test_the_clock_of_s3_is_compared(monkeypatch, date):
    text = RULE.format(prefix="", status="Enabled").encode()
    monkeypatch.setattr(s3_health, "_ask_lifecycle", lambda *arguments: (200, text, date))
    (complaint,) = s3_health.complaints(S3Url("b", "", "https://h"), {"access_key_id": "a"}, lambda: 1000.0, 1.0)
    assert "S3's clock is" in complaint


def test_clear_text_to_another_hosts_s3_and_what_cannot_be_checked_are_complaints():
    found = s3_health.complaints(S3Url("b", "", "http://10.0.0.1:9000"), {}, lambda: 0.0, 1.0)
    assert "is no https endpoint" in found[0]
    assert "cannot be checked" in found[1]
    refused = s3_health.complaints(
        S3Url("b", "", "http://127.0.0.1:1"),
        {"access_key_id": "a", "secret_access_key": "b"},
        lambda: 0.0,
        1.0,
    )
    assert len(refused) == 1
    assert "cannot be checked: " in refused[0]


def test_a_real_servers_bucket_without_rules_is_a_complaint_and_the_signature_is_accepted(s3_server):
    s3_server.wait_for(BUCKET)
    url = S3Url(BUCKET, "tests", s3_server.endpoint, "us-east-1")
    (complaint,) = s3_health.complaints(url, s3_server.credentials, SystemClock().now, 20.0)
    assert f"bucket {BUCKET} has no lifecycle rule" in complaint
    wrong = {**s3_server.credentials, "secret_access_key": "wrong"}
    (complaint,) = s3_health.complaints(url, wrong, SystemClock().now, 20.0)
    assert "cannot be checked: the server answers 403" in complaint
