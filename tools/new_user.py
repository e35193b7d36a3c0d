"""Play a new user of kvstored: from the built wheels, with what the documents say, timed step by step.

    python tools/new_user.py [--wheels DIR] [--torch auto|index|linked] [--keep DIR]

A bare environment is made with the running Python, which needs hatchling only where --wheels names no built ones. The
scripts and commands are taken out of README.md and docs/, so a page that is wrong fails here. A step that this machine
cannot do is skipped, and says why. --torch: `index` fetches it as the README says; `linked` takes the running Python's,
for a machine without that index; `auto` tries the one and then the other. Exit code 1: a step failed, or all of them
took longer than ten minutes. Standard library only.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0
START_S = 120.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECOND = """
from kvstored_client import Client
with Client(on_error="raise", framework="numpy") as cache:
    ns = cache.namespace(model="tiny", revision="1", dtype="float32", layers=4, kv_heads=2, head_dim=64, layout="lthd")
    n, k, v = ns.get_prefix(list(range(512)))
    print(n, k.shape)
"""


class Skipped(Exception):
    """This machine cannot do a step; the message says why."""


@dataclass
class User:
    """What the steps share. home: a directory of his own. venv: the daemon's environment. worker: the client's."""

    home: Path
    wheels: Path
    torch: str
    port: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def venv(self) -> Path:
        """The daemon's environment."""
        return self.home / "venv"

    @property
    def worker(self) -> Path:
        """The worker's environment: the base install."""
        return self.home / "worker"

    @property
    def address(self) -> str:
        """Where his daemon listens."""
        return f"unix:{self.home}/run/kvstored/kvstored.sock"

    def environ(self, venv: Path) -> dict[str, str]:
        """The environment of a shell in which a venv is active, without anything of the developer's."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        path = f"{venv}/bin:/usr/local/bin:/usr/bin:/bin"
        state = str(self.home / "state")  # root's own would be /var/lib/kvstored
        return {
            **kept,
            "PATH": path,
            "KVSTORED_ADDRESS": self.address,
            "STATE_DIRECTORY": state,
            "PYTHONNOUSERSITE": "1",
        }

    def run(self, venv: Path, *words: str | Path, code: int = 0, **more: str) -> str:
        """What a command prints on standard output. Raises AssertionError unless it ends with `code`."""
        done = subprocess.run(
            [str(word) for word in words], cwd=self.home, env=self.environ(venv) | more, capture_output=True, text=True,
            timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, (
            f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stderr[-2000:]}"
        )
        return done.stdout

    @contextmanager
    def serving(self, *words: str | Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """His daemon, up."""
        log = self.home / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [self.venv / "bin/kvstored", "serve", *words], cwd=self.home, env=self.environ(self.venv) | more,
                stdout=file, stderr=file,
            )  # fmt: skip
        try:
            wait(lambda: "serving version=" in log.read_text(), lambda: process.poll() is not None, log.read_text)
            yield process
        finally:
            process.terminate()
            process.wait(START_S)


def wait(until: Callable[[], bool], gone: Callable[[], bool], said: Callable[[], str]) -> None:
    """Wait for something that comes, while what makes it is there. Raises AssertionError with what it said."""
    end = time.monotonic() + START_S
    while not until():
        assert not gone(), said()[-3000:]
        assert time.monotonic() < end, said()[-3000:]
        time.sleep(0.1)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wheels(user: User) -> str:
    """tools/wheels.sh, as `make wheels`; or what is there."""
    if not list(user.wheels.glob("kvstored-*.whl")):
        subprocess.run([ROOT / "tools/wheels.sh", sys.executable, user.wheels], check=True, stdout=subprocess.DEVNULL)
    return ", ".join(sorted(file.name for file in user.wheels.glob("*.whl")))


def worker(user: User) -> str:
    """The base install in a bare environment: no torch."""
    subprocess.run([sys.executable, "-m", "venv", user.worker], check=True)
    pip = (user.worker / "bin/pip", "--disable-pip-version-check", "install", "--quiet")
    user.run(user.worker, *pip, "--find-links", user.wheels, "kvstored")
    assert "torch" not in user.run(user.worker, user.worker / "bin/pip", "list")
    held = sum(file.stat().st_size for file in user.worker.rglob("*") if file.is_file() and not file.is_symlink())
    return f"{held / 1e6:.0f} MB, no torch"


def install(user: User) -> str:
    """The two lines of the README, of wheels instead of a clone."""
    subprocess.run([sys.executable, "-m", "venv", user.venv], check=True)
    pip = (user.venv / "bin/pip", "--disable-pip-version-check", "install", "--quiet")
    (first, _) = blocks("README.md", "sh")[0].strip().splitlines()
    index = re.search(r"--index-url (\S+)", first)
    assert index is not None, "the README names no index for torch"
    torch = "from its index"
    if user.torch == "linked" or not _from_index(user, pip, index[1]):
        torch = _linked(user)
    user.run(user.venv, *pip, "--find-links", user.wheels, "kvstored[daemon]")
    return f"torch {torch}"


def _from_index(user: User, pip: tuple[str | Path, ...], index: str) -> bool:
    try:
        user.run(user.venv, *pip, "torch", "--index-url", index)
    except AssertionError:
        if user.torch == "index":
            raise
        return False
    return True


def _linked(user: User) -> str:
    """Links to the torch of the running Python, and to what it needs: for a machine without torch's index."""
    try:
        there = Path(str(importlib.metadata.distribution("torch").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise Skipped("torch's index does not answer, and the running Python has no torch to link") from None
    (packages,) = user.venv.glob("lib/python*/site-packages")
    for found in there.iterdir():
        if "kvstored" not in found.name and found.suffix != ".pth" and not (packages / found.name).exists():
            (packages / found.name).symlink_to(found)
    return "linked from the running Python" + (", its index does not answer" if user.torch == "auto" else "")


def doctor(user: User) -> str:
    """`kvstored doctor` with the daemon up: nothing BAD that is kvstored's own."""
    with user.serving():
        words = [user.venv / "bin/kvstored", "doctor"]
        done = subprocess.run(words, env=user.environ(user.venv), capture_output=True, text=True, check=False)
    assert "ok    compiled codec kernel" in done.stdout, done.stdout
    bad = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    return "all good" if not bad else f"of this machine: {'; '.join(bad)[:150]}"


def quick_start(user: User) -> str:
    """The README's script with a daemon, and a second process, with the base install, that hits."""
    (code,) = [code for code in blocks("README.md", "python") if "Client()" in code]
    with user.serving():
        said = user.run(user.venv, user.venv / "bin/python", "-c", code)
        assert said.startswith("512 tokens need no prefill"), said
        second = user.run(user.worker, user.worker / "bin/python", "-c", SECOND)
    with user.serving():
        third = user.run(user.worker, user.worker / "bin/python", "-c", SECOND)
    assert second == third == "512 (4, 512, 2, 64)\n", (second, third)
    return "512 of 512 tokens, and again after a restart"


def backup(user: User) -> str:
    """`kvstored snapshot` of the running daemon; another one serves it."""
    copy = user.home / "snapshot"
    with user.serving():
        said = user.run(user.venv, "kvstored", "snapshot", copy)
    with user.serving("--data-dir", copy):
        assert user.run(user.worker, user.worker / "bin/python", "-c", SECOND).startswith("512 ")
    return said.strip()


def service(user: User) -> str:
    """The unit of the installed wheel, and the service under a real systemd with workers of other users."""
    user.run(
        user.venv,
        "kvstored",
        "install-service",
        "--root",
        user.home / "root",
        "--program",
        "/opt/kvstored/bin/kvstored",
    )
    unit = next((user.home / "root").rglob("kvstored.service"))
    words = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/e2e/test_systemd.py",
             "-k", "two_users or start_returns or stop_drains"]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    if "skipped" in done.stdout and "passed" not in done.stdout:
        raise Skipped(f"{unit.name} was written; {done.stdout.split('SKIPPED')[-1].strip()[:200]}")
    return done.stdout.strip().splitlines()[-1]


def tls(user: User) -> str:
    """The five commands of docs/deployment.md, its settings, and its worker."""
    if shutil.which("openssl") is None:
        raise Skipped("openssl is not installed")
    five, client = blocks("docs/deployment.md", "sh")[:2]
    _, settings = blocks("docs/deployment.md", "toml")
    user.run(user.venv, "bash", "-euc", five)
    port = free_port()
    config = user.home / "kvstored.toml"
    settings = re.sub(r"^address.*$", f'address = "{user.address},tls:127.0.0.1:{port}"', settings, flags=re.MULTILINE)
    config.write_text(settings.replace("/etc/kvstored", str(user.home)))
    assert "good" in user.run(user.venv, "kvstored", "config", "check", config)
    client = client.replace("tls:cache-host:7070", f"tls:localhost:{port}")
    with user.serving("--config", config, KVSTORED_TLS_CA=str(user.home / "ca.pem")):
        user.run(user.worker, "bash", "-euc", client, code=1)  # not held: the connection and the token are good
        user.run(user.worker, "bash", "-euc", client.replace("KVSTORED_TLS_CA=ca.pem", ""), code=3)
    return "a worker with the token reads; one without the authority is told so"


def metrics(user: User) -> str:
    """A real Prometheus scrapes the daemon by the documented configuration, with the shipped alerts."""
    found = subprocess.run([ROOT / "tools/prometheus.sh", "--fetch"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise Skipped(found.stderr.strip())
    (scrape,) = [block for block in blocks("docs/operations.md", "yaml") if "scrape_configs" in block]
    user.port, own = free_port(), free_port()
    alerts = user.venv / "share/kvstored/prometheus/alerts.yml"
    config = user.home / "prometheus.yml"
    config.write_text(f"global: {{scrape_interval: 1s}}\nrule_files: ['{alerts}']\n"
                      + scrape.replace("127.0.0.1:9411", f"127.0.0.1:{user.port}"))  # fmt: skip
    program = Path(found.stdout.strip()) / "prometheus"
    with user.serving(KVSTORED_SERVER__METRICS_ADDRESS=f"127.0.0.1:{user.port}"):
        user.run(user.worker, user.worker / "bin/python", "-c", SECOND)
        with (user.home / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [program, f"--config.file={config}", f"--storage.tsdb.path={user.home}/tsdb",
                 f"--web.listen-address=127.0.0.1:{own}"], stdout=log, stderr=log,
            )  # fmt: skip
        try:
            query = urllib.parse.urlencode({"query": "kvstored_lookup_hit_tokens_total > 0"})
            url = f"http://127.0.0.1:{own}/api/v1/query?{query}"
            wait(lambda: b'"value"' in _read(url), lambda: process.poll() is not None,
                 (user.home / "prometheus.log").read_text)  # fmt: skip
            rules = _read(f"http://127.0.0.1:{own}/api/v1/rules").count(b'"alert')
        finally:
            process.terminate()
            process.wait(START_S)
        page(user)
    return f"tokens hit are in Prometheus, {rules} rules loaded"


def _read(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - our own
            return bytes(reply.read())
    except (urllib.error.URLError, OSError):
        return b""


def page(user: User) -> None:
    """The status page in a browser, while the daemon of `metrics` serves."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        user.notes.append("page: skipped, no browser is installed (Debian: chromium)")
        return
    words = [program, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={user.home}/profile",
             "--virtual-time-budget=4000", *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # fmt: skip
    done = subprocess.run([*words, "--dump-dom", f"http://127.0.0.1:{user.port}/"], capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    assert "prefill time saved" in done.stdout, done.stdout[:500]
    assert "Lease/get" in done.stdout, done.stdout[:500]
    user.notes.append("page: drawn by a real browser, with the daemon's numbers")


STEPS: Mapping[str, Callable[[User], str]] = {
    "wheels": wheels, "worker's install": worker, "daemon's install": install, "doctor": doctor,
    "quick start": quick_start, "backup": backup, "TLS": tls, "metrics and page": metrics, "service": service,
}  # fmt: skip


def play(user: User) -> bool:
    """All steps, each with its time. Whether none failed and they were quick enough."""
    began, good = time.monotonic(), True
    for name, step in STEPS.items():
        at = time.monotonic()
        try:
            said, verdict = step(user), "ok"
        except Skipped as reason:
            said, verdict = str(reason), "skipped"
        except (AssertionError, subprocess.SubprocessError, OSError, ValueError) as error:
            said, verdict, good = str(error), "FAILED", False
        print(f"{verdict:8}{time.monotonic() - at:6.1f} s  {name}: {said}", flush=True)
        if verdict == "FAILED" and name.endswith(("wheels", "install")):
            break  # nothing after it can be done
    for note in user.notes:
        print(f"{'':17}{note}")
    took = time.monotonic() - began
    print(f"{'in all':8}{took:6.1f} s, limit {LIMIT_S:.0f} s")
    return good and took < LIMIT_S


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="where built wheels are, or are put")
    parser.add_argument("--torch", choices=("auto", "index", "linked"), default="auto")
    parser.add_argument("--keep", type=Path, help="a new directory for all of it, which stays")
    asked = parser.parse_args()
    # A short path: a socket's has at most 101 bytes. Readable by others: the service's worker is another user.
    top = asked.keep or Path(tempfile.mkdtemp(prefix="kvu-"))
    top.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if play(User(top.absolute(), (asked.wheels or top / "dist").absolute(), asked.torch)) else 1
    finally:
        if asked.keep is None:
            shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
