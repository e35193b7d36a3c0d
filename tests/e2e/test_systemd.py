"""The unit as it is installed, under a real systemd that runs as process 1 of namespaces of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from kvstored.cli.install import render
from kvstored_client import Client
from tests.conftest import ROOT

SYSTEMD = Path("/lib/systemd/systemd")
BOX = Path(__file__).with_name("box.sh")
CHECKOUT, ENVIRONMENT = "/opt/box/checkout", "/opt/box/environment"
"""The checkout and its venv inside: the unit has a /tmp of its own and no /home, where they may lie out here."""
NAMESPACES = ["unshare", "-Cmpnui", "--fork", "--kill-child"]
WATCHDOG_S = 12
"""Fed every 6 s: a busy machine must not make it bark at a daemon that is well."""
USERS = (3001, 3002)
WORKER = """
import json, os, sys
import numpy as np
from kvstored_client import Client

with Client(on_error="raise", framework="numpy", timeout_s=20) as cache:
    key = b"of %d" % os.getuid()
    put = cache.put(key, {"x": np.full(50_000, os.getuid() % 251, np.uint8)})
    hit = cache.get(key)
    with open("/proc/self/maps") as maps:
        shared = sorted({line.partition("memfd:")[2].split()[0] for line in maps if "memfd:kvstored-" in line})
    print(json.dumps({"uid": os.getuid(), "address": cache.address, "put": put, "shared": shared,
                      "right": bool((hit.tensors["x"] == os.getuid() % 251).all()), "deleted": cache.delete(key)}))
"""
TARGET = "[Unit]\nDescription=what the test starts\nDefaultDependencies=no\n"

pytestmark = pytest.mark.slow


def why_not() -> str | None:
    """What this machine lacks; None where the test can run."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces and mounts"
    missing = [tool for tool in ("unshare", "nsenter", "pivot_root", "ip", "systemctl") if shutil.which(tool) is None]
    if missing or not SYSTEMD.exists():
        return f"not installed: {', '.join(missing) or SYSTEMD} (Debian: systemd util-linux iproute2)"
    with tempfile.TemporaryDirectory() as top:
        mounts = (
            f"mount -t tmpfs box {top} && cd {top} && mkdir u w r c && "
            "mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w r && mount -t cgroup2 none c"
        )
        tried = subprocess.run([*NAMESPACES, "sh", "-c", mounts], capture_output=True, text=True, check=False)
    return f"namespaces or mounts are refused: {tried.stderr.strip()[-200:]}" if tried.returncode else None


class Box:
    """A running systemd."""

    def __init__(self, top: Path) -> None:
        units = top / "units"
        units.mkdir()
        self.log_path = top / "console"
        self._write_units(units)
        with self.log_path.open("wb") as log:
            self._outer = subprocess.Popen(
                [*NAMESPACES, str(BOX), str(top / "box"), str(units), str(ROOT), sys.prefix],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.init = 0
        self._wait(self._is_up, "systemd did not come up")

    def _write_units(self, units: Path) -> None:
        (units.parent / "box").mkdir()
        (units / "box.target").write_text(TARGET)
        program = units.parent / "never-started"
        unit = render(program, Path("/run/systemd/system/kvstored.toml"))
        python = f"{ENVIRONMENT}/bin/{Path(sys.executable).name}"
        start = f"{python} -m kvstored serve --config /run/systemd/system/kvstored.toml"
        (units / "kvstored.service").write_text(unit.replace(unit[unit.index("ExecStart=") :].splitlines()[0],
                                                             f"ExecStart={start}"))  # fmt: skip
        (units / "kvstored.toml").write_text(
            '[server]\naddress = "unix:/run/kvstored/kvstored.sock"\nmetrics_address = "127.0.0.1:9411"\n'
            'log_format = "json"\n[store.hot]\ncapacity_nbytes = "64MiB"\n[store.warm]\ncapacity_nbytes = "16MiB"\n'
        )
        # Only what the place needs: sources and an interpreter that may be in a home directory, no journald, less time.
        drop = units / "kvstored.service.d"
        drop.mkdir()
        (drop / "box.conf").write_text(
            f"[Service]\nWatchdogSec={WATCHDOG_S}\nStandardError=append:/run/kvstored.log\nProtectHome=tmpfs\n"
            f"BindReadOnlyPaths={sys.base_prefix}\n"
            f"Environment=PYTHONPATH={CHECKOUT}:{CHECKOUT}/daemon:{CHECKOUT}/client PYTHONDONTWRITEBYTECODE=1\n"
        )

    def work(self, uid: int) -> dict[str, object]:
        """What a worker of a user says who is in the socket's group: WORKER, as a service with that user."""
        group = self.path("/run/kvstored/kvstored.sock").stat().st_gid
        for file, line in (("passwd", f"w{uid}:x:{uid}:{uid}::/:/bin/sh"), ("group", f"w{uid}:x:{uid}:")):
            at = self.path(f"/etc/{file}")  # of the box: its root is an overlay
            if line not in at.read_text():
                at.write_text(f"{at.read_text()}{line}\n")
        groups = self.path("/etc/group")
        if f":{group}:" not in groups.read_text():
            groups.write_text(f"{groups.read_text()}clients:x:{group}:\n")
        (self.units / "worker.py").write_text(WORKER)
        (self.units / f"worker-{uid}.service").write_text(
            f"[Service]\nType=oneshot\nUser={uid}\nGroup={uid}\nSupplementaryGroups={group}\nProtectHome=tmpfs\n"
            f"BindReadOnlyPaths={sys.base_prefix}\nStandardOutput=truncate:/run/worker-{uid}\n"
            f"StandardError=truncate:/run/worker-{uid}.errors\n"
            f"Environment=PYTHONPATH={CHECKOUT}:{CHECKOUT}/daemon:{CHECKOUT}/client PYTHONDONTWRITEBYTECODE=1\n"
            f"ExecStart={ENVIRONMENT}/bin/{Path(sys.executable).name} /run/systemd/system/worker.py\n"
        )
        self.systemctl("daemon-reload")
        done = self.systemctl("start", f"worker-{uid}")
        errors = self.path(f"/run/worker-{uid}.errors")
        told = errors.read_text() if errors.exists() else "no output"
        told += self.systemctl("status", f"worker-{uid}").stdout
        assert done.returncode == 0, f"{done.stderr}{told}\n{self.log}\n{self.log_path.read_text()[-2000:]}"
        return json.loads(self.path(f"/run/worker-{uid}").read_text())

    def _is_up(self) -> bool:
        assert self._outer.poll() is None, self.log_path.read_text()
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.init = int(children[0]) if children else 0
        return bool(children) and self.systemctl("is-active", "box.target").stdout.strip() == "active"

    def systemctl(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", str(self.init), "-a", "systemctl", "--no-pager", *arguments],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", "-p", name, "kvstored").stdout.strip()

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self.init}/root{inside}")

    @property
    def units(self) -> Path:
        """Where the units and their files are, inside."""
        return self.path("/run/systemd/system")

    @property
    def log(self) -> str:
        path = self.path("/run/kvstored.log")
        return path.read_text() if path.exists() else ""

    def signal_main(self, number: int) -> None:
        """To the daemon alone, as the kernel would send it."""
        inside = self.show("MainPID")
        subprocess.run(["nsenter", "-t", str(self.init), "-a", "kill", f"-{int(number)}", inside], check=True)

    def wait_for_restart(self, before: int) -> None:
        self._wait(lambda: int(self.show("NRestarts")) > before and self.show("ActiveState") == "active", "no restart")

    def _wait(self, what, sentence: str, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, f"{sentence}\n{self.log_path.read_text()}\n{self.log}"
            time.sleep(0.1)

    def close(self) -> None:
        self._outer.kill()
        self._outer.wait(60)


@pytest.fixture(scope="module")
def box():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no systemd in namespaces here: {reason}")
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        found = Box(Path(top))
        yield found
        found.close()


@pytest.fixture
def client(box):
    if box.show("ActiveState") != "active":
        done = box.systemctl("start", "kvstored")
        assert done.returncode == 0, done.stderr + box.log + box.log_path.read_text()
    # A socket with a path is reached through the file system, from any namespace.
    with Client(
        f"unix:{box.path('/run/kvstored/kvstored.sock')}", on_error="raise", framework="numpy", timeout_s=20
    ) as c:
        yield c


def value(seed):
    return {"x": np.random.default_rng(seed).integers(0, 256, 50_000, dtype=np.uint8)}


def is_held(client, key, seed):
    hit = client.get(key)
    return hit is not None and np.array_equal(hit.tensors["x"], value(seed)["x"])


def test_start_returns_when_it_is_ready_and_the_sandbox_lets_it_work(box, client):
    assert box.show("ActiveState") == "active"
    assert box.show("StatusText") == "serving"
    assert client.put(b"first", value(0), fidelity="exact")
    assert is_held(client, b"first", 0)
    assert client.drain() >= 1
    state = box.path("/var/lib/kvstored")
    assert (state / "cold").is_dir()
    assert state.stat().st_mode & 0o777 == 0o700
    assert state.stat().st_uid != 0
    socket = box.path("/run/kvstored/kvstored.sock")
    assert socket.stat().st_mode & 0o777 == 0o660


def test_the_log_is_json_a_line_an_event(box, client):
    lines = [json.loads(line) for line in box.log.splitlines()]
    assert any(line["message"].startswith("listening address=unix:/run/kvstored") for line in lines)
    assert not [line for line in lines if line["level"] in ("error", "critical")]


def test_reload_keeps_the_process(box, client):
    before = box.show("MainPID")
    assert box.systemctl("reload", "kvstored").returncode == 0
    box._wait(lambda: "reloaded tokens=0" in box.log, "the reload left no line")
    assert box.show("MainPID") == before
    assert box.show("ActiveState") == "active"
    assert client.stats().values["uptime_s"] > 0


def test_kill_9_is_followed_by_a_restart_with_the_cold_entries(box, client):
    client.put(b"kept", value(1), fidelity="exact")
    client.drain()
    restarts = int(box.show("NRestarts"))
    box.signal_main(signal.SIGKILL)
    box.wait_for_restart(restarts)
    assert is_held(client, b"kept", 1)
    assert client.restarts == 1


def test_a_daemon_that_hangs_is_restarted_by_the_watchdog(box, client):
    client.put(b"kept too", value(2), fidelity="exact")
    client.drain()
    restarts = int(box.show("NRestarts"))
    box.signal_main(signal.SIGSTOP)
    box.wait_for_restart(restarts)
    assert is_held(client, b"kept too", 2)


def test_stop_drains_and_removes_the_socket(box, client):
    assert client.put(b"only in memory", value(3), fidelity="exact")
    assert box.systemctl("stop", "kvstored").returncode == 0
    assert box.show("Result") == "success"
    assert not box.path("/run/kvstored").exists()
    assert box.systemctl("start", "kvstored").returncode == 0
    with Client(client.address, on_error="raise", framework="numpy", timeout_s=20) as again:
        assert is_held(again, b"only in memory", 3)


def test_two_users_have_shared_memory_of_their_own_and_find_the_service_unasked(box, client):
    """A user namespace of the service's would show the daemon one uid for both of them."""
    for uid in USERS:
        said = box.work(uid)
        assert said == {
            "uid": uid, "address": "unix:/run/kvstored/kvstored.sock", "put": True, "right": True, "deleted": 1,
            "shared": said["shared"],
        }  # fmt: skip
        assert said["shared"], "nothing went through shared memory"
        assert {name.split(":")[0] for name in said["shared"]} == {f"kvstored-{uid}"}
        assert f"verb=Lease/delete who=local peer=lease:{uid} keys=1" in box.log


def test_the_uid_of_a_tokens_entry_is_the_workers_own(box, client):
    tokens = box.units / "tokens.toml"
    tokens.write_text(
        f'[[token]]\nname = "first"\nsha256 = "{"a" * 64}"\ntenant = "team-a"\nuid = {USERS[0]}\n'
        'rights = ["read", "write"]\n'
    )
    config = box.units / "kvstored.toml"
    before = config.read_text()
    config.write_text(before.replace("[server]\n", '[server]\ntokens = "/run/systemd/system/tokens.toml"\n'))
    try:
        assert box.systemctl("restart", "kvstored").returncode == 0, box.log
        assert box.work(USERS[0])["shared"]
        assert f"verb=Lease/delete who=first peer=lease:{USERS[0]} keys=1" in box.log
        assert not box.work(USERS[1])["shared"], "no entry: over the stream"
        assert f"lease verb=connect who=nobody peer=lease:{USERS[1]} result=UNAUTHENTICATED" in box.log
    finally:
        config.write_text(before)
        box.systemctl("restart", "kvstored")
