"""What a prefix costs, counted by a real server: each exchange with it begins and ends with a PING (`link`)."""

from collections.abc import Callable

import pytest

from kvstore.clock import SystemClock
from kvstore.shared.open import open_engine
from tests.kvstore.shared.conftest import Hosts, prefix

from .servers import Servers


@pytest.fixture
def trips_of(hosts: Hosts, standalone: Servers) -> Callable[[Callable[[], object]], float]:
    """How many exchanges a call has with the server."""
    standalone.flush()
    client = standalone.client(standalone.ports[0])

    def trips(call: Callable[[], object]) -> float:
        client.config_resetstat()
        call()
        return client.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] / 2

    return trips


@pytest.fixture
def real(hosts: Hosts, standalone: Servers) -> Callable[..., object]:
    """A store over the server, which has read the table of epochs: the background does that."""

    def store():
        made = hosts.open(engine=lambda _: open_engine(hosts.config(url=standalone.url), SystemClock()))
        made.maintain()
        return made

    return store


def test_publishing_takes_two_round_trips_a_hit_two_a_miss_one_and_a_local_hit_none(hosts, real, trips_of):
    a, b = real(), real()
    tokens, k, v = prefix(16)
    hosts.namespace(a).put_prefix(tokens, k, v)
    assert trips_of(a.maintain) == 2
    ns = hosts.namespace(b)
    assert trips_of(lambda: ns.get_prefix(prefix(16, seed=5)[0])) == 1
    assert trips_of(lambda: ns.get_prefix(tokens)) == 2
    assert b.stats().values["shared_hits"] == 16
    assert trips_of(lambda: ns.get_prefix(tokens)) == 0


def test_a_deletion_takes_one_round_trip(hosts, real, trips_of):
    a = real()
    tokens, k, v = prefix(16)
    space = hosts.namespace(a)
    space.put_prefix(tokens, k, v)
    a.maintain()
    a.delete(*space.keys(tokens))
    assert trips_of(a.maintain) == 1
