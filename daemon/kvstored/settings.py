"""The daemon's settings: defaults, then the TOML file, then `KVSTORED_*` in the environment, then the command line.

Read once, checked, frozen. The tables of the file are [server] (here) and [store] (`kvstore.config`). In the
environment two underscores stand for a dot: KVSTORED_STORE__HOT__CAPACITY_NBYTES=4GiB.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from kvstore.checks import check_range
from kvstore.config import MIB, StoreConfig, from_mapping, leaves, read_toml
from kvstore.errors import ConfigError
from kvstored_client.wire.address import listening_address, parse_address, socket_path, wants_tls

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "text", "json")

ENVIRONMENT_PREFIX = "KVSTORED_"
IPC, TCP = "ipc://", "tcp://"
IPC_PATH_MAX = 107
"""Bytes of a unix socket's path."""


@dataclass(frozen=True)
class ServerSettings:
    """The network side.

    address: one or more of unix:PATH, tcp:HOST:PORT and tls:HOST:PORT, separated by commas. data_dir: has the cold
    tier. tls_certificate, tls_key: PEM files for tls: addresses, read again when they change. tls_client_ca:
    only clients with a certificate of this authority may connect. tokens: the file of the callers, see
    `access.tokens`. token_on_unix: the unix socket asks for a token too. insecure_tcp: allow TCP without TLS or token.
    metrics_address: HOST:PORT on the loopback for /metrics and the status page; empty: none. insecure_metrics: allow
    one beyond the loopback. traces_endpoint: the URL for OpenTelemetry traces of calls (OTLP over HTTP); empty: none.
    events_endpoint: ipc://PATH or tcp://HOST:PORT on the loopback, where routers subscribe to the keys that come and
    leave (ZMQ, in vLLM's format); empty: none. events_replay_endpoint: where they ask for events again. events_topic:
    of all events. insecure_events: allow endpoints beyond the loopback.
    log_format: "text", "json", or "auto": JSON under systemd. log_level. pressure_percent: the share of time tasks may
    stall for memory before the hot tier shrinks; 0: never. in_flight_nbytes: decoded bytes of all entries being
    received, read or sent. silence_s: seconds that a stream may make no progress. calls_max: calls at once. threads:
    store operations at once. drain_grace_s: seconds for running calls to end after SIGTERM. lease_max_s: seconds that a
    client on this host may hold shared memory after one get.
    """

    address: str = ""
    data_dir: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tokens: str = ""
    token_on_unix: bool = False
    insecure_tcp: bool = False
    metrics_address: str = ""
    insecure_metrics: bool = False
    traces_endpoint: str = ""
    events_endpoint: str = ""
    events_replay_endpoint: str = ""
    events_topic: str = ""
    insecure_events: bool = False
    log_format: str = "auto"
    log_level: str = "info"
    pressure_percent: float = 10.0
    in_flight_nbytes: int = 1024 * MIB
    silence_s: float = 10.0
    calls_max: int = 256
    threads: int = 8
    drain_grace_s: float = 5.0
    lease_max_s: float = 60.0

    def __post_init__(self) -> None:
        check_range("server.in_flight_nbytes", self.in_flight_nbytes, MIB, 1 << 40)
        check_range("server.silence_s", self.silence_s, 0.05, 3600)
        check_range("server.calls_max", self.calls_max, 1, 100_000)
        check_range("server.threads", self.threads, 1, 256)
        check_range("server.drain_grace_s", self.drain_grace_s, 0, 3600)
        check_range("server.lease_max_s", self.lease_max_s, 0.1, 86400)
        check_range("server.pressure_percent", self.pressure_percent, 0, 100)
        _check_choice("server.log_format", self.log_format, FORMATS)
        _check_choice("server.log_level", self.log_level, LEVELS)
        if self.metrics_address:
            check_metrics_address(self.metrics_address, anywhere=self.insecure_metrics)
        if self.traces_endpoint and not self.traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                "server.traces_endpoint must be a URL such as http://127.0.0.1:4318/v1/traces, "
                f"got {self.traces_endpoint!r:.80}"
            )
        self._check_events()
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("server.tls_certificate and server.tls_key belong together: set both or neither")
        if self.token_on_unix and not self.tokens:
            raise ConfigError("server.token_on_unix needs server.tokens, a file of tokens")
        for target, tls in self.listeners:
            self._check_reach(target, tls=tls)

    def _check_events(self) -> None:
        for name in ("events_replay_endpoint", "events_topic"):
            if getattr(self, name) and not self.events_endpoint:
                raise ConfigError(f"server.{name} is set and server.events_endpoint is not")
        for name in ("events_endpoint", "events_replay_endpoint"):
            if getattr(self, name):
                check_events_endpoint(f"server.{name}", getattr(self, name), anywhere=self.insecure_events)

    @property
    def listeners(self) -> tuple[tuple[str, bool], ...]:
        """The addresses to bind, in gRPC's spelling, and whether each uses TLS."""
        parts = [part.strip() for part in self.address.split(",") if part.strip()]
        return tuple(zip(self.targets, map(wants_tls, parts), strict=True))

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses to bind, in gRPC's spelling."""
        try:
            return tuple(parse_address(part) for part in self.address.split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(f"server.address: {error}") from None

    def _check_reach(self, target: str, *, tls: bool) -> None:
        if tls and not self.tls_certificate:
            raise ConfigError(f"server.address: tls:{target} needs server.tls_certificate and server.tls_key")
        if socket_path(target) is not None or self.insecure_tcp:
            return
        if tls:
            if not (self.tokens or self.tls_client_ca):
                raise ConfigError(
                    f"server.address: anybody who reaches tls:{target} could read the cache; "
                    "set server.tokens or server.tls_client_ca, so that callers have to prove who they are"
                )
            return
        host = target.rpartition(":")[0].strip("[]")
        try:
            local = host == "localhost" or ip_address(host).is_loopback
        except ValueError:
            local = False
        if not local:
            raise ConfigError(
                f"server.address: {target} is reachable from other hosts without TLS; use tls:{target}, "
                "a loopback address or a unix socket, or set server.insecure_tcp = true if the network is trusted"
            )
        if not self.tokens:
            raise ConfigError(
                f"server.address: every user of this host could connect to {target}; set server.tokens, use a unix "
                "socket, whose permissions keep others out, or set server.insecure_tcp = true"
            )


@dataclass(frozen=True)
class Settings:
    """All settings of the daemon."""

    server: ServerSettings = field(default_factory=ServerSettings)
    store: StoreConfig = field(default_factory=StoreConfig)


@dataclass(frozen=True)
class Source:
    """Where a daemon has its settings from: a file, the environment, and options of its command line."""

    config: str | Path | None = None
    data_dir: str | None = None
    address: str | None = None

    def read(self) -> tuple["Settings", dict[str, str]]:
        """The settings as they are now, and the origin of each. Raises ConfigError."""
        table = read_toml(self.config) if self.config is not None else {}
        given = {"data_dir": self.data_dir, "address": self.address}
        settings = _settings(deepcopy(table), given, os.environ)
        return settings, origins(settings, table, str(self.config), given)


def load_settings(
    config: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    address: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings in force. Raises ConfigError for an unknown key, a wrong type or a value out of range."""
    table: dict[str, Any] = read_toml(config) if config is not None else {}
    return _settings(table, {"data_dir": data_dir, "address": address}, environ)


def _settings(table: dict[str, Any], given: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """The settings of a file's tables, which change. given: the server's that the command line has."""
    _overlay(table, environ)
    server = table.setdefault("server", {})
    if not isinstance(server, dict):
        raise ConfigError(f"server is a table of settings, got {server!r}")
    server |= {name: str(value) for name, value in given.items() if value is not None}
    server.setdefault("address", listening_address(environ))
    server.setdefault("data_dir", str(default_data_dir(environ)))
    settings = from_mapping(Settings, table)
    if not settings.server.targets:
        raise ConfigError("server.address names nothing to listen on")
    if settings.store.cold.path is None:
        cold = replace(settings.store.cold, path=str(Path(settings.server.data_dir) / "cold"))
        settings = replace(settings, store=replace(settings.store, cold=cold))
    return settings


def origins(
    settings: Settings,
    table: Mapping[str, Any],
    file: str,
    given: Mapping[str, object],
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Where each setting's value is from: "default", the file, a variable, or an option of the command line.

    table: what the file says. given: the options, by the server's setting ("address").
    """
    variables = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): name
        for name in environ
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name
    }
    default = dict(leaves(Settings()))
    found: dict[str, str] = {}
    for name, value in leaves(settings):
        if given.get(name.removeprefix("server.")) is not None:
            found[name] = "--" + name.removeprefix("server.").replace("_", "-")
        elif name in variables:
            found[name] = variables[name]
        elif _in_file(table, name):
            found[name] = file
        else:  # directories depend on the user and on the service manager
            found[name] = "default" if value == default[name] else "this host"
    return found


def _in_file(table: Mapping[str, Any], name: str) -> bool:
    at: Any = table
    for step in name.split("."):
        if not isinstance(at, Mapping) or step not in at:
            return False
        at = at[step]
    return True


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_metrics_address(text: str, *, anywhere: bool = False) -> tuple[str, int]:
    """(host, port) of "127.0.0.1:9411". Raises ConfigError for one that is not on the loopback, unless `anywhere`."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"server.metrics_address must be HOST:PORT such as 127.0.0.1:9411, got {text!r:.80}")
    try:
        local = ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        local = False
    if not local and not anywhere:
        raise ConfigError(
            f"server.metrics_address must be a loopback HOST:PORT such as 127.0.0.1:9411, got {text!r:.80}; to "
            "reach it from elsewhere put a proxy with a password in front, or set server.insecure_metrics = true if "
            "everybody who reaches it may read the numbers, tenants' and namespaces' names among them"
        )
    return host, int(port)


def check_events_endpoint(name: str, text: str, *, anywhere: bool = False) -> None:
    """Raise ConfigError unless it is ipc://PATH, or tcp://HOST:PORT on the loopback or, with `anywhere`, elsewhere."""
    if text.startswith(IPC + "/") and len(text.encode()) <= len(IPC) + IPC_PATH_MAX:
        return
    host, colon, port = text.removeprefix(TCP).rpartition(":")
    if not text.startswith(TCP) or not colon or not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigError(
            f"{name} must be {IPC}/PATH, of at most {IPC_PATH_MAX} bytes, or {TCP}HOST:PORT such as "
            f"{TCP}127.0.0.1:5557, got {text!r:.160}"
        )
    try:
        local = ip_address("127.0.0.1" if host == "localhost" else host.strip("[]")).is_loopback
    except ValueError:
        local = False
    if not local and not anywhere:
        raise ConfigError(
            f"{name} must be {IPC}/PATH or on the loopback, got {text!r:.80}: whoever reaches it learns all keys, and "
            "when they come and leave; set server.insecure_events = true if the network is trusted"
        )


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The service manager's choice, /var/lib for root, else the user's state directory."""
    given = environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/kvstored")
    state = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "kvstored"


def _overlay(table: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Lay KVSTORED_TABLE__KEY variables over the file's tables. Other KVSTORED_ variables are not settings."""
    for name, value in environ.items():
        path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if not name.startswith(ENVIRONMENT_PREFIX) or len(path) < 2:
            continue
        at = table
        for step in path[:-1]:
            at = at.setdefault(step, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{name}: {step} is a setting, not a table of settings")
        at[path[-1]] = value
