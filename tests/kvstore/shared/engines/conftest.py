"""Engines over real servers, one of each kind for the tests of one process."""

from collections.abc import Callable, Iterator

import pytest

from kvstore.clock import SystemClock
from kvstore.shared import s3
from kvstore.shared.addresses import S3Url, parse_url
from kvstore.shared.guarded import Guarded
from kvstore.shared.link import Login
from kvstore.shared.valkey import Valkey

from .plain import Plain
from .servers import S3Server, Servers

KINDS = ("plain", "valkey", "cluster", "s3")
BUCKET = "kvstored-tests"


def valkey_of(servers: Servers, **options) -> Valkey:
    return Valkey(parse_url(servers.url).seeds, Login(), SystemClock(), **options)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Begun, not waited for."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def standalone(s3_server) -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def cluster(s3_server) -> Iterator[Servers]:
    servers = Servers(6, cluster=True)
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def _engines(request) -> Iterator[Callable[[str], Guarded]]:
    made: dict[str, Guarded] = {}

    def engine(kind: str) -> Guarded:
        if kind not in made:
            clock = SystemClock()
            if kind == "plain":
                made[kind] = Guarded(Plain(), clock)
            elif kind == "s3":
                server = request.getfixturevalue("s3_server")
                server.wait_for(BUCKET)
                url = S3Url(BUCKET, "tests/of", server.endpoint, "us-east-1")
                made[kind] = Guarded(s3.S3(s3.connect(url, server.credentials), url), clock)
            else:
                inner = valkey_of(request.getfixturevalue("standalone" if kind == "valkey" else "cluster"))
                made[kind] = Guarded(inner, clock, state=inner.nodes.breaker, punctual=True)
        return made[kind]

    yield engine
    for each in made.values():
        each.close()


@pytest.fixture(params=KINDS)
def engine(request, _engines) -> Guarded:
    """Each kind, as `open_engine` gives it. Tests use names of their own."""
    return _engines(request.param)
