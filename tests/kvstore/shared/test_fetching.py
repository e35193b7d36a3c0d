"""What is asked for, how long a get waits for it, and what it gets when time runs out."""

import threading

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.lookup import Lookup
from tests.kvstore.shared.conftest import CHUNK, prefix


def values(store):
    return store.stats().values


def test_a_deadline_during_the_fetch_gives_the_chunks_that_came_and_the_rest_later(hosts):
    hosts.published(16)
    b = hosts.open(fetch_s=2.0)
    b.maintain()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(16)
    hosts.server.slow_after = 5
    began = hosts.clock.now()
    assert ns.get_prefix(tokens)[0] == 5 * CHUNK
    assert hosts.clock.now() - began == 2.0
    hosts.server.slow_after = None
    b.maintain()  # the background finishes
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 0
    assert ns.get_prefix(tokens)[0] == 16 * CHUNK


def test_a_store_that_hangs_costs_a_get_its_lookup_time_and_the_next_one_nothing(hosts):
    hosts.published(4)
    b = hosts.open(lookup_s=0.02)
    b.maintain()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    hosts.server.down = True
    began = hosts.clock.now()
    assert ns.get_prefix(tokens)[0] == 0
    assert hosts.clock.now() - began == pytest.approx(0.02)
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 0
    assert values(b)["shared_errors_timeout"] == 1
    hosts.server.down = False
    hosts.clock.advance(1.5)
    b.maintain()
    assert ns.get_prefix(tokens)[0] == 4 * CHUNK


def test_with_the_table_of_epochs_too_old_a_store_that_hangs_costs_no_more(hosts):
    hosts.published(4)
    b = hosts.open(lookup_s=0.02)
    b.maintain()
    hosts.clock.advance(60)
    hosts.server.down = True
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    began = hosts.clock.now()
    assert ns.get_prefix(tokens)[0] == 0
    assert hosts.clock.now() - began == pytest.approx(0.02)
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 0


def test_callers_that_wait_for_the_table_of_epochs_wait_no_longer_than_for_one_answer(hosts):
    """Not one after the other, each with a deadline of its own."""
    hosts.published(4)
    b = hosts.open(lookup_s=0.05)
    hosts.clock.advance(60)
    inside, release = threading.Event(), threading.Event()

    def hang(names):
        inside.set()
        release.wait(20)

    hosts.server.at["heads"] = hang
    first = threading.Thread(target=lambda: hosts.namespace(b).get_prefix(prefix(4)[0]))
    first.start()
    assert inside.wait(20)
    assert hosts.namespace(b).get_prefix(prefix(4, seed=1)[0])[0] == 0  # returns, though the first one hangs
    assert values(b)["shared_errors_epochs"] == 1
    release.set()
    first.join(20)


def test_a_caller_with_less_time_waits_no_longer_than_that(hosts):
    hosts.published(4)
    b = hosts.open(fetch_s=2.0)
    b.maintain()
    hosts.server.slow_after = 1
    began = hosts.clock.now()
    b.bring(hosts.namespace(b).keys(prefix(4)[0]), timeout_s=0.5)
    assert hosts.clock.now() - began <= 0.5


def test_an_absent_prefix_is_not_asked_for_again_for_a_second(hosts):
    b = hosts.open()
    b.maintain()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    assert hosts.trips_of(lambda: [ns.get_prefix(tokens) for _ in range(5)]) == 1
    hosts.clock.advance(1.1)
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 1
    assert values(b)["shared_lookups"] == values(b)["shared_futile"] == 2


def test_a_prefix_of_fewer_tokens_than_tokens_min_is_not_asked_for(hosts):
    hosts.published(8)
    b = hosts.open(tokens_min=4 * CHUNK)
    b.maintain()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(8)
    assert hosts.trips_of(lambda: ns.get_prefix(tokens[: 3 * CHUNK])) == 0
    assert hosts.trips_of(lambda: ns.get_prefix(tokens)) == 2
    other = [*prefix(3)[0][: 2 * CHUNK], *range(7000, 7000 + 6 * CHUNK)]
    c = hosts.open(tokens_min=4 * CHUNK)
    c.maintain()
    assert hosts.namespace(c).get_prefix(other)[0] == 0  # two chunks are there: too few to fetch
    assert values(c)["shared_hits"] == 0


def test_what_is_computed_faster_than_it_comes_is_not_fetched(hosts):
    hosts.published(4)
    hosts.published(4, seed=1)
    size = sum(len(data) for data, _ in hosts.server.objects.values()) / 8
    b = hosts.open(prefill_tokens_per_s=1000.0)  # a chunk in 4 ms
    b.maintain()
    hosts.server.bodies_per_s = size / 0.1  # and one comes in 100 ms
    ns = hosts.namespace(b)
    assert ns.get_prefix(prefix(4)[0])[0] == 4 * CHUNK  # nobody knows yet how slow it is
    assert hosts.trips_of(lambda: ns.get_prefix(prefix(4, seed=1)[0])) == 1
    assert ns.get_prefix(prefix(4, seed=1)[0])[0] == 0
    hosts.clock.advance(31)  # measured again
    assert ns.get_prefix(prefix(4, seed=1)[0])[0] == 4 * CHUNK


def test_an_object_that_is_lost_between_its_head_and_its_body_ends_the_hit_there(hosts):
    a = hosts.published(8)
    b = hosts.open()
    tokens, _, _ = prefix(8)
    names = [hosts.server.names()[i] for i in range(8)]
    hosts.server.lost = {names[3]}
    assert hosts.namespace(b).get_prefix(tokens)[0] == 3 * CHUNK
    assert values(a)["shared_corrupt"] == values(b)["shared_corrupt"] == 0


def test_a_host_that_holds_the_beginning_fetches_only_the_rest(hosts):
    hosts.published(16)
    c = hosts.open()
    c.maintain()
    ns, (tokens, k, v) = hosts.namespace(c), prefix(16)
    ns.put_prefix(tokens[: 4 * CHUNK], k[:, : 4 * CHUNK], v[:, : 4 * CHUNK])
    assert ns.get_prefix(tokens)[0] == 16 * CHUNK
    assert values(c)["shared_hits"] == 12
    assert torch.equal(ns.get_prefix(tokens)[1][:, : 4 * CHUNK], k[:, : 4 * CHUNK])


def test_put_prefix_after_a_match_of_shared_chunks_stores_what_is_not_held_here(hosts):
    """Matching what only the shared store has would put the rest under a parent that is not held: nothing stored."""
    hosts.published(4)
    b = hosts.open()
    b.maintain()
    ns, (tokens, k, v) = hosts.namespace(b), prefix(6)
    ns.put_prefix(tokens[:CHUNK], k[:, :CHUNK], v[:, :CHUNK])
    assert ns.match_prefix(tokens) == 4
    assert ns.put_prefix(tokens, k, v) == 5
    assert values(b)["refused_chunks"] == 0


def test_what_arrives_lives_by_this_hosts_clock_whatever_the_writers_says(hosts):
    own = ManualClock(5_000.0)  # decades before the writer's
    hosts.published(2, store={"ttl_s": 600.0})
    b = hosts.open(clock=own)
    ns, (tokens, _, _) = hosts.namespace(b), prefix(2)
    assert ns.get_prefix(tokens)[0] == 2 * CHUNK
    info = b.inspect(ns.keys(tokens)[0])
    assert info.ttl_left_s == 600.0
    own.advance(601)
    b.maintain()
    assert b.inspect(ns.keys(tokens)[0]) is None


def test_an_expired_prefix_is_fetched_again_and_its_chain_is_whole(hosts):
    hosts.published(6, store={"ttl_s": 3000.0})
    b = hosts.open()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(6)
    ns.get_prefix(tokens)
    hosts.clock.advance(3001)
    hosts.published(6, store={"ttl_s": 3000.0})
    b.touch([])
    assert ns.get_prefix(tokens)[0] == 6 * CHUNK
    assert [b._r.index[key].parent for key in ns.keys(tokens)] == [None, *ns.keys(tokens)[:-1]]


def test_without_room_in_warm_what_arrives_goes_to_cold_and_without_both_nowhere(hosts, tmp_path):
    hosts.published(4)
    tokens, _, _ = prefix(4)
    cold = hosts.open(warm=0, cold=tmp_path / "cold")
    assert hosts.namespace(cold).get_prefix(tokens)[0] == 4 * CHUNK
    assert cold.inspect(hosts.namespace(cold).keys(tokens)[0]).tiers == ("cold",)
    none = hosts.open(warm=0)
    assert hosts.namespace(none).get_prefix(tokens)[0] == 0
    assert values(none)["entries"] == 0


def test_the_namespace_comes_with_a_chunk_and_its_quota_holds(hosts):
    hosts.published(4)
    b = hosts.open()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    b.get_many(ns.keys(tokens), leading=True)  # by keys alone: the caller names no namespace
    assert [info.namespace for info in b.entries()] == [ns.name] * 4


def test_hits_from_the_shared_store_count_as_hits_and_misses_keep_their_causes(hosts):
    hosts.published(4)
    b = hosts.open()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    ns.get_prefix(tokens)
    ns.get_prefix(prefix(4, seed=3)[0])
    found = values(b)
    assert (found["lookup_keys"], found["lookup_hit_keys"]) == (8, 4)
    assert (found["misses_absent"], found["lookup_misses_absent"]) == (1, 1)
    c = hosts.open()
    ns = hosts.namespace(c)
    keys = ns.keys(tokens)
    assert int(c.match(keys, lookup=Lookup(4, 4 * CHUNK, CHUNK))) == 4
    c.get_many(keys, leading=True)
    assert (values(c)["lookup_keys"], values(c)["lookup_hit_keys"]) == (4, 4)


def test_eight_hosts_with_eight_callers_each_get_every_chunk_once_a_host(hosts):
    hosts.published(16)
    tokens, _, _ = prefix(16)
    stores = [hosts.open() for _ in range(8)]
    gate = threading.Barrier(8)
    entered = threading.Barrier(8, action=hosts.server.at.clear)  # one call a host is at the server, the others wait
    hosts.server.at["get"] = lambda names: entered.wait(20)
    found = []

    def ask(store, first):
        if first:
            gate.wait(20)
        found.append(hosts.namespace(store).get_prefix(tokens)[0])

    threads = [threading.Thread(target=ask, args=(store, i == 0)) for store in stores for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [16 * CHUNK] * 64
    names = set(hosts.server.names())
    assert sum(count for name, count in hosts.server.gets.items() if name in names) <= 8 * 16
    assert all(values(store)["shared_hits"] == 16 for store in stores)


def test_who_waited_for_another_call_in_vain_goes_on_at_its_own_deadline(hosts):
    hosts.published(4)
    b = hosts.open(lookup_s=0.02, fetch_s=0.05)
    b.maintain()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    inside, release = threading.Event(), threading.Event()

    def hang(names):
        inside.set()
        release.wait(20)

    hosts.server.at["get"] = hang
    first = threading.Thread(target=lambda: ns.get_prefix(tokens))
    first.start()
    assert inside.wait(20)
    assert ns.get_prefix(tokens)[0] == 0  # returns, though the other one hangs
    release.set()
    first.join(20)
    assert ns.get_prefix(tokens)[0] == 4 * CHUNK


def test_a_get_of_what_is_held_asks_nobody_even_with_the_store_down(hosts):
    a = hosts.published(8)
    hosts.server.down = True
    hosts.clock.advance(100)
    assert hosts.trips_of(lambda: hosts.namespace(a).get_prefix(prefix(8)[0])) == 0
