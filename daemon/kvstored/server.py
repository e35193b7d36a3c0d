"""The daemon from start to end: locks, store, sockets, signals, and a stop that loses no entry.

Start: settings are checked -> the data directory and the sockets are locked -> the store opens -> sockets are bound.
End (SIGTERM, SIGINT): health says NOT_SERVING -> no new calls, running ones get `drain_grace_s` -> hot and warm entries
are written to cold -> the sockets are removed. Locks come before binding because gRPC lets a second server take over a
bound unix path without an error.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore.errors import ConfigError
from kvstore.kernels.cpu import installed, kernels
from kvstore.shm.arena import Arena
from kvstore.store import Store
from kvstored.access.admission import Admission
from kvstored.access.interceptor import Access, Interceptor
from kvstored.access.records import Records
from kvstored.access.segment_owners import SegmentOwners
from kvstored.access.shares import Shares
from kvstored.access.tenant_view import TenantViews, tenant_prefixes, tenants_secret
from kvstored.access.tls import Certificates
from kvstored.access.tokens import Tokens, read_tokens
from kvstored.calls.budget import Budget
from kvstored.calls.fair_threads import FairThreads
from kvstored.calls.verbs import Verbs
from kvstored.doors.admin_service import AdminService
from kvstored.doors.cache_service import CacheService
from kvstored.doors.lease_server import LeaseServer
from kvstored.doors.lease_shared import Shared
from kvstored.doors.lending import Lending
from kvstored.host.process import DirectoryLock, raise_descriptor_limit, settle, tune
from kvstored.host.sdnotify import notify, watchdog_interval_s
from kvstored.host.shared_memory import arena_limit_nbytes, encoded_limit_nbytes
from kvstored.live import LiveSettings
from kvstored.sampler import Sampler
from kvstored.settings import ServerSettings, Settings, Source
from kvstored.telemetry.router_events import open_events
from kvstored.telemetry.spans import Spans, open_spans
from kvstored_client.wire.address import lease_path, socket_path

logger = logging.getLogger(__name__)

MESSAGE_MAX_NBYTES = 4 << 20
METADATA_MAX_NBYTES = 10 << 10
OPEN_TIMEOUT_S = 900
HEARTBEAT_MAX_S = 120.0
"""The background thread has a turn per second; the longest healthy one, a flush that waits for the disk, takes 30 s."""
DOOR_MAX_S = 30.0
"""The threads of the lease socket turn each second."""
PULSE_S = 10.0
"""Between two looks at what has to move, where no service manager waits for a sign of life."""
PROBE_S = 1.0
CONNECTIONS_MIN, CONNECTIONS_MAX = 32, 1024
"""Over gRPC, of one address: a client has one, and two while it reconnects."""
DESCRIPTORS_KEPT = 512
"""For the lease socket's 256 clients, segments, the index and records on disk."""
Origins = Mapping[str, str]
"""By setting, where its value is from."""
NO_ORIGINS: Origins = MappingProxyType({})
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SERVICES = ("", "kvstored.v1.Cache", "kvstored.v1.Admin")

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_NBYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_NBYTES),
    # A token, a W3C traceparent and its baggage: each of thousands of calls that come to nothing may hold as much.
    ("grpc.max_metadata_size", METADATA_MAX_NBYTES),
    ("grpc.absolute_max_metadata_size", METADATA_MAX_NBYTES),
    ("grpc.max_concurrent_streams", 128),
    # For the preface of HTTP/2 too; by default a connection that says nothing stays for two minutes.
    ("grpc.server_handshake_timeout_ms", 5_000),
    # A window that grows to the line's speed holds megabytes for each of hundreds of streams, which no budget counts; a
    # message that is being read widens it as far as it needs.
    ("grpc.http2.bdp_probe", 0),
    # On by default: a second daemon would bind the same TCP port without an error.
    ("grpc.so_reuseport", 0),
    # Keepalive alone noticed a stopped peer after 61 s, with the ping timeout after 3 (its default is 60 s).
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients ping every 3 s; a lower bound above that would answer them with too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_500),
)


def serve(settings: Settings, source: Source | None = None, origins: Origins = NO_ORIGINS) -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns the exit code. Raises ConfigError if it cannot start.

    source: where SIGHUP reads the settings again. origins: where each is from.
    """
    tune()
    _say_if_no_kernel()
    locks: list[DirectoryLock] = []
    try:
        data_dir = settings.server.data_dir
        locks.append(DirectoryLock(Path(data_dir) / "daemon.lock", data_dir))
        for target in settings.server.targets:
            path = socket_path(target)
            if path is not None:
                locks.append(DirectoryLock(path.with_name(path.name + ".lock"), str(path)))
        return asyncio.run(_serve(settings, source, origins))
    finally:
        # Otherwise one more signal during the stop would end the process with that signal's exit status.
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for lock in reversed(locks):
            lock.release()


def _say_if_no_kernel() -> None:
    """Of a kernel with another ABI `kvstore.kernels.cpu` has already said so."""
    if installed()[0] is None:
        logger.warning(
            "no codec kernel effect=NF4 costs about 35 times the CPU, in plain torch "
            "do=pip install kvstored-kernel==%s, or in a clone: make kernel", own_version(),
        )  # fmt: skip


async def _serve(settings: Settings, source: Source | None, origins: Origins) -> int:
    stop = _stop_signals()
    loop = asyncio.get_running_loop()
    # After a power cut opening verifies and rebuilds, for minutes if the index is large: more than the default of 90 s.
    notify(f"EXTEND_TIMEOUT_USEC={OPEN_TIMEOUT_S * 1_000_000}\nSTATUS=opening the cold tier")
    arena = Arena(arena_limit_nbytes(settings.store))
    tenants = _tenants(settings)
    store = await loop.run_in_executor(None, partial(Store.open, settings.store, room=arena.empty, tenants=tenants))
    try:
        daemon = Daemon(store, settings.server, arena, source=source, origins=origins)
        await daemon.start()
        _on_reload(daemon)
        pulse = asyncio.create_task(_pulse(store, daemon))
        settle()
        _say_what_serves(settings)
        notify("READY=1\nSTATUS=serving")
        await stop.wait()
        logger.info("stopping signal=received")
        notify("STOPPING=1\nSTATUS=draining to disk")
        pulse.cancel()
        await daemon.stop()
    finally:
        await loop.run_in_executor(None, store.close)
    logger.info("stopped")
    return 0


def _say_what_serves(settings: Settings) -> None:
    """One line of what an operator asks first: version, where the data lies, budgets, how long entries stay."""
    store, server = settings.store, settings.server
    cold_nbytes = store.cold.capacity_nbytes if store.cold.path is not None else 0
    logger.info(
        "serving version=%s data_dir=%s hot_nbytes=%d warm_nbytes=%d cold_nbytes=%d ttl_s=%g policy=%s kernel=%s "
        "metrics=%s tokens=%s",
        own_version(), server.data_dir, store.hot.capacity_nbytes, store.warm.capacity_nbytes, cold_nbytes,
        store.ttl_s, store.policy, "compiled" if kernels() else "none", server.metrics_address or "none",
        server.tokens or "none",
    )  # fmt: skip


def _stop_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets. Later signals change nothing: the drain is running."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def request_stop(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the stop is complete
            loop.call_soon_threadsafe(stop.set)

    # Not loop.add_signal_handler: closing the loop would restore the default action while the process still ends.
    for number in STOP_SIGNALS:
        signal.signal(number, request_stop)
    return stop


def _on_reload(daemon: "Daemon") -> None:
    """SIGHUP, systemd's reload: read tokens and settings again. Changed certificates are read without a signal."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        daemon.reload()
        await loop.run_in_executor(None, daemon.reread)  # a smaller budget moves what no longer fits
        notify("READY=1")

    def begin() -> None:
        task = loop.create_task(reload())
        running.add(task)
        task.add_done_callback(running.discard)

    def request_reload(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the daemon is stopping
            loop.call_soon_threadsafe(begin)

    signal.signal(signal.SIGHUP, request_reload)


async def _pulse(store: Store, daemon: "Daemon") -> None:
    """WATCHDOG=1 as long as all that serves moves: the event loop, the store's locks, its background thread, the doors.

    Without a service manager the log says what does not.
    """
    interval_s = watchdog_interval_s() or PULSE_S
    while True:
        await asyncio.get_running_loop().run_in_executor(None, store.stats)
        age_s = store.heartbeat_age_s()
        stuck = [] if age_s < HEARTBEAT_MAX_S else [f"the background thread has not turned for {age_s:.0f} s"]
        stuck += await asyncio.get_running_loop().run_in_executor(None, daemon.closed_doors)
        if stuck:
            logger.error("watchdog not fed: %s", "; ".join(stuck))
        else:
            notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


class Daemon:
    """The gRPC servers around an open store.

    Each address has a server of its own: gRPC hands over calls in the order in which they came, so those of strangers
    on the network would keep the unix socket's waiting.
    """

    def __init__(
        self,
        store: Store,
        settings: ServerSettings,
        arena: Arena | None = None,
        spans: Spans | None = None,
        source: Source | None = None,
        origins: Origins = NO_ORIGINS,
    ) -> None:
        self._spans = spans or open_spans(settings.traces_endpoint, own_version())
        self._settings = settings
        self._arena = Arena(arena_limit_nbytes(store.config)) if arena is None else arena
        self._own_arena = arena is None
        self._encoded = Arena(encoded_limit_nbytes(store.config), numbers=self._arena.numbers)
        store.share_encoded(self._encoded)
        self._shares = Shares()
        self._arena.register = store.serve_from_device()
        self._threads = FairThreads(settings.threads, "kvstored-store")
        self.watch = Sampler(store, settings, own_version(), self._arena, self._encoded)
        self._access = Access(_tokens(settings), token_on_unix=settings.token_on_unix)
        records = Records(self.watch.meter, self._spans)
        self._admission = Admission(settings.calls_max, self.watch.meter.turn_away)
        self._interceptor = Interceptor(
            self._access, self.watch.meter, records, self._admission, settings.silence_s, self._shares
        )
        # Not maximum_concurrent_rpcs: gRPC counts a call before anybody knows whose it is.
        connections = connections_max(raise_descriptor_limit(), len(settings.listeners))
        self._options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", connections))
        self._servers: list[grpc.aio.Server] = []
        self._health = health.aio.HealthServicer()
        epoch = secrets.randbits(63) | 1
        views = TenantViews(store, tenants_secret(settings.data_dir, store.config.shared))
        self._shared = Shared(
            store,
            self._arena,
            self._encoded,
            self.watch.budget,
            Lending(Budget(settings.in_flight_nbytes)),
            Verbs(store, epoch),
            settings.lease_max_s,
            records,
            views,
            self._access,
            SegmentOwners(),
            threading.Semaphore(settings.threads),
            self._shares,
        )
        self._leases: list[LeaseServer] = []
        self._bound: list[str] = []
        self.watch.sources += (
            lambda: self._arena.gauges(self._encoded),
            self._shared.gauges,
            lambda: {"calls_waiting": self._threads.waiting, "calls_delayed": self._shares.delayed},
        )
        self._events = open_events(store, settings)
        self.watch.sources += () if self._events is None else (self._events.gauges,)
        own = Settings(settings, store.config)
        self.live = LiveSettings(own, self._apply, source.read if source else lambda: (own, {}), origins)
        self._handlers, self._close_services = self._services(views, epoch)

    def _services(
        self, views: TenantViews, epoch: int
    ) -> tuple[tuple[grpc.GenericRpcHandler, ...], Callable[[], None]]:
        """The handlers of both services, and what ends the threads of theirs. It blocks."""
        cache = CacheService(
            views,
            self._threads,
            epoch,
            self.watch.budget,
            self._settings.silence_s,
            self.watch.meter,
            self._arena.empty,
            self._shares,
        )
        admin = AdminService(views, self._threads, epoch, own_version(), self.watch.admin_stats, self.live)
        return (cache.handler(), admin.handler()), cache.close

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError if an address cannot be bound."""
        for target, tls in self._settings.listeners:
            with _socket_mode(socket_path(target)):
                try:
                    port = self._bind(target, tls=tls)
                except RuntimeError:
                    # gRPC's own message says only to set a debug variable.
                    raise ConfigError(
                        f"cannot listen on {target}: {why_not_bound(target)}; choose another server.address"
                    ) from None
                self._start_leases(socket_path(target))
            self._bound.append(target if socket_path(target) else f"{target.rpartition(':')[0]}:{port}")
            kind = "tls" if tls else "tcp"
            shown = target if socket_path(target) else f"{kind}:{target.rpartition(':')[0]}:{port}"
            logger.info("listening address=%s", shown)
        await asyncio.gather(*(server.start() for server in self._servers))
        self.watch.start()
        if self._events is not None:
            self._events.start()
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _bind(self, target: str, *, tls: bool) -> int:
        s = self._settings
        server = grpc.aio.server(interceptors=[self._interceptor], options=self._options)
        server.add_generic_rpc_handlers(self._handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._servers.append(server)
        if not tls:
            return server.add_insecure_port(target)
        return server.add_secure_port(target, Certificates(s.tls_certificate, s.tls_key, s.tls_client_ca).credentials())

    def reload(self) -> None:
        """Read the tokens again. A wrong file changes nothing: the tokens read before stay valid."""
        try:
            self._access.tokens = _tokens(self._settings)
        except ConfigError as error:
            logger.error("reload failed error=%s effect=%s", error, "the tokens read before stay in force")
        else:
            logger.info("reloaded tokens=%d", len(self._access.tokens.by_digest) if self._access.tokens else 0)
            self._shared.owners.recheck(self._access.of_user)
            for leases in self._leases:
                leases.recheck()
            self._interceptor.recheck()

    def reread(self) -> None:
        """Take the settings of the file and the environment as they are now; those that need a restart are named."""
        try:
            changed = self.live.reread()
        except ConfigError as error:
            logger.error("reload failed error=%s effect=%s", error, "the settings read before stay in force")
            return
        if changed.restart:
            logger.warning(
                "settings changed that need a restart names=%s effect=%s",
                ",".join(changed.restart), "those read at the start stay in force",
            )  # fmt: skip

    def _apply(self, settings: Settings) -> None:
        """Make the live settings of these take effect."""
        logging.getLogger().setLevel(settings.server.log_level.upper())
        self.watch.settings = settings.server
        self._arena.limit_nbytes = max(self._arena.limit_nbytes, arena_limit_nbytes(settings.store))
        self._shared.store.reconfigure(settings.store)
        self._arena.limit_nbytes = arena_limit_nbytes(settings.store)
        self._encoded.limit_nbytes = encoded_limit_nbytes(settings.store)

    def closed_doors(self) -> list[str]:
        """Which addresses take no clients any more, in words. Blocks for a moment."""
        closed = [f"nobody accepts at {target}" for target in self._bound if not accepts(target)]
        old = [age_s for leases in self._leases if (age_s := leases.age_s()) >= DOOR_MAX_S]
        return closed + [f"the lease socket has not turned for {age_s:.0f} s" for age_s in old]

    async def stop(self) -> None:
        """Refuse new calls, let running ones end, remove the sockets."""
        self.watch.stop()
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(self._settings.drain_grace_s) for server in self._servers))
        loop = asyncio.get_running_loop()
        for leases in self._leases:
            await loop.run_in_executor(None, leases.stop)
        self._threads.shutdown()
        ends = [self._close_services, self._spans.close, *([] if self._events is None else [self._events.close])]
        for end in (*ends, self._encoded.close, *([self._arena.close] if self._own_arena else [])):
            await loop.run_in_executor(None, end)
        for target in self._settings.targets:
            path = socket_path(target)
            if path is not None:
                with suppress(FileNotFoundError):
                    path.unlink()

    def _start_leases(self, path: Path | None) -> None:
        # The lease socket knows users, not tokens: with a tokens file it serves only users with an entry there.
        tokens = self._access.tokens
        if path is not None and (tokens is None or tokens.by_uid):
            self._leases.append(LeaseServer(lease_path(path), self._shared))
            self._leases[-1].start()


def connections_max(descriptors: int, listeners: int) -> int:
    """How many connections each address takes: together half of the descriptors that are not the daemon's own."""
    return max(CONNECTIONS_MIN, min(CONNECTIONS_MAX, (descriptors - DESCRIPTORS_KEPT) // (2 * max(listeners, 1))))


def _tenants(settings: Settings) -> dict[str, tuple[bytes, bytes]]:
    """The tenants that may call, with their prefixes: the store needs them at its start to assign their records."""
    tokens = _tokens(settings.server)
    if tokens is None or not tokens.tenants:
        return {}
    secret = tenants_secret(settings.server.data_dir, settings.store.shared)
    return {tenant: tenant_prefixes(secret, tenant) for tenant in sorted(tokens.tenants)}


def _tokens(settings: ServerSettings) -> Tokens | None:
    return read_tokens(settings.tokens) if settings.tokens else None


def why_not_bound(target: str) -> str:
    """The system's reason why an address, in gRPC's spelling, cannot be bound."""
    path = socket_path(target)
    host, _, port = target.rpartition(":")
    try:
        if path is not None:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(str(path))
            path.unlink()
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return "refused without a reason"


def accepts(target: str) -> bool:
    """Whether somebody accepts connections at an address, in gRPC's spelling. True where that cannot be told."""
    path = socket_path(target)
    host, _, port = target.rpartition(":")
    try:
        if path is not None:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(PROBE_S)
                probe.connect(str(path))
        else:
            anywhere = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}  # noqa: S104 - where to look, not where to listen
            socket.create_connection((anywhere.get(host, host.strip("[]")), int(port)), PROBE_S).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:  # out of descriptors, a full queue: others are served
        return True
    return True


@contextmanager
def _socket_mode(path: Path | None) -> Iterator[None]:
    """Bind a unix socket with mode 0660, by the umask: a chmod after binding would leave it open for a moment."""
    if path is None:
        yield
        return
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    before = os.umask(0o117)
    try:
        yield
    finally:
        os.umask(before)


def own_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("kvstored")
    except PackageNotFoundError:
        return "unknown"
