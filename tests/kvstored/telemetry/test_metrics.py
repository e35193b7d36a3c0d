"""The metrics port: names, numbers, and that dashboard, alerts and documentation speak of metrics that exist."""

import json
import re
import socket
from contextlib import suppress

import numpy as np
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from kvstore.errors import ConfigError
from kvstored.cli import cli
from kvstored.settings import check_metrics_address, load_settings
from kvstored.telemetry.metrics import FAMILIES
from kvstored.telemetry.metrics_port import MetricsPort
from tests.conftest import ROOT, free_port, wait_until
from tests.kvstored.conftest import http_get, running_daemon

EXPORTED = {family.name for family in FAMILIES}
PROCESS = {"process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds", "up"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def daemon(port):
    store = "[store.hot]\ncapacity_nbytes = '2MiB'\n[store.warm]\ncapacity_nbytes = '1MiB'"
    with running_daemon(f'metrics_address = "127.0.0.1:{port}"', store) as found:
        found.start()
        yield found


@pytest.fixture(scope="module")
def busy(daemon):
    """The daemon after a little of everything."""
    client = daemon.client(framework="numpy")
    rng = np.random.default_rng(0)
    for i in range(8):
        client.put(b"f%d" % i, {"x": rng.standard_normal(MIB // 8, dtype=np.float32)})
    client.put(b"kept-whole", {"x": rng.integers(0, 9, 1000, dtype=np.uint8)}, fidelity="exact")
    for i in (0, 7, 0):
        assert client.get(b"f%d" % i) is not None
    client.get(b"absent")
    client.delete(b"f1")
    client.report(prefill_saved_s=2.5)
    return daemon


def samples(port):
    status, body, _ = http_get(port, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


def test_numbers_are_those_of_the_store(busy, port):
    found = samples(port)
    stats = busy.client().stats()
    assert found["kvstored_gets_total", ()] == stats.values["gets"] == 4
    assert found["kvstored_misses_total", (("cause", "absent"),)] == 1
    assert sum(v for (name, _), v in found.items() if name == "kvstored_hits_total") == 3
    assert found["kvstored_hits_total", (("encoding", "raw"), ("tier", "hot"))] >= 1
    below = [dict(labels) for (name, labels) in found if name == "kvstored_hits_total"]
    assert {"nf4"} == {labels["encoding"] for labels in below if labels["tier"] == "warm"}
    assert found["kvstored_puts_total", ()] == 9
    assert found["kvstored_deletes_total", ()] == 1
    assert found["kvstored_tier_capacity_bytes", (("tier", "hot"),)] == 2 * MIB
    assert found["kvstored_demotions_total", (("tier", "hot"),)] > 0
    assert found["kvstored_prefill_saved_seconds_total", ()] == 2.5
    calls = [(("code", "OK"), ("method", method)) for method in ("Cache/Put", "Lease/put")]
    assert sum(found.get(("kvstored_rpc_seconds_count", labels), 0) for labels in calls) == 9
    assert found["process_resident_memory_bytes", ()] > 10 * MIB


def test_the_error_of_a_codec_is_a_histogram_of_what_it_measured(busy, port):
    client = busy.client(framework="numpy")
    rng = np.random.default_rng(1)
    kv = {name: rng.standard_normal((2, 64, 2, 64), dtype=np.float32) for name in ("k", "v")}
    for i in range(3):
        client.put(b"kv%d" % i, kv)
    assert client.demote(b"kv0", b"kv1", b"kv2") == 3
    found = samples(port)
    name, label = "kvstored_relative_error", ("encoding", "nf4-kv2")
    count = found[f"{name}_count", (label,)]
    assert count == found[f"{name}_bucket", (label, ("le", "+Inf"))] >= 6
    assert found[f"{name}_bucket", (label, ("le", "0.02"))] == 0
    assert found[f"{name}_bucket", (label, ("le", "0.2"))] == count
    mean = found[f"{name}_sum", (label,)] / count
    assert 0.05 < mean < 0.15
    shown = CliRunner().invoke(cli, ["stats", "--address", busy.address, "--timeout-s", "60"]).output
    assert re.search(rf"nf4-kv2 +{count:.0f} +{mean:.3g}", shown)
    assert "_le_" not in shown


def test_every_number_of_the_store_has_a_metric(busy, port):
    """A counter added to the store needs a line in kvstored/telemetry/metrics.py: until then it is under
    kvstored_other."""
    left = [labels for (name, labels) in samples(port) if name == "kvstored_other"]
    assert left == []


def test_what_is_exported_is_what_the_table_says(busy, port):
    suffix = re.compile(r"_(bucket|count|sum|created)$")
    names = {name for name, _ in samples(port) if name.startswith("kvstored_")}
    known = {name if name in EXPORTED else suffix.sub("", name) for name in names if not name.endswith("_created")}
    assert known <= EXPORTED
    # Those with a label appear with their first event, those of a shared store, routers or a GPU where there is one.
    later = (
        "kvstored_tenant_",
        "kvstored_namespace_",
        "kvstored_shared_",
        "kvstored_block_events_",
        "kvstored_device_",
    )
    without = {name for name in EXPORTED - known if not name.startswith(later)}
    assert without <= {"kvstored_other", "kvstored_rpc_refused_total", "kvstored_calls_refused_total"}


def expressions():
    dashboard = json.loads((ROOT / "daemon/grafana/kvstored.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for line in (ROOT / "daemon/prometheus/alerts.yml").read_text().splitlines():
        if not line.strip().startswith("#"):
            yield "alerts.yml", line


def test_dashboard_and_alerts_use_only_exported_names():
    suffix = re.compile(r"_(bucket|count|sum)$")
    used = set()
    for where, text in expressions():
        for name in re.findall(r"\b(?:kvstored|process)_[a-z_]+", text):
            base = name if name in EXPORTED else suffix.sub("", name)
            assert base in EXPORTED | PROCESS, f"{where}: {name} is not exported"
            used.add(base)
    # Worth a panel or an alert, or why is it counted? The rest is for looking closer.
    assert len(used) > len(EXPORTED) / 2


def test_every_metric_is_documented():
    text = (ROOT / "docs/operations.md").read_text()
    rows = [f"| `{family.name}` | {family.kind} | {family.label.replace(',', ', ')} |" for family in FAMILIES]
    assert [row for row in rows if row not in text] == []
    named = set(re.findall(r"^\| `(kvstored_[a-z_]+)` \| (?:gauge|counter|histogram) ", text, re.MULTILINE))
    assert named == EXPORTED


def test_every_alert_says_what_to_do():
    text = (ROOT / "docs/operations.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "daemon/prometheus/alerts.yml").read_text())
    assert len(alerts) > 5
    assert [name for name in alerts if f"`{name}`" not in text] == []


def test_the_dashboard_has_a_grid_without_overlaps():
    panels = json.loads((ROOT / "daemon/grafana/kvstored.json").read_text())["panels"]
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({p["id"] for p in panels}) == len(panels)


def test_the_port_serves_four_pages_and_no_others(busy, port):
    assert http_get(port, "/health")[:2] == (200, "ok\n")
    assert http_get(port, "/etc/passwd")[0] == http_get(port, "/../../etc/passwd")[0] == 404
    status, body, headers = http_get(port, "/")
    assert status == 200
    assert "<title>kvstored</title>" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    found = json.loads(http_get(port, "/status.json")[1])
    assert found["schema"] == 1
    text = (ROOT / "docs/operations.md").read_text().partition("### The numbers as JSON")[2].partition("## Traces")[0]
    documented = {
        name
        for names, where in re.findall(r"^\| (`.*?`) \| ([a-z, ]+) \|", text, re.MULTILINE)
        if where in ("all", "status", "status, stats")
        for name in re.findall(r"`(\w+)`", names)
    }
    assert set(found) == documented
    assert set(found["tiers"]["hot"]) == {
        "entries", "used_nbytes", "capacity_nbytes", "hits", "puts", "evictions", "demotions", "promotions",
    }  # fmt: skip
    assert set(found["calls"][0]) == {"method", "count", "mean_s", "p50_s", "p99_s"}
    assert 0 < found["calls"][0]["p50_s"] <= found["calls"][0]["p99_s"]
    assert found["addresses"] == {"listening": [busy.address], "metrics": f"127.0.0.1:{port}"}
    assert found["config"]["store"]["hot"]["capacity_nbytes"] == 2 * MIB
    assert found["alarms"] == []
    assert [name for name, value in found["values"].items() if value is None or value < 0] == []


def test_a_page_of_another_site_cannot_read_it_through_its_own_name(busy, port):
    assert http_get(port, "/metrics", Host="evil.example.org")[0] == 421
    assert http_get(port, "/metrics", Host="localhost:9411")[0] == 200


def test_no_key_is_on_the_port(busy, port):
    text = "".join(http_get(port, path)[1] for path in ("/metrics", "/status.json"))
    assert "kept-whole" not in text
    assert b"kept-whole".hex() not in text


def test_idle_connections_do_not_keep_others_out_for_long(busy, port):
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:

        def answers():
            with suppress(OSError):
                return http_get(port, "/health")[0] == 200

        wait_until(answers, "the port did not recover from 40 silent connections")
    finally:
        for one in idle:
            one.close()


@pytest.mark.parametrize("address", ["0.0.0.0:9411", "example.org:9411"])
def test_a_metrics_address_beyond_this_host_is_refused_unless_it_is_allowed(address):
    """A pod's or a container's could not be scraped without a proxy beside it."""
    environ = {"KVSTORED_SERVER__METRICS_ADDRESS": address}
    with pytest.raises(ConfigError, match=r"loopback HOST:PORT .* server.insecure_metrics = true"):
        load_settings(environ=environ)
    settings = load_settings(environ=environ | {"KVSTORED_SERVER__INSECURE_METRICS": "true"})
    assert settings.server.metrics_address == address


@pytest.mark.parametrize("address", ["9411", ":9411", "127.0.0.1:x", "127.0.0.1:99999"])
@pytest.mark.parametrize("allowed", ["true", "false"])
def test_what_is_no_host_and_port_is_refused_in_either_case(address, allowed):
    environ = {"KVSTORED_SERVER__METRICS_ADDRESS": address, "KVSTORED_SERVER__INSECURE_METRICS": allowed}
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        load_settings(environ=environ)


def test_a_port_for_other_hosts_answers_to_any_name_that_they_know():
    port = free_port()
    served = MetricsPort(f"0.0.0.0:{port}", CollectorRegistry(), dict, anywhere=True)
    try:
        assert http_get(port, "/health", Host="kvstored.monitoring.svc:9411")[0] == 200
        assert http_get(port, "/metrics", Host="10.1.2.3:9411")[0] == 200
    finally:
        served.close()


def test_loopback_addresses_are_taken():
    assert check_metrics_address("localhost:1") == ("localhost", 1)
    assert check_metrics_address("[::1]:2") == ("::1", 2)
