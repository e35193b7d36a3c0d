"""Which server has which slots, asked by redis-py: its connections, AUTH and TLS. Only the keeper and `health` ask.

These calls wait up to their timeout at each step; nothing that a get waits for goes through here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.shared.addresses import Address
from kvstore.shared.link import Login
from kvstore.shared.nodes import SLOTS, Shard, Topology


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. ca: of whom to trust; "": the system's. cert, key: who we are, where the server asks."""

    ca: str = ""
    cert: str = ""
    key: str = ""


class Unfit(Exception):
    """A server answers and is not one to use."""


@contextmanager
def asking(address: Address, login: Login, tls: TlsFiles, timeout_s: float) -> Iterator["redis.Redis"]:
    """A client of one server, that tries once."""
    options: dict[str, Any] = {}
    if login.context is not None:
        options = {
            "ssl": True,
            "ssl_ca_certs": tls.ca or None,
            "ssl_certfile": tls.cert or None,
            "ssl_keyfile": tls.key or None,
            "ssl_check_hostname": True,
        }
    client = redis.Redis(
        address.host, address.port, username=login.user or None, password=login.password or None, protocol=2,
        socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0),
        **options,
    )  # fmt: skip
    try:
        yield client
    finally:
        with suppress(redis.RedisError, OSError):
            client.close()


def learn(client: "redis.Redis", address: Address) -> Topology:
    """What one server knows of all. Raises redis.RedisError and OSError, Unfit for a replica without its primary."""
    try:
        slots: Any = client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call] # redis has none
    except redis.ResponseError as error:
        if isinstance(error, redis.exceptions.NoPermissionError) or "cluster" not in str(error).lower():
            raise
        return _standalone(client, address)
    return Topology(tuple(sorted(_shards(slots, address), key=lambda shard: shard.first)), cluster=True)


def _shards(slots: Any, asked: Address) -> Iterator[Shard]:
    for first, last, *servers in slots:
        found = [_address(server, asked) for server in servers]
        if found and found[0] is not None and 0 <= first <= last < SLOTS:
            yield Shard(first, last, found[0], tuple(one for one in found[1:] if one is not None))


def _address(server: Any, asked: Address) -> Address | None:
    host = server[0].decode() if isinstance(server[0], bytes) else (server[0] or "")
    return None if host == "?" else Address(host or asked.host, int(server[1]))


def _standalone(client: "redis.Redis", address: Address) -> Topology:
    """A server without a Cluster and its replicas. Asked of a replica it is the primary's that it names."""
    try:
        told: Any = client.info("replication")
    except redis.exceptions.NoPermissionError:
        return Topology((Shard(0, SLOTS - 1, address),), cluster=False)
    if told.get("role") != "master":
        if told.get("master_link_status") != "up":
            raise Unfit(f"{address} is a replica, and its primary {told.get('master_host')} does not answer it")
        primary = Address(str(told["master_host"]), int(told["master_port"]))
        return Topology((Shard(0, SLOTS - 1, primary, (address,)),), cluster=False)
    servers = [value for name, value in sorted(told.items()) if name.startswith("slave") and isinstance(value, dict)]
    replicas = [Address(str(one["ip"]), int(one["port"])) for one in servers if one.get("state") == "online"]
    return Topology((Shard(0, SLOTS - 1, address, tuple(replicas)),), cluster=False)
