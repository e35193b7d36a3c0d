"""TLS for TCP: certificates from files, read again when the files change. New connections use the new ones."""

import logging
import threading
from pathlib import Path
from typing import Any

import grpc

from kvstore.errors import ConfigError
from kvstore.ownership import check_private

log = logging.getLogger(__name__)


class Certificates:
    """The files of one listener. Each handshake asks whether they have changed."""

    def __init__(self, certificate: str, key: str, client_ca: str = "") -> None:
        self._paths = [Path(path) for path in (certificate, key, client_ca) if path]
        self._client_ca = bool(client_ca)
        self._lock = threading.Lock()
        self._seen = self._stamp()

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of a secure port. Raises ConfigError if a file cannot be read or has no certificate."""
        fetch: Any = self._fetch  # the stubs leave out that it may return None
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetch, self._client_ca)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        texts = []
        for path in self._paths:
            try:
                if path == self._paths[1]:
                    check_private(path, "server.tls_key", secret=True)
                texts.append(path.read_bytes())
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from None
            if b"-----BEGIN " not in texts[-1]:
                raise ConfigError(
                    f"{path} is not PEM: it has no -----BEGIN line; convert it with `openssl x509` or `openssl pkey`"
                )
        ca = texts[2] if self._client_ca else None
        return grpc.ssl_server_certificate_configuration([(texts[1], texts[0])], ca)

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        found = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from None
            found.append((status.st_mtime_ns, status.st_ino))
        return tuple(found)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, on its own threads. None: keep the present certificate."""
        with self._lock:
            try:
                now = self._stamp()
                if now == self._seen:
                    return None
                fresh = self._configuration()
            except ConfigError as error:
                # Only one file is replaced so far: the old certificate serves until both files match.
                log.warning("tls event=reload_failed error=%s", error)
                return None
            self._seen = now
        log.info("tls event=reloaded certificate=%s", self._paths[0])
        return fresh
