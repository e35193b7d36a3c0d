"""The servers measured beside each other: kvstored, Redis, memcached and Mooncake, each with processes of its own here.

A Subject is one client of one server and can put and get payloads of float32 under keys. Rivals that are not installed
are left out.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
ROOT = Path(__file__).parents[1]
VALUE_MAX_NBYTES = 128 * MIB


@dataclass(frozen=True)
class Subject:
    """One client of one server. put(key, array); get(key) returns something with the payload in it."""

    put: Callable[[bytes, Any], object]
    get: Callable[[bytes], object]


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """A process's environment in which these sources are imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "daemon", "client"))}


@dataclass(frozen=True)
class Servers:
    """What is running: addresses, None where it is not installed, and the daemon's process."""

    kvstored_unix: str
    kvstored_tcp: str
    kvstored_pid: int
    redis_unix: str | None
    redis_port: int
    memcached: str | None
    mooncake: str | None


@contextmanager
def servers() -> Iterator[Servers]:
    """All servers, up; gone at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        port, redis_port = free_port(), free_port()
        unix, tcp = f"unix:{top}/k.sock", f"tcp:127.0.0.1:{port}"
        environ = {
            **environment(),
            "KVSTORED_STORE__HOT__CAPACITY_NBYTES": "3GiB",
            "KVSTORED_STORE__WARM__CAPACITY_NBYTES": "1GiB",
            "KVSTORED_STORE__PROMOTE_AFTER": "0",
            "KVSTORED_SERVER__INSECURE_TCP": "true",
        }
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        serve = [sys.executable, "-m", "kvstored", "serve", "--data-dir", f"{top}/data", "--address", f"{unix},{tcp}"]
        processes.append(subprocess.Popen(serve, env=environ, **quiet))
        redis, memcached = shutil.which("redis-server"), shutil.which("memcached")
        if redis:
            options = f"--port {redis_port} --unixsocket {top}/r.sock --save --appendonly no --dir {top}".split()
            options[options.index("--save") + 1 : options.index("--save") + 1] = [""]
            processes.append(subprocess.Popen([redis, *options], **quiet))
        if memcached:
            user = ["-u", "root"] if os.geteuid() == 0 else []
            processes.append(subprocess.Popen([memcached, "-s", f"{top}/m.sock", "-I", "128m", "-m", "4096", *user]))
        mooncake = start_mooncake(processes, top)
        try:
            _wait_for(
                Path(top) / "k.sock", bool(redis) and Path(top) / "r.sock", bool(memcached) and Path(top) / "m.sock"
            )
            yield Servers(
                unix,
                tcp,
                processes[0].pid,
                f"{top}/r.sock" if redis else None,
                redis_port,
                f"{top}/m.sock" if memcached else None,
                mooncake,
            )
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()


def _wait_for(*paths: Path | bool) -> None:
    deadline = time.monotonic() + 60
    while not all(path is False or (isinstance(path, Path) and path.exists()) for path in paths):
        if time.monotonic() > deadline:
            sys.exit(f"not up within 60 s: {paths}")
        time.sleep(0.05)
    time.sleep(0.5)


def redis_subject(up: Servers, path: str) -> Subject | None:
    """redis-py with hiredis, its fastest parser; payloads as memoryviews, replies as bytes. None: not installed."""
    try:
        from redis import Redis
    except ImportError:
        return None
    if up.redis_unix is None:
        return None
    client = Redis(unix_socket_path=up.redis_unix) if path == "unix" else Redis(port=up.redis_port)
    return Subject(lambda key, x: client.set(key, memoryview(x).cast("B")), client.get)


def memcached_subject(up: Servers) -> Subject | None:
    """Measure pymemcache over a unix socket. It takes bytes only: they are made beforehand, outside the clock."""
    try:
        from pymemcache.client.base import Client
    except ImportError:
        return None
    if up.memcached is None:
        return None
    client = Client(up.memcached, no_delay=True)
    return Subject(lambda key, x: client.set(key, x, noreply=False), client.get)


def start_mooncake(processes: list[subprocess.Popen[bytes]], top: str) -> str | None:
    """Mooncake's master and the client that holds the shared memory, both up; where the latter listens.

    None: not installed. The wheel is mooncake-transfer-engine-non-cuda, which needs the system's libibverbs1; it brings
    both programs, without the right to be executed.
    """
    try:
        found = find_spec("mooncake.store")
    except ImportError:
        return None
    if found is None or found.origin is None:
        return None
    programs = {name: Path(top) / name for name in ("mooncake_master", "mooncake_client")}
    for name, path in programs.items():
        shutil.copyfile(Path(found.origin).with_name(name), path)
        path.chmod(0o700)
    master, metrics, port = free_port(), free_port(), free_port()
    log = (Path(top) / "mooncake.log").open("wb")
    # The programs look for the wheel's libraries beside themselves, and they are copied.
    libraries = [str(path) for path in Path(found.origin).parent.parent.glob("mooncake*.libs")]
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join([*libraries, str(Path(found.origin).parent)])}
    quiet: dict[str, Any] = {"stdout": log, "stderr": log, "env": env}
    ports = [f"--rpc_port={master}", f"--metrics_port={metrics}"]
    processes.append(subprocess.Popen([programs["mooncake_master"], *ports], **quiet))
    _wait_for_port(master)
    where = [f"--master_server_address=127.0.0.1:{master}", "--metadata_server=P2PHANDSHAKE", "--host=127.0.0.1"]
    sizes = ["--global_segment_size=2 GB", "--local_buffer_size=256 MB", f"--port={port}", "--protocol=tcp"]
    processes.append(subprocess.Popen([programs["mooncake_client"], *where, *sizes], **quiet))
    _wait_for_port(port)
    return f"127.0.0.1:{port}"


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    sys.exit(f"nothing listens on port {port} within 180 s")


def mooncake_subject(up: Servers) -> Subject | None:
    """Mooncake's client of a process on the same host, with tensors in its shared memory. None: not installed.

    A put copies the payload into that memory and has it stored; a get has it brought there and copies it out, as a
    worker does whose tensors lie elsewhere. Keys are replaced (`upsert`), as all other subjects replace theirs.
    """
    if up.mooncake is None:
        return None
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup_dummy(4 * VALUE_MAX_NBYTES, VALUE_MAX_NBYTES, up.mooncake):
        return None
    address = store.alloc_from_mem_pool(VALUE_MAX_NBYTES)
    if not address or store.register_buffer(address, VALUE_MAX_NBYTES):
        return None
    pool = np.ctypeslib.as_array((ctypes.c_uint8 * VALUE_MAX_NBYTES).from_address(address))

    def put(key: bytes, x: np.ndarray) -> None:
        np.copyto(pool[: x.nbytes], x.view(np.uint8).reshape(-1))
        if (code := store.upsert_from(key.decode(), address, x.nbytes)) != 0:
            sys.exit(f"mooncake: put of {x.nbytes} bytes ended with {code}")

    def get(key: bytes) -> np.ndarray:
        nbytes = store.get_into(key.decode(), address, VALUE_MAX_NBYTES)
        if nbytes < 0:
            sys.exit(f"mooncake: get ended with {nbytes}")
        return pool[:nbytes].copy()

    return Subject(put, get)


def payloads(nbytes: int, copies: int) -> list[np.ndarray]:
    """Distinct float32 arrays of nbytes each."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(nbytes // 4, dtype=np.float32) for _ in range(copies)]
