"""The page's alarms: each one holds when its numbers do, says what helps, and is an alert that is documented."""

import re

import pytest

from kvstore.stats import Stats, TierStats
from kvstored.telemetry.alarms import alarms
from kvstored.telemetry.history import COUNTED, History
from tests.conftest import ROOT

QUIET = dict.fromkeys(COUNTED, 0.0)
LOOKED_UP = {"lookup_keys": 1000.0, "lookup_tokens": 256_000.0}
WRONG = {
    "KvstoredDiskFailing": ({"cold_healthy": 0}, {}, {}),
    "KvstoredCorruptRecords": ({}, {}, {"cold_corrupt_total": 3.0}),
    "KvstoredQuarantined": ({"cold_quarantined": 1}, {}, {}),
    "KvstoredWriterBehind": ({"cold_pending_nbytes": 64e6}, {}, {}),
    "KvstoredRefusing": ({}, {"in_flight_refused": 301.0}, {}),
    "KvstoredCrowded": ({}, {"calls_refused": 301.0}, {}),
    "KvstoredMemoryPressure": ({}, {"pressure_shrinks": 1.0}, {}),
    "KvstoredDutiesFailing": ({}, {"maintainer_errors": 1.0}, {}),
    "KvstoredLeaseSocketFailing": ({}, {"lease_accept_failures": 1.0}, {}),
    "KvstoredStalled": ({"heartbeat_age_s": 61.0}, {}, {}),
    "KvstoredSharedDown": ({"shared_breaker": 2.0, "shared_nodes": 6.0, "shared_nodes_up": 6.0}, {}, {}),
    "KvstoredSharedBehind": ({}, {"shared_dropped_full": 1.0}, {}),
    "KvstoredSharedDamaged": ({}, {}, {"shared_corrupt": 11.0}),
    "KvstoredEventsDropped": ({}, {"block_events_dropped": 1.0}, {}),
    "KvstoredHitRatioFell": (
        {},
        {**LOOKED_UP, "lookup_hit_tokens": 25_600.0},
        {**LOOKED_UP, "lookup_hit_tokens": 200_000.0},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_alarm_holds_when_its_numbers_do_and_alone(name):
    now, lately, hour = WRONG[name]
    (found,) = alarms(now, QUIET | lately, QUIET | hour)
    assert found.name == name
    assert found.do.endswith(".")
    text = (ROOT / "docs/operations.md").read_text()
    assert f"| `{name}` |" in text
    assert f"- alert: {name}\n" in (ROOT / "daemon/prometheus/alerts.yml").read_text()
    settings = re.findall(r"\b(?:server|store)\.[a-z_.]+[a-z]", found.do)
    assert [setting for setting in settings if setting not in text] == []


def test_a_healthy_daemon_has_no_alarms_and_a_dead_disk_comes_first():
    assert alarms({"cold_healthy": 1, "heartbeat_age_s": 1.0}, QUIET, QUIET) == []
    found = alarms({"cold_healthy": 0, "cold_quarantined": 1}, QUIET | {"pressure_shrinks": 1.0}, QUIET)
    assert [alarm.severity for alarm in found] == ["critical", "warning", "warning"]


def test_a_server_of_the_shared_store_that_is_down_is_named_with_the_others():
    (found,) = alarms({"shared_breaker": 0.0, "shared_nodes": 6.0, "shared_nodes_up": 5.0}, QUIET, QUIET)
    assert (found.name, "5 of 6 servers" in found.text) == ("KvstoredSharedDown", True)


def stats(looked_up, found, used_nbytes=0):
    return Stats(
        {"lookup_keys": looked_up, "lookup_hit_keys": found, "lookup_tokens": 0.0, "prefill_saved_s": found / 10},
        {"hot": TierStats(1, used_nbytes, 100)},
    )


def test_history_has_ratios_rates_and_the_fill_of_each_tier():
    now = [0.0]
    history = History(lambda: now[0])
    for at, of in ((0, stats(0, 0)), (10, stats(10, 5, 40)), (20, stats(10, 5, 50))):
        now[0] = at
        history.take(of)
    first, second = history.series()
    assert (first["hit_ratio"], first["token_hit_ratio"], second["hit_ratio"]) == (0.5, None, None)
    assert (first["lookup_keys_per_s"], first["prefill_saved_s_per_s"]) == (1.0, 0.05)
    assert [row["hot_used_nbytes"] for row in (first, second)] == [40.0, 50.0]
    assert [row["ago_s"] for row in (first, second)] == [10.0, 0.0]


def test_what_was_counted_lately_is_told_from_the_samples_and_never_negative():
    now = [0.0]
    history = History(lambda: now[0])
    assert set(history.recent({"lookup_keys": 5.0}, 300).values()) == {0.0}
    for i in range(100):
        now[0] = 10.0 * i
        history.take(stats(10.0 * i, 0))
    assert history.recent({"lookup_keys": 1000.0}, 300)["lookup_keys"] == 310
    assert history.recent({"lookup_keys": 1000.0}, 3600)["lookup_keys"] == 1000
    assert history.recent({"lookup_keys": 0.0}, 300)["lookup_keys"] == 0
