"""The last release: its packages, unpacked; a venv that has its client and nothing heavy; its daemon; directories."""

import importlib.metadata
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import STEADY, DaemonProcess, environment

from .contents import SEAL_KEY

HERE = Path(__file__).parent
LIGHT = ("click", "grpcio", "ml_dtypes", "numpy", "protobuf", "typing_extensions", "xxhash")
"""What the client needs, from the environment of the tests: the last release was tested with the same versions."""


@pytest.fixture(scope="session")
def release_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last release."""
    (packed,) = (HERE / "fixtures").glob("kvstored-*.whl.xz")
    wheel = tmp_path_factory.mktemp("release") / packed.stem
    wheel.write_bytes(lzma.decompress(packed.read_bytes()))
    return wheel


@pytest.fixture(scope="session")
def release(release_wheel: Path) -> Path:
    """Its packages, on no path: for a child process, by `environment_of`."""
    where = release_wheel.parent / "packages"
    # All that pip does with a wheel of pure Python, in no time.
    zipfile.ZipFile(release_wheel).extractall(where)  # noqa: S202 - a fixture of ours
    return where


def environment_of(release: Path) -> dict[str, str]:
    """As `environment`, with the release before the sources of today."""
    return environment() | {"PYTHONPATH": str(release)}


@pytest.fixture(scope="session")
def release_python(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a venv with the release's client: no torch, no lmdb, nothing of today's."""
    home = tmp_path_factory.mktemp("client") / "venv"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    for name in ("kvstore", "kvstored", "kvstored_client"):
        (packages / name).symlink_to(release / name)
    for name in LIGHT:
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(found.locate_file(top)))
    return home / "bin/python"


@dataclass
class ReleaseDaemon(DaemonProcess):
    """A daemon that runs the last release, or today's, on the same configuration: as an operator who goes back."""

    release: Path | None = None

    def start(self, *, wait: bool = True) -> None:
        if self.release is None:
            super().start(wait=wait)
            return
        with (self.directory / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvstored", "serve", "--config", str(self.config)],
                env=environment_of(self.release), stdout=log, stderr=log,
                cwd="/",  # -m puts this directory first: from here it would be today's
            )  # fmt: skip
        if wait:
            self.wait_until_up()


@contextmanager
def release_daemon(release: Path | None, server: str = "", tcp: str = "") -> Iterator[ReleaseDaemon]:
    """Not started. `{dir}` in `server` is its directory."""
    with tempfile.TemporaryDirectory(prefix="kvu-") as top:
        directory = Path(top)
        config, address = directory / "kvstored.toml", f"unix:{directory}/k.sock{tcp}"
        text = f'[server]\naddress = "{address}"\ndata_dir = "{{dir}}/data"\n{STEADY}\n{server}\n'
        config.write_text(text.replace("{dir}", top))
        daemon = ReleaseDaemon(directory, address, config, release=release)
        try:
            yield daemon
        finally:
            daemon.kill()


@dataclass
class OlderDirectory:
    """cold: the directory. digests: SHA-256 of each entry's tensors, as the version that wrote it read them back."""

    format: int
    cold: Path
    seal_key: Path
    digests: dict[str, dict[str, str]]


@pytest.fixture(params=[1, 2], ids=lambda number: f"format {number}")
def older(request: pytest.FixtureRequest, tmp_path: Path) -> OlderDirectory:
    """A directory that an older version wrote and closed in order."""
    with tarfile.open(HERE / f"fixtures/format-{request.param}.tar.xz") as archive:
        # Debian's Python 3.11.2 has no filters; the archive is a fixture of ours.
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "older", **filters)  # noqa: S202
    if os.geteuid() == 0:
        for path in (tmp_path / "older").rglob("*"):
            os.chown(path, 0, 0)
    (tmp_path / "seal.key").write_text(SEAL_KEY)
    (tmp_path / "seal.key").chmod(0o600)
    digests = json.loads((tmp_path / "older/digests.json").read_text())
    return OlderDirectory(request.param, tmp_path / "older/cold", tmp_path / "seal.key", digests)
