"""The status page in a real browser: what it shows is what the daemon says, and nothing comes from elsewhere."""

import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from kvstored.telemetry.metrics_port import MetricsPort
from tests.conftest import ROOT, free_port
from tests.kvstored.conftest import running_daemon

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PAGE = ROOT / "daemon/kvstored/telemetry/page"


@pytest.fixture(scope="module")
def busy_port():
    port = free_port()
    store = "[store.hot]\ncapacity_nbytes = '4MiB'\n[store.warm]\ncapacity_nbytes = '2MiB'"
    with running_daemon(f'metrics_address = "127.0.0.1:{port}"', store) as daemon:
        daemon.start()
        client = daemon.client(framework="numpy")
        for i in range(12):
            client.put(b"%d" % i, {"x": np.random.default_rng(i).standard_normal(1 << 18, dtype=np.float32)})
        for i in (*range(12), 99, 11, 10):
            client.get(b"%d" % i)
        yield port


def browse(*arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="kvp-") as profile:
        done = subprocess.run(
            [
                BROWSER, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--window-size=1100,1250", "--virtual-time-budget=4000",
                f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []), *arguments,
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_the_page_shows_the_daemons_numbers(busy_port, tmp_path):
    """KVSTORED_SCREENSHOT names where the picture is kept, for a person to look at."""
    picture = Path(os.environ.get("KVSTORED_SCREENSHOT", tmp_path / "status.png"))
    dom = browse("--dump-dom", f"http://127.0.0.1:{busy_port}/")
    assert 'data-ready="yes"' in dom
    assert re.search(r'id="state" role="status"[^>]*>serving<', dom)
    tiers = re.search(r'<tbody id="tiers">(.*?)</tbody>', dom, re.DOTALL)[1]
    assert [cell for cell in ("hot", "warm", "cold") if f"<td>{cell}</td>" in tiers] == ["hot", "warm", "cold"]
    assert "4.0 MiB" in tiers
    assert "93.3 %" in dom  # 14 of 15
    assert re.search(r"(Cache/Put|Lease/put)", dom)
    browse(f"--screenshot={picture}", f"http://127.0.0.1:{busy_port}/")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_an_hour_of_history_is_a_line_with_gaps_where_nothing_was_asked(tmp_path):
    history = [
        {"ago_s": 3600 - 10 * i, "hit_ratio": None if 100 < i < 140 else 0.5 + 0.4 * math.sin(i / 20)}
        for i in range(360)
    ]
    tier = {"entries": 10, "used_nbytes": 3 << 30, "capacity_nbytes": 4 << 30, "hits": 5, "demotions": 1}
    status = {
        "version": "1.2.3 <b>",
        "values": {"hit_ratio": 0.5, "gets": 10, "entries": 10, "hit_nbytes": 1, "put_nbytes": 1, "in_flight_nbytes": 0,
                   "uptime_s": 90_000, "cold_healthy": 0, "tenant_nbytes_team-a": 5 << 20, "tenant_nbytes_b": 9 << 20,
                   "tenant_hits_b": 77, "namespace_nbytes_b/llama": 1 << 20, "namespace_hits_b/llama": 3,
                   "namespace_entries_b/llama": 21, "namespace_nbytes_<i>": 2 << 20, "namespace_hits_<i>": 4},
        "tiers": {"hot": {**tier, "promotions": 0, "evictions": 0}},
        "history": history,
        "calls": [],
    }  # fmt: skip
    port = MetricsPort(f"127.0.0.1:{free_port()}", CollectorRegistry(), lambda: status)
    try:
        dom = browse("--dump-dom", f"http://127.0.0.1:{port.port}/")
        if "KVSTORED_SCREENSHOT" in os.environ:
            browse(f"--screenshot={os.environ['KVSTORED_SCREENSHOT']}.graph.png", f"http://127.0.0.1:{port.port}/")
    finally:
        port.close()
    path = re.search(r'<path d="([^"]*)"', dom)[1]
    assert path.count("M") == 2  # before the gap and after it
    assert path.count("L") > 500
    assert dom.index("<td>b</td>") < dom.index("<td>team-a</td>")  # the larger first
    assert "<td>b</td><td>77</td><td>0</td><td>9.0 MiB</td>" in dom
    assert dom.index("<td>&lt;i&gt;</td>") < dom.index("<td>b/llama</td><td>3</td><td>21</td><td>1.0 MiB</td>")
    assert "1.2.3 &lt;b&gt;" in dom
    assert "the disk fails: serving from memory" in dom


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_what_it_reads():
    for name in ("status.html", "status.js", "status.css"):
        text = (PAGE / name).read_text()
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
    html = (PAGE / "status.html").read_text()
    assert not re.search(r"<script>|<style>|\son\w+=|style=", html)
