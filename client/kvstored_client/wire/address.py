"""Where the daemon listens: the one rule, for the daemon and its clients alike. Standard library only."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOCKET_NAME = "kvstored.sock"
SERVICE_DIRECTORY = Path("/run/kvstored")
"""Where the system's service listens; systemd makes it, and root's own daemon does."""
DEFAULT_PORT = 7411


def listening_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where a daemon listens by default: $KVSTORED_ADDRESS, else the unix socket in the runtime directory."""
    return environ.get("KVSTORED_ADDRESS") or f"unix:{runtime_directory(environ) / SOCKET_NAME}"


def default_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where a client looks: `listening_address`, or the service's socket where this user's own is not there."""
    own = listening_address(environ)
    # The directory counts, not the socket: who may not enter it is told so by the connection, and nobody else would be.
    if environ.get("KVSTORED_ADDRESS") or os.path.exists(own.removeprefix("unix:")) or not SERVICE_DIRECTORY.is_dir():  # noqa: PTH110 - False without rights
        return own
    return f"unix:{SERVICE_DIRECTORY / SOCKET_NAME}"


def runtime_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The service manager's choice, /run for root, the session's, else one per user in the temporary directory."""
    given = environ.get("RUNTIME_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return SERVICE_DIRECTORY
    session = environ.get("XDG_RUNTIME_DIR")
    if session:
        return Path(session) / "kvstored"
    return Path(tempfile.gettempdir()) / f"kvstored-{os.geteuid()}"


def parse_address(text: str) -> str:
    """The gRPC target of "unix:PATH", a bare path, "tcp:HOST:PORT", "tls:HOST:PORT". Raises ValueError."""
    address = text.strip()
    if address.startswith("/"):
        return f"unix:{address}"
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path:
            raise ValueError(f"address {text!r} names no socket: write unix:/path/to/kvstored.sock")
        # sun_path has 108 bytes, `.lease` and the end included; the kernel's error names neither path nor limit.
        if len(os.fsencode(path)) > 101:
            raise ValueError(f"a socket path has at most 101 bytes, got {len(os.fsencode(path))}: {path}")
        return f"unix:{path}"
    if "://" in address:
        raise ValueError(
            f"not an address: {text!r}; the daemon speaks gRPC, not {address.partition('://')[0]}: "
            "write unix:PATH, tcp:HOST:PORT or tls:HOST:PORT"
        )
    host, colon, port = address.removeprefix("tls:").removeprefix("tcp:").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"not an address: {text!r}; write unix:PATH, tcp:HOST:PORT or tls:HOST:PORT")
    return f"{host}:{port}"


def wants_tls(text: str) -> bool:
    """Whether an address of `parse_address` asks for TLS."""
    return text.strip().startswith("tls:")


def socket_path(target: str) -> Path | None:
    """The path of a unix target of `parse_address`; None for TCP."""
    return Path(target.removeprefix("unix:")) if target.startswith("unix:") else None


def lease_path(path: Path) -> Path:
    """Where the lease socket is: beside the unix socket `path`."""
    return path.with_name(path.name + ".lease")
