"""A daemon for a whole module: starting one takes seconds, and what is asked of it here changes little."""

import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import STEADY, DaemonProcess


@contextmanager
def running_daemon(server: str = "", store: str = "", address: str = "") -> Iterator[DaemonProcess]:
    """`{dir}` in the arguments is the daemon's directory."""
    with tempfile.TemporaryDirectory(prefix="kvo-") as top:
        directory = Path(top)
        where = f"unix:{directory}/k.sock" + (f",{address}" if address else "")
        config = directory / "kvstored.toml"
        config.write_text(
            f'[server]\naddress = "{where}"\ndata_dir = "{directory}/data"\n'
            f"{STEADY}\n{server}\n[store]\n{store}\n".replace("{dir}", top)
        )
        found = DaemonProcess(directory, where, config)
        try:
            yield found
        finally:
            found.kill()


def http_get(port: int, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers) of a page of the metrics port."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


class Authority:
    """A certificate authority made with openssl, and what it signs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = directory / "ca.pem"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=test authority", "-keyout", str(directory / "ca.key"), "-out", str(self.ca),
        )  # fmt: skip

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    def sign(self, name: str, file: str) -> tuple[Path, Path]:
        """(certificate, key) for a common name, valid for localhost too; written over what `file` named before."""
        certificate, key, request = (self.directory / f"{file}.{kind}" for kind in ("pem", "key", "csr"))
        extension = self.directory / "extension"
        extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(request),
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self.directory / "ca.key"),
            "-CAcreateserial", "-days", "2", "-extfile", str(extension), "-out", str(certificate),
        )  # fmt: skip
        return certificate, key


@pytest.fixture
def authority(tmp_path) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates for TLS tests")
    return Authority(tmp_path)
