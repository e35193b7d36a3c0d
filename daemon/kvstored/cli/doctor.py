"""`kvstored doctor`: problems for a daemon on this host, each with its remedy."""

import os
import platform
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from kvstore.errors import ConfigError, KvstoreError
from kvstore.ownership import check_private, everybody_reads
from kvstore.printable import size
from kvstored.cli.exits import REFUSED, UNREACHABLE, errors_as_exit_codes

if TYPE_CHECKING:
    from kvstored.settings import Settings

Verdict = Literal["good", "note", "bad"]
_FILES_MIN = 4096
_YEAR_2025 = 1_735_689_600
_PACKAGES = (
    "kvstored",
    "kvstored-kernel",
    "grpcio",
    "protobuf",
    "numpy",
    "torch",
    "lmdb",
    "zstandard",
    "safetensors",
    "prometheus-client",
)
_NO_ANSWER = "no answer"
_MARKS = {"good": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """One line of the report. todo: the remedy; empty if none is needed."""

    verdict: Verdict
    what: str
    todo: str = ""


@click.command()
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="The daemon's settings file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
def doctor(config: Path | None, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Look for problems that a daemon would have on this host. Changes nothing. Exit code 4: there is a problem.

    Exit code 3: the only one is that no daemon answers. Checks versions, the compiled kernel, a GPU, the clock, limits,
    the data directory and its disk, memory against the budgets, who may read or write tokens and keys, sockets and
    their permissions, and whether a daemon answers: the one of --config, else the one that a client would find.
    """
    import json

    with errors_as_exit_codes("the configured address"):
        from kvstored.settings import load_settings

        settings = load_settings(config)
    bad: list[str] = []
    for finding in findings(settings):
        if finding.verdict == "bad":
            bad.append(finding.what)
        if as_json:
            click.echo(json.dumps(asdict(finding)))
        else:
            click.echo(f"{_MARKS[finding.verdict]}  {finding.what}")
            if finding.todo:
                click.echo(f"      -> {finding.todo}")
    if bad:
        silent = all(what.startswith(_NO_ANSWER) for what in bad)
        click.get_current_context().exit(UNREACHABLE if silent else REFUSED)


def findings(settings: "Settings") -> Iterator[Finding]:
    """All findings, in the order in which an operator would look."""
    looks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _versions, _kernel, _gpu, _clock, _limits, _disk, _memory, _secrets, _sockets, _daemon,
    )  # fmt: skip
    for look in looks:
        yield from look(settings)


def _versions(_: "Settings") -> Iterator[Finding]:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    yield Finding("good", f"Python {platform.python_version()}, Linux {platform.release()}, {', '.join(found)}")
    if set(missing) - {"kvstored"}:
        yield Finding(
            "note", f"not installed: {', '.join(missing)}", "to run the daemon: pip install 'kvstored[daemon]'"
        )


def _kernel(_: "Settings") -> Iterator[Finding]:
    try:
        from kvstore.kernels import best
        from kvstore.kernels.cpu import ABI, ISAS, installed, kernels
    except ImportError:  # no torch, so no daemon runs from this environment: the line before says so
        return
    found = kernels()
    used = best(found)
    library, abi = installed()
    remedy = f"pip install kvstored-kernel=={_own_version()}; in a clone: make kernel"
    if library is None:
        yield Finding("bad", "no compiled codec kernel: NF4 costs about 35 times the CPU, in plain torch", remedy)
    elif abi != ABI:
        yield Finding(
            "bad",
            f"compiled codec kernel: its ABI is {abi}, this version needs {ABI}, so NF4 runs in plain torch",
            f"install the kernel of this version: {remedy}",
        )
    elif used is found[-1]:
        yield Finding("good", f"compiled codec kernel: {ISAS[used.isa]}")
    else:
        # The first one is its own measure, so there is one that is used.
        better = "" if used is None else f", {ISAS[used.isa]} is used"
        yield Finding(
            "bad",
            f"compiled codec kernel: its {ISAS[found[-1].isa]} code writes wrong bytes here{better}",
            "build it with another compiler: `make kernel`",
        )


def _own_version() -> str:
    try:
        return version("kvstored")
    except PackageNotFoundError:  # run from a tree
        return "VERSION"


def _gpu(settings: "Settings") -> Iterator[Finding]:
    device = settings.store.hot.device
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except ImportError:
        return
    if device == "cpu":
        yield Finding("good", f'{count} GPUs seen by torch; hot tier on "{device}"')
        return
    if int(device.partition(":")[2] or 0) >= count:
        yield Finding(
            "bad",
            f'store.hot.device is "{device}" and torch sees {count or "no"} GPU{"s" if count > 1 else ""}',
            'set it to "cpu", or check the driver with nvidia-smi',
        )
    elif not _is_installed("cuda.bindings"):
        yield Finding("bad", f'store.hot.device is "{device}" without cuda-bindings', "pip install cuda-bindings")
    else:
        yield Finding("good", f'{count} GPUs seen by torch; hot tier on "{device}"')
        yield from _gpu_codecs()


def _gpu_codecs() -> Iterator[Finding]:
    lacking = [] if _is_installed("triton") else ["Triton"]
    lacking += [] if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler"]
    if lacking:
        yield Finding(
            "note", f"codecs run on the CPU, as the GPU's need {' and '.join(lacking)}", "install what is missing"
        )
    else:
        yield Finding("good", "Triton and a C compiler for the GPU's codecs")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


def _clock(_: "Settings") -> Iterator[Finding]:
    if time.time() < _YEAR_2025:
        yield Finding("bad", "the wall clock is years behind", "set the time: entries kept over a restart seem new")
    else:
        yield Finding("good", f"clock {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}")


def _limits(_: "Settings") -> Iterator[Finding]:
    files, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files < _FILES_MIN:
        yield Finding(
            "note", f"{files} open files at most in this shell", "the unit sets 65536; by hand: ulimit -n 65536"
        )
    else:
        yield Finding("good", f"{files} open files at most")
    text = "unlimited" if locked == resource.RLIM_INFINITY else size(locked)
    yield Finding("good", f"locked memory at most {text}")


def _disk(settings: "Settings") -> Iterator[Finding]:
    path = Path(settings.store.cold.path or settings.server.data_dir)
    at = path
    while not at.exists() and at != at.parent:
        at = at.parent
    if not os.access(at, os.W_OK):
        yield Finding("bad", f"{at} cannot be written by this user", f"chown it, or set server.data_dir ({path})")
        return
    usage = shutil.disk_usage(at)
    capacity = settings.store.cold.capacity_nbytes
    room = usage.free + _held_nbytes(path)
    # The budget counts records; the index and the space between records are additional.
    if room < 1.1 * capacity:
        yield Finding(
            "bad", f"{at}: {size(room)} free or ours, store.cold.capacity_nbytes is {size(capacity)}",
            "lower it to nine tenths of what there is: a full disk is survived, and no write succeeds until it is not",
        )  # fmt: skip
    else:
        yield Finding("good", f"{at}: {size(usage.free)} free for a cold tier of {size(capacity)}")
    kind = _file_system(at)
    if kind in ("nfs", "nfs4", "cifs", "fuse.sshfs", "9p"):
        yield Finding("bad", f"{at} is on {kind}", "LMDB needs a local file system: choose another server.data_dir")
    elif kind == "tmpfs":
        yield Finding("note", f"{at} is on tmpfs", "the cold tier would be gone with the next boot")


def _held_nbytes(path: Path) -> int:
    held = 0
    for folder, _folders, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # a running daemon removes files meanwhile
                held += (Path(folder) / name).stat().st_blocks * 512
    return held


def _file_system(path: Path) -> str:
    best = ("", "unknown")
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _device, where, kind, *_rest = line.split()
            if path.is_relative_to(where) and len(where) >= len(best[0]):
                best = (where, kind)
    except OSError:
        return "unknown"
    return best[1]


def _memory(settings: "Settings") -> Iterator[Finding]:
    from kvstored.host.shared_memory import STAGING_NBYTES

    s = settings.store
    hot = s.hot.capacity_nbytes if s.hot.device == "cpu" else min(STAGING_NBYTES, s.hot.capacity_nbytes)
    wanted = hot + s.warm.capacity_nbytes + s.cold.write_buffer_nbytes + settings.server.in_flight_nbytes
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"budgets in memory {size(wanted)} of {size(have)}"
    if wanted > 0.9 * have:
        yield Finding(
            "bad", what, "lower store.hot, store.warm or server.in_flight_nbytes: the model needs room as well"
        )
    else:
        yield Finding("good", what)


def _secrets(settings: "Settings") -> Iterator[Finding]:
    server = settings.server
    files = [("server.tokens", server.tokens, False), ("server.tls_key", server.tls_key, True)]
    shared = settings.store.shared
    for what, paths in (
        ("store.cold.key_files", settings.store.cold.key_files.values()),
        ("store.shared.key_files", shared.key_files.values()),
        ("store.shared.secret_file", [shared.secret_file]),
        ("store.shared.credentials_file", [shared.credentials_file]),
        ("store.shared.key_file", [shared.key_file]),
    ):
        files += [(what, path, True) for path in paths]
    for what, path, secret in files:
        if not path:
            continue
        try:
            check_private(path, what, secret=secret)
            readable = everybody_reads(path)
        except ConfigError as error:
            yield Finding("bad", str(error), "who may write it decides who may call; who reads a key has the secret")
        except OSError as error:
            yield Finding("bad", f"{what}: cannot read {path}: {error.strerror}", "name a file that is there")
        else:
            todo = f"names and rights are known to all: chmod o-r {path}" if readable else ""
            yield Finding("note" if readable else "good", f"{what} {path} is written by its owner only", todo)


def _addresses(settings: "Settings") -> list[tuple[str, str, bool]]:
    """Each address, as a client writes it and in gRPC's spelling, and whether it uses TLS.

    Where nothing is configured it is where a client of this user would look: perhaps the service's.
    """
    from kvstored_client.wire.address import default_address, listening_address, parse_address

    server = settings.server
    if server.address == listening_address():
        return [(default_address(), parse_address(default_address()), False)]
    given = [part.strip() for part in server.address.split(",") if part.strip()]
    return [(text, target, tls) for text, (target, tls) in zip(given, server.listeners, strict=True)]


def _sockets(settings: "Settings") -> Iterator[Finding]:
    from kvstored_client.wire.address import socket_path

    for _, target, tls in _addresses(settings):
        path = socket_path(target)
        if path is None:
            yield Finding("good", f"{'tls' if tls else 'tcp'}:{target}")
        elif not os.access(path.parent, os.X_OK):
            group = path.parent.stat().st_gid if path.parent.exists() else os.getegid()
            yield Finding(
                "bad",
                f"{path.parent} is not there or may not be entered by this user",
                f"start the daemon, or join its group: usermod --append --groups {_group(group)} $USER",
            )
        elif not path.exists():
            yield Finding("note", f"{path} is not there", "no daemon is running, or it listens elsewhere")
        elif not os.access(path, os.R_OK | os.W_OK):
            group = path.stat().st_gid
            yield Finding(
                "bad",
                f"{path} may not be opened by this user",
                f"join its group: usermod --append --groups {_group(group)} $USER",
            )
        else:
            mode = stat.S_IMODE(path.stat().st_mode)
            open_to_all = mode & 0o007
            yield Finding(
                "bad" if open_to_all else "good", f"{path} has mode {mode:04o}",
                "everybody on this host may read the cache: chmod 0660" if open_to_all else "",
            )  # fmt: skip


def _group(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _daemon(settings: "Settings") -> Iterator[Finding]:
    from kvstored_client import Client

    address = _addresses(settings)[0][0]
    try:
        with Client(address, timeout_s=2, framework="numpy", on_error="raise") as client:
            values: Any = client.stats().values
    except (KvstoreError, ValueError) as error:
        yield Finding(
            "bad", f"{_NO_ANSWER} at {address}: {str(error)[:300]}", "kvstored serve, or systemctl start kvstored"
        )
        return
    yield Finding("good", f"the daemon at {address} is up for {values['uptime_s']:.0f} s")
    for name, bad in (("cold_healthy", 0), ("cold_quarantined", 1)):
        if values.get(name) == bad:
            yield Finding("bad", f"{name} is {bad}", "docs/operations.md says what that means")


COMMANDS = (doctor,)
