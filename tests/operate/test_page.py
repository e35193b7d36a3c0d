"""The status page in a real browser: what it shows is what the daemon says, and nothing comes from elsewhere."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, free_port

from .conftest import running_daemon

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PAGE = ROOT / "daemon/kvstored/page"


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


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_what_it_reads():
    for name in ("status.html", "status.js", "status.css"):
        text = (PAGE / name).read_text()
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
    html = (PAGE / "status.html").read_text()
    assert not re.search(r"<script>|<style>|\son\w+=|style=", html)
