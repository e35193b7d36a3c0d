"""The metrics port: /metrics for Prometheus, / for people, /status.json for the page, /health for a probe.

Read-only, loopback, no credentials, so it shows numbers only: no key, no token, no tenant's data. The Host header is
checked, so a page of another site whose name resolves to 127.0.0.1 gets nothing; not where an operator lets other hosts
read it (`server.insecure_metrics`), who come with whatever name they know. Connections are bounded in number, and each
as a whole in seconds, however its bytes come. Where all slots are taken the oldest one gives way to the new one: a
scrape is answered in milliseconds, and who holds a slot for longer is not scraping.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from math import isfinite
from socket import AF_INET6, SHUT_RDWR, socket
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kvstore.errors import ConfigError
from kvstored.settings import check_metrics_address

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
TIMEOUT_S = 5.0
"""From the connection to the end of its answer."""
CHECK_INTERVAL_S = 0.5
BACK_OFF_S = 0.05
_HEADERS = {
    "Cache-Control": "no-store",
    # The page loads nothing from other origins, and may not be framed.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ASSETS = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
}


class MetricsPort:
    """The server, on its own threads: a scrape works while the event loop is busy."""

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        status: Callable[[], Mapping[str, Any]],
        *,
        anywhere: bool = False,
    ) -> None:
        """Bind. anywhere: beyond the loopback too. Raises ConfigError."""
        host, port = check_metrics_address(address, anywhere=anywhere)
        pages = {path: (_asset(name), kind) for path, (name, kind) in _ASSETS.items()}
        told = {"registry": registry, "status_of": staticmethod(status), "pages": pages, "anywhere": anywhere}
        handler = type("Handler", (_Handler,), told)
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {address}: {error.strerror}; choose another server.metrics_address, or leave "
                "it empty for none"
            ) from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(CHECK_INTERVAL_S,), name="kvstored-metrics", daemon=True
        )
        self._thread.start()
        log.info("listening metrics=http://%s:%d/", f"[{host}]" if ":" in host else host, self.port)

    def close(self) -> None:
        """Stop and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        # Oldest first, with the time of each. Only shut down from here: the thread that serves a socket closes it.
        self._open: dict[socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in place of the oldest one if there are too many."""
        with self._lock:
            if len(self._open) >= CONNECTIONS_MAX:
                self._end(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def get_request(self) -> Any:
        """The next connection. Out of descriptors it waits a moment: the loop would ask again without a pause."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(BACK_OFF_S)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        """As the base class, once nobody here will touch the socket any more."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that have had their time; the accepting thread calls this after each connection or pause."""
        due = time.monotonic() - TIMEOUT_S
        with self._lock:
            for request in [request for request, since in self._open.items() if since <= due]:
                self._end(request)

    def _end(self, request: socket) -> None:
        del self._open[request]
        with suppress(OSError):
            request.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's arguments
        """Log at debug level only: a client that went away is not an error."""
        log.debug("metrics event=connection_failed", exc_info=True)  # noqa: LOG014 - called inside one

    def server_bind(self) -> None:
        # Not HTTPServer's: that resolves this host's name, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    status_of: Callable[[], Mapping[str, Any]]
    pages: Mapping[str, tuple[bytes, str]]
    anywhere: bool
    connection: socket
    timeout = TIMEOUT_S
    protocol_version = "HTTP/1.1"
    server_version = "kvstored"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the four paths."""
        self.close_connection = True  # one request per connection: an idle one holds no thread
        path = self.path.partition("?")[0]
        if not (self.anywhere or self._local_host()):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this port answers to its loopback address only\n")
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, generate_latest(self.registry), CONTENT_TYPE_LATEST)
        elif path == "/status.json":
            self._answer(HTTPStatus.OK, json_bytes(self.status_of()), "application/json")
        elif path == "/health":
            self._answer(HTTPStatus.OK, b"ok\n")
        elif path in self.pages:
            self._answer(HTTPStatus.OK, *self.pages[path])
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"here are / /metrics /status.json /health\n")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _local_host(self) -> bool:
        host = (self.headers.get("Host") or "localhost").rpartition("@")[2]
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            return ip_address("127.0.0.1" if name == "localhost" else name).is_loopback
        except ValueError:
            return False

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, form: str, *args: Any) -> None:
        """Log scrapes at debug level only."""
        log.debug(form, *args)


def json_bytes(value: object) -> bytes:
    """JSON as browsers read it: null for NaN and infinity, which JSON cannot express."""
    return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value: object) -> object:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _asset(name: str) -> bytes:
    return files("kvstored.telemetry").joinpath("page").joinpath(name).read_bytes()
