"""A prefix computed on one host is a hit on another: what it costs, and what it looks like there."""

import torch

from kvstore.hit import Held
from tests.kvstore.shared.conftest import CHUNK, prefix


def test_a_prefix_put_on_one_host_is_a_hit_on_another_as_the_first_would_decode_it(hosts):
    a, b = hosts.published(16), hosts.open()
    tokens, _, _ = prefix(16)
    n, k, v = hosts.namespace(b).get_prefix([*tokens, 7])
    a.demote(*hosts.namespace(a).keys(tokens))
    _, own_k, own_v = hosts.namespace(a).get_prefix(tokens)
    assert n == 16 * CHUNK
    assert torch.equal(k, own_k)
    assert torch.equal(v, own_v)
    info = b.inspect(hosts.namespace(b).keys(tokens)[3])
    assert (info.tiers, info.lossy, info.encoding) == (("warm",), True, "nf4")
    assert info.namespace == hosts.namespace(b).name


def test_a_local_hit_costs_no_round_trip_a_miss_one_and_a_hit_two(hosts):
    hosts.published(16)
    b = hosts.open()
    b.maintain()  # the table of epochs, which the background reads
    ns, (tokens, _, _) = hosts.namespace(b), prefix(16)
    assert hosts.trips_of(lambda: ns.get_prefix(prefix(16, seed=5)[0])) == 1
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 2
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 0


def test_publishing_a_prefix_takes_two_round_trips(hosts):
    a = hosts.open()
    a.maintain()
    hosts.namespace(a).put_prefix(*prefix(16))
    assert hosts.trips_of(a.maintain) == 2
    assert len(hosts.server.names()) == 16
    assert hosts.trips_of(a.maintain) == 0


def test_a_match_says_what_only_the_shared_store_has_and_a_get_brings_it(hosts):
    hosts.published(6)
    b = hosts.open()
    b.maintain()
    tokens, k, v = prefix(6)
    ns = hosts.namespace(b)
    ns.put_prefix(tokens[: 2 * CHUNK], k[:, : 2 * CHUNK], v[:, : 2 * CHUNK])
    keys = ns.keys(tokens)
    before = hosts.server.total()
    match = b.match(keys)
    assert [held.tier for held in match.held] == ["hot"] * 2 + ["shared"] * 4
    assert match.held[2] == Held("shared", match.held[0].nbytes)
    assert hosts.server.total() - before == 1
    assert b.locate(keys)[2:] == [None] * 4
    assert all(b.get_many(keys))  # not leading: an engine's worker gets what its scheduler matched
    assert hosts.server.total() - before == 2
    assert b.stats().values["shared_hits"] == 4
