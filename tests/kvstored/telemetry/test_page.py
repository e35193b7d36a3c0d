"""The status page in a real browser: what it shows is what the daemon says, and nothing comes from elsewhere."""

import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from kvstored.telemetry.metrics_port import MetricsPort
from tests.conftest import ROOT, free_port
from tests.kvstored.conftest import running_daemon

from .browser import browser

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


def browse(*arguments: str, size: str = "1100,1250") -> str:
    with tempfile.TemporaryDirectory(prefix="kvp-") as profile:
        done = subprocess.run(
            [
                BROWSER, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", f"--window-size={size}", "--virtual-time-budget=4000",
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
    assert [cell for cell in ("hot", "warm", "cold") if f">{cell}</td>" in tiers] == ["hot", "warm", "cold"]
    assert "4.0 MiB" in tiers
    assert "93.3 %" in dom  # 14 of 15
    assert re.search(r"(Cache/Put|Lease/put)", dom)
    assert "prefill time saved" in dom
    assert dom.index("prefill time saved") < dom.index("hit ratio, of keys")
    assert f"127.0.0.1:{busy_port}" in dom
    assert "store.ttl_s" in dom
    assert "<td>never put</td><td>0</td><td>1</td>" in dom
    browse(f"--screenshot={picture}", f"http://127.0.0.1:{busy_port}/")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def status_of_a_bad_hour():
    """An hour of a daemon whose disk has failed, with all that the page can show."""
    gib, mib = 1 << 30, 1 << 20
    history = [
        {
            "ago_s": 3600 - 10 * i, "hit_ratio": 0.9,
            "token_hit_ratio": None if 100 < i < 140 else 0.5 + 0.4 * math.sin(i / 20),
            "hot_used_nbytes": 3 * gib, "warm_used_nbytes": i * 20 * mib, "cold_used_nbytes": 60 * gib,
            "lookup_tokens_per_s": 1000.0, "lookup_hit_tokens_per_s": 400.0, "prefill_saved_s_per_s": 0.5,
            "lookup_misses_evicted_per_s": 0.25, "hit_nbytes_per_s": 50.0 * mib, "gets_per_s": 12.5,
        }
        for i in range(360)
    ]  # fmt: skip
    tier = {"entries": 12345, "used_nbytes": 3 * gib, "capacity_nbytes": 4 * gib, "hits": 543_210, "demotions": 1,
            "promotions": 0, "evictions": 77, "puts": 5}  # fmt: skip
    return {
        "schema": 1,
        "version": "1.2.3 <b>",
        "values": {
            "hit_ratio": 0.5, "token_hit_ratio": 0.421, "gets": 10, "entries": 10, "hit_nbytes": gib, "put_nbytes": 1,
            "in_flight_nbytes": 0, "uptime_s": 90_000, "cold_healthy": 0, "cold_write_errors": 9,
            "cold_pending_nbytes": 63 * mib, "cold_disk_nbytes": 61 * gib, "prefill_saved_s": 7384.0,
            "lookup_tokens": 9_000_000, "lookup_hit_tokens": 3_789_000, "lookup_misses_evicted": 901,
            "shared_lookups": 90, "shared_futile": 60, "shared_hits": 1234, "shared_hit_nbytes": 3 * gib,
            "shared_published": 77, "shared_publish_nbytes": gib, "shared_breaker": 2, "shared_nodes": 6,
            "shared_nodes_up": 4, "shared_queue_nbytes": 255 * mib, "shared_lag_s": 7.5, "shared_dropped_full": 41,
            "shared_dropped_exact": 0, "shared_corrupt": 3, "shared_barred": 2, "shared_errors_timeout": 8,
            "block_events_published": 500, "block_events_dropped": 6,
            "lease_connections": 8, "leases": 3, "tenant_nbytes_team-a": 5 << 20, "tenant_nbytes_b": 9 << 20,
            "tenant_hits_b": 77, "namespace_nbytes_b/llama": 1 << 20, "namespace_hits_b/llama": 3,
            "namespace_entries_b/llama": 21, "namespace_nbytes_<i>": 2 << 20, "namespace_hits_<i>": 4,
            "namespace_nbytes_meta-llama/Llama-3.1-70B-Instruct@a1b2c3d4": gib,
        },
        "tiers": {"hot": tier, "warm": {**tier, "used_nbytes": 7 * gib, "capacity_nbytes": 8 * gib},
                  "cold": {**tier, "used_nbytes": 60 * gib, "capacity_nbytes": 64 * gib}},
        "history": history,
        "calls": [{"method": "Cache/Get", "mean_s": 0.0123, "p50_s": 0.004, "p99_s": 0.25, "count": 4321}],
        "alarms": [
            {"name": "KvstoredDiskFailing", "severity": "critical", "text": "The disk refuses writes.",
             "do": "df, dmesg"},
            {"name": "<u>", "severity": "warning", "text": "Hit ratio 10% in five minutes.", "do": "more room"},
        ],
        "addresses": {"listening": ["unix:/run/kvstored/kvstored.sock"], "metrics": "127.0.0.1:9411"},
        "paths": {"data_dir": "/var/lib/kvstored", "cold": "/var/lib/kvstored/cold"},
        "config": {
            "server": {"threads": 8},
            "store": {"ttl_s": 3600.0, "policy": "s3fifo", "hot": {"capacity_nbytes": 4 * gib},
                      "warm": {"capacity_nbytes": 8 * gib}, "cold": {"capacity_nbytes": 64 * gib}},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def bad_hour():
    port = MetricsPort(f"127.0.0.1:{free_port()}", CollectorRegistry(), status_of_a_bad_hour)
    yield f"http://127.0.0.1:{port.port}/"
    port.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_an_hour_of_history_is_a_line_with_gaps_where_nothing_was_asked(bad_hour):
    dom = browse("--dump-dom", bad_hour)
    path = re.search(r'<path d="([^"]*)"', dom)[1]
    assert path.count("M") == 2  # before the gap and after it
    assert path.count("L") > 500
    assert re.findall(r'<path d="[^"]+" class="(hot|warm|cold)"', dom) == ["hot", "warm", "cold"]
    assert dom.index("<td>b</td>") < dom.index("<td>team-a</td>")  # the larger first
    assert "<td>b</td><td>77</td><td>0</td><td>9.0 MiB</td>" in dom
    assert dom.index("<td>&lt;i&gt;</td>") < dom.index("<td>b/llama</td><td>3</td><td>21</td><td>1.0 MiB</td>")
    assert "1.2.3 &lt;b&gt;" in dom
    assert "the disk fails: serving from memory" in dom


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_an_operator_sees_what_is_wrong_what_to_do_and_what_the_cache_saved(bad_hour):
    dom = browse("--dump-dom", bad_hour)
    assert re.search(r"The disk refuses writes.*KvstoredDiskFailing.*df, dmesg", dom)
    assert "&lt;u&gt;" in dom
    first = re.search(r'<dl id="numbers" class="cards"><div><dt>([^<]*)</dt><dd>([^<]*)<small>([^<]*)<', dom)
    assert first.groups() == ("prefill time saved", "2 h 3 min", "1,800 s in an hour")
    assert "42.1 %<small>40.0 % in five minutes" in dom
    assert "<td>evicted</td><td>900</td><td>901</td><td>more room: warm first</td>" in dom
    assert "<td>tokens looked up</td><td>1,000</td><td>1,000</td><td>9,000,000</td>" in dom
    assert "<dt>writes</dt><dd>fail</dd>" in dom
    assert "<td>Cache/Get</td><td>4.00 ms</td><td>250 ms</td><td>12 ms</td><td>4,321</td>" in dom
    assert "/var/lib/kvstored" in dom
    assert "<td>store.hot.capacity_nbytes</td><td>4294967296</td>" in dom


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_an_operator_sees_how_the_shared_store_does(bad_hour, busy_port):
    dom = browse("--dump-dom", bad_hour)
    shown = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", re.search(r'<dl id="shared".*?</dl>', dom)[0]))
    assert shown == {
        "the shared store is": "left alone: it does not answer", "servers that answer": "4 of 6",
        "chunks from it": "1,234, 3.0 GiB", "asked, in vain": "90, 60", "published": "77, 1.0 GiB",
        "wait to be published": "255.0 MiB, 7.5 s from put to there", "not published": "41 full", "not believed": "3",
        "calls that failed": "8 timeout", "deletions not acknowledged": "2", "events for routers, dropped": "500, 6",
    }  # fmt: skip
    assert "<dt>shared with other hosts</dt><dd>nothing</dd>" in browse("--dump-dom", f"http://127.0.0.1:{busy_port}/")


def corner_of(png: bytes) -> tuple[int, int, tuple[int, ...]]:
    """Width, height and the first pixel of a picture: no filter of PNG changes that one."""
    width, height = struct.unpack(">II", png[16:24])
    at, data = 8, b""
    while at < len(png):
        (nbytes,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + nbytes] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + nbytes
    return width, height, tuple(zlib.decompress(data)[1:4])


FORMS = {
    "desktop-light": ("1100,1900", "1"), "desktop-dark": ("1100,1900", "0"),
    "phone-light": ("390,3400", "1"), "phone-dark": ("390,3400", "0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
@pytest.mark.parametrize("form", FORMS)
def test_the_page_is_drawn_for_a_desktop_and_a_phone_by_day_and_by_night(bad_hour, form, tmp_path):
    """KVSTORED_SCREENSHOTS names a folder for the pictures, for a person to look at."""
    size, scheme = FORMS[form]
    folder = Path(os.environ.get("KVSTORED_SCREENSHOTS", tmp_path))
    picture = folder / f"{form}.png"
    browse(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", bad_hour, size=size)
    width, _, corner = corner_of(picture.read_bytes())
    assert width == int(size.partition(",")[0])
    assert (max(corner) < 60) == form.endswith("dark")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser for the status page: apt-get install chromium")
def test_the_page_does_not_scroll_sideways_on_a_phone_of_360_pixels(bad_hour, busy_port):
    beyond = "e => e.getBoundingClientRect().right > innerWidth + 0.5"
    wide = f"[...document.querySelectorAll('body *')].filter({beyond}).map(e => e.tagName + '#' + e.id).join(' ')"
    with browser(BROWSER) as phone:
        for url in (bad_hour, f"http://127.0.0.1:{busy_port}/"):
            for width in (360, 320):  # the narrowest phone in use, and what WCAG asks for
                phone.show(url, width, "document.querySelectorAll('#numbers dd').length > 0")
                assert phone.value("innerWidth") == width, phone.value(wide)
                assert phone.value("document.documentElement.scrollWidth") <= width, phone.value(wide)


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_what_it_reads():
    for name in ("status.html", "status.js", "status.css"):
        text = (PAGE / name).read_text()
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
    html = (PAGE / "status.html").read_text()
    assert not re.search(r"<script>|<style>|\son\w+=|style=", html)
