"""The daemon of a soak: a real process on a directory of its own, with small budgets, tenants, TLS and the shim."""

import os
import random
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from kvstored.access.tokens import digest, make_token

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TENANTS = ("a", "b", "c")
PROBE = "probe"
DISK_NBYTES = 640 * MIB
BUDGETS = """
[store]
ttl_s = 3600
[store.hot]
capacity_nbytes = "96MiB"
[store.warm]
capacity_nbytes = "48MiB"
[store.cold]
capacity_nbytes = "384MiB"
write_buffer_nbytes = "32MiB"
flush_interval_s = 2
[store.quotas.c]
hot_nbytes = "24MiB"
[store.namespaces.batch]
hot_nbytes = "16MiB"
"""
CONTROL = ("write", "sync", "read", "one_in", "offset_s", "fired", "calls")


class Sample(NamedTuple):
    """The daemon, or a worker, at one moment. segments: of shared memory that it has open. blocks: of Python's heap."""

    at_s: float
    rss: int
    descriptors: int
    threads: int
    segments: int
    heap: int


def sample(pid: int, blocks: Path | None = None) -> Sample | None:
    """Of a process; None where it is gone. Files of the cold tier are not counted: they come with what it holds."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        links = []
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(str(link.readlink()))
    except (OSError, ValueError):
        return None
    heap = 0
    if blocks is not None:
        with suppress(OSError, ValueError):
            heap = int(blocks.read_text())
    return Sample(
        time.monotonic(), int(fields.get("VmRSS", "0 kB").split()[0]) << 10,
        sum("/cold/segments/" not in link for link in links), int(fields["Threads"]),
        sum(link.startswith("/memfd:") for link in links), heap,
    )  # fmt: skip


def growth(samples: Iterable[Sample]) -> dict[str, int]:
    """By how much the last third of the time is above the first one, in the medians."""
    found = list(samples)
    part = len(found) // 3
    if not part:
        return dict.fromkeys(Sample._fields[1:], 0)
    return {
        name: int(statistics.median(getattr(s, name) for s in found[-part:]))
        - int(statistics.median(getattr(s, name) for s in found[:part]))
        for name in Sample._fields[1:]
    }


def _free_port() -> int:
    """Below those that the kernel gives to connections: while no daemon listens, a client could connect to itself."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def compiled(directory: Path) -> Path | None:
    """The shim; None without a compiler."""
    if shutil.which("gcc") is None:
        return None
    library = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


class Control:
    """What the shim does, see shim.c. Numbers are set as attributes of `CONTROL`."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(8 * len(CONTROL)))
        with path.open("r+b") as file:
            self._map = mmap(file.fileno(), 8 * len(CONTROL))

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("q", self._map, 8 * CONTROL.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._map, 8 * CONTROL.index(name), value)


class Authority:
    """Signs certificates for localhost. Made with openssl."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = directory / "ca.pem"
        self._run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                  "-subj", "/CN=soak", "-keyout", str(directory / "ca.key"), "-out", str(self.ca))  # fmt: skip
        (directory / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self.certificate, self.key = directory / "server.pem", directory / "server.key"
        self.renew()

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    def renew(self) -> None:
        """A new certificate with a new key, in place of the old ones."""
        new = {name: self.directory / f"new.{name}" for name in ("pem", "key", "csr")}
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=kvstored",
                  "-keyout", str(new["key"]), "-out", str(new["csr"]))  # fmt: skip
        self._run("x509", "-req", "-in", str(new["csr"]), "-CA", str(self.ca), "-CAkey", str(self.directory / "ca.key"),
                  "-CAcreateserial", "-days", "2", "-extfile", str(self.directory / "san"),
                  "-out", str(new["pem"]))  # fmt: skip
        new["key"].chmod(0o600)
        new["key"].replace(self.key)
        new["pem"].replace(self.certificate)


@dataclass
class Daemon:
    """The process and its files. uids: whose lease connections are which tenant."""

    directory: Path
    uids: dict[str, int]
    process: "subprocess.Popen[bytes] | None" = None
    mounted: bool = False

    def __post_init__(self) -> None:
        for name in ("d", "certificates", "disk", "tokens"):
            (self.directory / name).mkdir()
        self.directory.chmod(0o755)
        self.tokens = {name: make_token() for name in (*TENANTS, PROBE)}
        for name, token in self.tokens.items():
            path = self.token_file(name)
            path.write_text(token)
            path.chmod(0o600)
            if os.geteuid() == 0 and name in self.uids:
                os.chown(path, self.uids[name], -1)
        self.authority = Authority(self.directory / "certificates")
        (self.directory / "certificates").chmod(0o755)
        self.authority.ca.chmod(0o644)
        self.shim = compiled(self.directory)
        self.control = Control(self.directory / "control")
        self.port = _free_port()
        self._mount()
        self.write_tokens({})
        self._configure()

    def _mount(self) -> None:
        """A small file system of its own where that is allowed, so that it can be full."""
        disk = self.directory / "disk"
        if os.geteuid() == 0:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK_NBYTES},mode=755", "tmpfs", str(disk)],
                capture_output=True, check=False,
            )  # fmt: skip
            self.mounted = not done.returncode

    def unmount(self) -> None:
        """Let the file system go."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.directory / "disk")], check=False)
            self.mounted = False

    def _configure(self) -> None:
        (self.directory / "kvstored.toml").write_text(
            f'[server]\naddress = "{self.unix},{self.tls}"\ndata_dir = "{self.directory}/disk/data"\n'
            f'tokens = "{self.directory}/tokens.toml"\ntoken_on_unix = true\nin_flight_nbytes = "192MiB"\n'
            f'tls_certificate = "{self.authority.certificate}"\ntls_key = "{self.authority.key}"\n'
            f'lease_max_s = 20\nlog_format = "text"\n{BUDGETS}'
        )

    @property
    def unix(self) -> str:
        """The address for this host."""
        return f"unix:{self.directory}/d/k.sock"

    @property
    def tls(self) -> str:
        """The other one."""
        return f"tls:localhost:{self.port}"

    def token_file(self, name: str) -> Path:
        """A caller's."""
        return self.directory / "tokens" / name

    def write_tokens(self, rights: dict[str, tuple[str, ...] | None]) -> None:
        """The tokens file. rights: of tenants that have not all of them; None: the tenant is left out."""
        text = ""
        for name, token in self.tokens.items():
            has = rights.get(name, ("read", "write"))
            if has is None:
                continue
            if name == PROBE:
                has = ("read", "write", "admin")
            text += f'[[token]]\nname = "{name}"\nsha256 = "{digest(token)}"\n'
            text += "" if name == PROBE else f'tenant = "{name}"\n'
            text += "rights = [" + ", ".join(f'"{right}"' for right in has) + "]\n"
            if name in self.uids:
                text += f"uid = {self.uids[name]}\n"
        path = self.directory / "tokens.new"
        path.write_text(text)
        path.chmod(0o600)
        path.replace(self.directory / "tokens.toml")

    def start(self) -> None:
        """Begin a life."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))
        environment["KVSTORED_SOAK_DUMP"] = str(self.directory / "daemon.dump")
        environment["KVSTORED_SOAK_BLOCKS"] = str(self.blocks)
        if self.shim is not None:
            environment |= {"LD_PRELOAD": str(self.shim), "KVSTORED_SOAK_CONTROL": str(self.directory / "control"),
                            "KVSTORED_SOAK_UNDER": str(self.directory / "disk")}  # fmt: skip
        # The faults' signals come at any time, also before Python has begun: a service manager sends none so early.
        deaf = ["env", "--ignore-signal=HUP", "--ignore-signal=USR1", "--ignore-signal=USR2"]
        command = [*deaf, sys.executable, str(Path(__file__).with_name("serve.py")), "serve"]
        self.blocks.unlink(missing_ok=True)
        with (self.directory / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--config", str(self.directory / "kvstored.toml")], env=environment, stdout=log, stderr=log
            )

    @property
    def blocks(self) -> Path:
        """Where the daemon writes how many blocks its heap has."""
        return self.directory / "blocks"

    @property
    def pid(self) -> int:
        """Of this life."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal, unless it is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End this life at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def limit_descriptors(self, limits: tuple[int, int]) -> tuple[int, int]:
        """Set its limits of descriptors, (soft, hard). Returns those before."""
        return resource.prlimit(self.pid, resource.RLIMIT_NOFILE, limits)

    def ask_for_blocks(self) -> None:
        """Have it write how many blocks its heap has: a moment later they are in `blocks`."""
        self.signal(signal.SIGUSR2)
