"""Prometheus' own checker over what we ship: the alert rules, and the metrics of a daemon that has served."""

import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, free_port
from tests.kvstored.conftest import running_daemon


@pytest.fixture(scope="module")
def promtool() -> Path:
    done = subprocess.run([ROOT / "tools/prometheus.sh"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return Path(done.stdout.strip()) / "promtool"


def checked(promtool: Path, *words: str, given: bytes = b"") -> str:
    done = subprocess.run([promtool, "check", *words], input=given, capture_output=True, timeout=60, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_prometheus_takes_the_alert_rules(promtool):
    said = checked(promtool, "rules", str(ROOT / "daemon/prometheus/alerts.yml"))
    assert "SUCCESS" in said


def test_prometheus_finds_nothing_to_complain_of_in_the_metrics(promtool):
    port = free_port()
    with running_daemon(f'metrics_address = "127.0.0.1:{port}"') as daemon:
        daemon.start()
        client = daemon.client(framework="numpy")
        client.put(b"k", {"x": np.zeros(1 << 16, np.float32)}, namespace='a "name" \\ with {signs}')
        client.get(b"k")
        client.get(b"no")
        client.demote(b"k")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
            told = reply.read()
    assert b"kvstored_lookup_keys_total" in told
    assert checked(promtool, "metrics", given=told).strip() == ""


def test_the_checker_would_find_a_mistake(promtool, tmp_path):
    wrong = tmp_path / "alerts.yml"
    text = (ROOT / "daemon/prometheus/alerts.yml").read_text()
    wrong.write_text(text.replace("expr: ", "expr: )", 1))
    with pytest.raises(AssertionError, match="could not parse expression"):
        checked(promtool, "rules", str(wrong))
