"""Where a shared store is: what `store.shared.url` says. Pure, but for `resolve`."""

import difflib
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from kvstore.errors import ConfigError

WHAT = "store.shared.url"
PORT = 6379
SCHEMES = {"valkey": False, "valkeys": True, "redis": False, "rediss": True}
"""Whether each means TLS."""
S3_OPTIONS = ("endpoint", "region", "path_style")
_NODES_MAX = 64

Place: TypeAlias = tuple[int, tuple[str, int]]
"""An address family and a socket address."""


class Address(NamedTuple):
    """A server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ValkeyUrl:
    """Some servers of a standalone store or of a Cluster; the others are learned from them."""

    seeds: tuple[Address, ...]
    tls: bool


@dataclass(frozen=True, slots=True)
class S3Url:
    """A bucket. endpoint: "" is AWS. path_style: the bucket in the path, not in the host's name."""

    bucket: str
    prefix: str
    endpoint: str = ""
    region: str = ""
    path_style: bool = True


def parse_url(url: str) -> ValkeyUrl | S3Url:
    """What a url means. Raises ConfigError, which shows no part of it that may be a secret."""
    scheme, colon, rest = url.partition("://")
    if not colon or (scheme not in SCHEMES and scheme != "s3"):
        known = ", ".join(f"{name}://" for name in (*SCHEMES, "s3"))
        raise ConfigError(f"{WHAT} must begin with one of {known}, got {scheme[:20]!r}")
    where, mark, query = rest.partition("?")
    if "@" in where or re.search(r"pass|secret|token|key", query, re.IGNORECASE):
        raise ConfigError(f"{WHAT} has a user, a password or a key in it: write them to store.shared.credentials_file")
    if scheme == "s3":
        return _parse_s3(where, query)
    if mark or "#" in where:
        raise ConfigError(f"{WHAT}: {scheme}:// takes no options, got {mark}{query[:40]}")
    hosts, _, path = where.partition("/")
    if path not in ("", "0"):
        raise ConfigError(f"{WHAT}: only database 0 is supported, as in a Cluster, got /{path[:20]}")
    seeds = tuple(_parse_address(text) for text in hosts.split(","))
    if len(seeds) > _NODES_MAX:
        raise ConfigError(
            f"{WHAT} names {len(seeds)} servers, at most {_NODES_MAX}: some are enough, the rest is learned"
        )
    return ValkeyUrl(seeds, SCHEMES[scheme])


def _parse_address(text: str) -> Address:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::(\d{1,5}))?", text.strip())
    if match is None:
        raise ConfigError(f"{WHAT}: a server is HOST:PORT or [IPv6]:PORT, got {text[:80]!r}")
    port = int(match[3] or PORT)
    if not 1 <= port <= 65535:
        raise ConfigError(f"{WHAT}: a port is from 1 to 65535, got {port}")
    return Address(match[1] or match[2], port)


def _parse_s3(where: str, query: str) -> S3Url:
    bucket, _, prefix = where.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise ConfigError(f"{WHAT}: a bucket's name is 3 to 63 of a-z, 0-9, '.' and '-', got {bucket[:80]!r}")
    prefix = prefix.strip("/")
    if prefix and (not re.fullmatch(r"[A-Za-z0-9._/-]{1,200}", prefix) or {"", ".", ".."} & {*prefix.split("/")}):
        raise ConfigError(f"{WHAT}: a prefix is up to 200 of A-Z, a-z, 0-9, '.', '_', '-' and '/', got {prefix[:80]!r}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in S3_OPTIONS:
            close = difflib.get_close_matches(name, S3_OPTIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(S3_OPTIONS)}"
            raise ConfigError(f"{WHAT}: unknown option {name[:40]!r}; {hint}")
    endpoint = options.get("endpoint", "")
    if endpoint:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"{WHAT}: endpoint is http://HOST:PORT or https://HOST:PORT, got {endpoint[:80]!r}")
    style = options.get("path_style", "true")
    if style not in ("true", "false"):
        raise ConfigError(f"{WHAT}: path_style is true or false, got {style[:20]!r}")
    return S3Url(bucket, prefix, endpoint, options.get("region", ""), style == "true")


def resolve(address: Address, *, numeric: bool = False) -> Place:
    """The first socket address of a server. Raises OSError. May wait for a name server, unless numeric."""
    flags = socket.AI_NUMERICHOST if numeric else 0
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    family, _, _, _, place = found[0]
    return int(family), (str(place[0]), int(place[1]))


def is_loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
