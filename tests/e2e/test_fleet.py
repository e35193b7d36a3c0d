"""`bench/shared.py --part fleet` in a small size: real daemons over a real Cluster hit what the simulation says."""

from collections import Counter

import pytest

from bench.shared_hosts import SEED, TRACE, replay
from kvstore.simulation.fleet import Fleet, simulate_fleet
from kvstore.simulation.simulator import Setup
from kvstore.simulation.trace import read_trace

pytestmark = pytest.mark.slow
HOSTS = 2
REQUESTS = 30


def test_two_daemons_over_a_cluster_hit_what_the_simulation_says_and_more_than_alone():
    trace = [request for request in read_trace(TRACE, 1500) if 2 <= len(request.blocks) <= 20]
    seen = Counter(request.blocks[1] for request in trace)
    asked_again = [request for request in trace if seen[request.blocks[1]] >= 3][:REQUESTS]
    room = '[store.hot]\ncapacity_nbytes = "16MiB"\n[store.warm]\ncapacity_nbytes = "16MiB"\n'
    row = replay(asked_again, room, "all", HOSTS)
    of = {"setup": Setup(1 << 40), "hosts": HOSTS, "seed": SEED, "publish_delay_s": 0.0}
    shared, alone = (simulate_fleet(asked_again, Fleet(**of, shared_blocks=blocks)) for blocks in (None, 0))
    assert row.params["wrong"] == 0
    assert row.params["hits"] == shared.total.hits > 1.2 * alone.total.hits
    assert row.params["from_shared"] == shared.shared_hits
