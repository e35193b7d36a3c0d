"""What a client shows the daemon: a bearer token, certificates. Read from files named in the environment.

    KVSTORED_TOKEN_FILE          a file with one token; sent over unix sockets, TLS, and plain TCP on the loopback only
    KVSTORED_TLS_CA              PEM: who may sign the daemon's certificate (default: the system's authorities)
    KVSTORED_TLS_CERTIFICATE, KVSTORED_TLS_KEY    PEM: this client's own, for a daemon that asks for one
    KVSTORED_TLS_NAME            the name in the daemon's certificate, where the address has another

Files rather than values: an environment is readable in /proc and inherited by every child.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from kvstore.ownership import everybody_reads
from kvstored_client.wire.address import parse_address, socket_path, wants_tls

logger = logging.getLogger(__name__)

TOKEN_FILE_MAX_NBYTES = 4096
_SECRET = frozenset({"KVSTORED_TOKEN_FILE", "KVSTORED_TLS_KEY"})
_told: set[str] = set()
"""Files that were complained of: once each, not with every channel."""


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str]] | None
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


def token_pair(token: str) -> tuple[str, str]:
    """The metadata that shows a token."""
    return "authorization", f"Bearer {token}"


class _WithToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call. Not call credentials: gRPC refuses those on unix sockets."""

    def __init__(self, token: str) -> None:
        self._pair = token_pair(token)

    def _with(self, details: Any) -> _CallDetails:
        return _CallDetails(
            details.method, details.timeout, (*(details.metadata or ()), self._pair), details.credentials,
            details.wait_for_ready, details.compression,
        )  # fmt: skip

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Pass on, with the token."""
        return continuation(self._with(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Pass on, with the token."""
        return continuation(self._with(client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Pass on, with the token."""
        return continuation(self._with(client_call_details), request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Pass on, with the token."""
        return continuation(self._with(client_call_details), request_iterator)


Options = Sequence[tuple[str, Any]]


def open_channel(address: str, options: Options, environ: Mapping[str, str] = os.environ) -> grpc.Channel:
    """A channel to an address with what the environment says to show. Raises ValueError for what cannot be sent."""
    token, tls, options = shown_to(address, options, environ)
    target = parse_address(address)
    if tls is not None:
        channel = grpc.secure_channel(target, tls, options=options)
    else:
        channel = grpc.insecure_channel(target, options=options)
    return channel if token is None else grpc.intercept_channel(channel, _WithToken(token))


def shown_to(
    address: str, options: Options, environ: Mapping[str, str] = os.environ
) -> tuple[str | None, grpc.ChannelCredentials | None, Options]:
    """(token, TLS credentials, the channel's options) for an address. Raises ValueError for what cannot be sent."""
    token = check_credentials(address, environ)
    if not wants_tls(address):
        return token, None, options
    name = environ.get("KVSTORED_TLS_NAME")
    named = [("grpc.ssl_target_name_override", name)] if name else []
    return token, _tls(environ), [*options, *named]


def check_credentials(address: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The token to send to an address, if any. Raises ValueError for one that must not be sent or cannot be read.

    That is every file named in the environment, those for TLS too: the mistake is the caller's, and no daemon is down.
    """
    token = read_token(environ)
    target = parse_address(address)
    if token is not None and not wants_tls(address) and not _stays_here(target):
        raise ValueError(f"a token would cross the network unencrypted to {target}; use tls:{target}")
    if wants_tls(address):
        _tls(environ)
    return token


def read_token(environ: Mapping[str, str]) -> str | None:
    """The token in $KVSTORED_TOKEN_FILE; None where the variable is not set. Raises ValueError."""
    path = environ.get("KVSTORED_TOKEN_FILE")
    if not path:
        return None
    text = _read(path, "KVSTORED_TOKEN_FILE")[:TOKEN_FILE_MAX_NBYTES].decode("ascii", "replace").strip()
    if not text or not text.isprintable() or " " in text:
        raise ValueError(f"KVSTORED_TOKEN_FILE={path} must hold one token and nothing else")
    return text


def _tls(environ: Mapping[str, str]) -> grpc.ChannelCredentials:
    def pem(name: str) -> bytes | None:
        path = environ.get(name)
        return _read(path, name) if path else None

    return grpc.ssl_channel_credentials(
        pem("KVSTORED_TLS_CA"), pem("KVSTORED_TLS_KEY"), pem("KVSTORED_TLS_CERTIFICATE")
    )


def _read(path: str, name: str) -> bytes:
    try:
        if name in _SECRET and path not in _told and everybody_reads(path):
            _told.add(path)
            logger.warning("everybody on this host can read %s=%s: chmod o-r %s", name, path, path)
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}={path} cannot be read: {error.strerror}") from None


def _stays_here(target: str) -> bool:
    if socket_path(target) is not None:
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
