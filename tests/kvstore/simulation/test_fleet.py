"""A fleet over a shared store: figures that a separate program found for the same hosts, and what each option does."""

from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.simulation.fleet import Fleet, FleetReport, Router, SizedShared, simulate_fleet
from kvstore.simulation.simulator import Layout, Setup, block_nbytes, simulate
from kvstore.simulation.trace import Request, read_trace

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation.jsonl.xz"
SMALL = Layout(1, 1, 64)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return read_trace(TRACE, 400)


def setup(blocks: int) -> Setup:
    """Hosts with room for so many blocks in NF4, none as put, no disk."""
    one = Setup(1, hot_fraction=0.0, layout=SMALL)
    return Setup(blocks * block_nbytes(one), hot_fraction=0.0, layout=SMALL)


def fleet(requests: list[Request], blocks: int = 1000, **how: object) -> FleetReport:
    return simulate_fleet(requests, Fleet(setup(blocks), **how))  # type: ignore[arg-type]


@pytest.mark.slow
def test_four_hosts_hit_what_a_separate_program_found():
    """First 3,000 requests, 80,619 references, 1,000 blocks a host, random routing: 4.65 % alone, 31.42 % shared."""
    asked = read_trace(TRACE, 3000)
    assert fleet(asked, hosts=4).total.hits == pytest.approx(3747, abs=8)
    assert 100 * fleet(asked, hosts=4, shared_blocks=None).hit_ratio >= 31.0
    assert 100 * fleet(asked, hosts=4, shared_blocks=20_000).hit_ratio >= 27.0


def test_one_host_without_a_shared_store_is_the_simulation_of_one_store(requests):
    assert fleet(requests, hosts=1).total.hits == simulate(requests, setup(1000)).hits


def test_what_one_host_puts_is_a_hit_on_all_of_its_cell(requests):
    most = simulate(requests, setup(1 << 20)).hits
    shared = fleet(requests, hosts=4, shared_blocks=None, publish_delay_s=0.0)
    assert shared.total.hits == most
    assert shared.shared_hits > 0.5 * most
    alone = fleet(requests, hosts=4)
    assert alone.total.hits < 0.5 * most
    assert (alone.shared_lookups, alone.shared_bytes_per_request) == (0, 0.0)
    cells = fleet(requests, hosts=4, cells=4, shared_blocks=None)
    assert alone.total.hits < cells.total.hits < most


def test_conversations_hashed_to_a_cell_find_what_their_cell_has(requests):
    by_hash = fleet(requests, hosts=4, cells=4, shared_blocks=None, routing="conversation")
    at_random = fleet(requests, hosts=4, cells=4, shared_blocks=None)
    assert by_hash.total.hits > 1.5 * at_random.total.hits


def test_a_router_that_knows_prefixes_needs_the_store_less(requests):
    shared = fleet(requests, blocks=4000, hosts=4, shared_blocks=None, routing="prefix")
    at_random = fleet(requests, blocks=4000, hosts=4, shared_blocks=None)
    assert shared.shared_bytes_per_request < 0.5 * at_random.shared_bytes_per_request
    assert fleet(requests, blocks=4000, hosts=4, routing="prefix").total.hits > 2 * fleet(requests, hosts=4).total.hits
    assert shared.load_max < 2.0


def test_publishing_what_is_evicted_or_reused_brings_less_than_publishing_what_is_put(requests):
    by = {
        publish: fleet(requests, blocks=2000, hosts=4, shared_blocks=None, publish=publish)
        for publish in ("put", "evict", "reused")
    }
    assert by["put"].total.hits > 2 * by["evict"].total.hits
    assert by["put"].total.hits > by["reused"].total.hits
    assert by["put"].shared_published > 5 * by["reused"].shared_published > 0


def test_a_later_publication_brings_less(requests):
    hits = [fleet(requests, hosts=4, shared_blocks=None, publish_delay_s=s).total.hits for s in (0.0, 30.0, 90.0)]
    assert hits == sorted(hits, reverse=True)
    assert hits[2] < 0.9 * hits[0]


def test_a_replaced_host_is_empty_and_the_shared_store_fills_it_again(requests):
    span_s = requests[-1].at_s
    kept, lost = (fleet(requests, blocks=1 << 20, churn_s=s) for s in (0.0, span_s / 4))
    assert lost.replaced == 4
    assert lost.total.hits < kept.total.hits
    assert lost.total.requests == kept.total.requests == 400
    warm = fleet(requests, blocks=1 << 20, churn_s=span_s / 4, shared_blocks=None, publish_delay_s=0.0)
    assert warm.total.hits == kept.total.hits


def test_the_same_seed_gives_the_same_fleet_and_another_one_another(requests):
    some = requests[:200]
    first, again, other = (fleet(some, hosts=4, shared_blocks=500, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_store_keeps_what_was_used_last_until_its_lifetime_ends():
    store = SizedShared(2, ttl_s=10.0, delay_s=1.0)
    a, b, c = b"a", b"b", b"c"
    assert store.put(a, 0.0) and store.put(b, 0.0) and not store.put(a, 0.5)
    assert store.leading([a, b], 0.5) == 0
    assert store.leading([a], 1.0) == 1
    store.put(c, 1.0)  # in the place of b, which was not used
    assert (store.leading([a], 5.0), store.leading([b], 5.0), store.leading([c], 5.0)) == (1, 0, 1)
    assert store.leading([a], 11.0) == 0


def test_a_request_of_no_blocks_is_routed_by_every_rule():
    for routing in ("random", "prefix", "conversation"):
        router = Router(Fleet(setup(10), hosts=4, routing=routing))
        assert 0 <= router.host(Request(0.0, ())) < 4


@pytest.mark.parametrize("wrong", [
    {"hosts": 0}, {"hosts": 4, "cells": 3}, {"hosts": 4, "cells": 8}, {"shared_blocks": -1}, {"publish_delay_s": -1},
    {"hosts": 4, "cells": 4, "shared_blocks": 3}, {"routing": "sticky"}, {"publish": "never"}, {"churn_s": -1},
])  # fmt: skip
def test_a_fleet_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        Fleet(setup(10), **wrong)
