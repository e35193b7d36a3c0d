"""What is published, when, in which order, and what happens while it cannot be."""

import time
from itertools import count

import pytest
import torch

from kvstore.clock import SystemClock
from kvstore.config import QuotaConfig, StoreConfig
from kvstore.errors import ConfigError
from kvstore.keys import Key
from kvstore.shared import SharedUnavailable
from kvstore.shared.names import name_of
from tests.kvstore.shared.conftest import CHUNK, prefix
from tests.kvstore.shared.memory import PlainEngine


def alias_names(store, keys):
    return [name_of(store._sharing.source.outside.alias(Key(key))) for key in keys]


def test_parents_are_published_before_their_children(hosts):
    sent = []
    hosts.server.at["put"] = sent.extend
    a = hosts.published(8)
    names = alias_names(a, hosts.namespace(a).keys(prefix(8)[0]))
    assert [name for name in sent if name in names] == names


def test_a_later_turn_publishes_only_what_is_new(hosts):
    a = hosts.published(4)
    tokens, k, v = prefix(6)
    hosts.namespace(a).put_prefix(tokens, k, v)
    sent = []
    hosts.server.at["put"] = sent.extend
    a.maintain()
    assert sent == alias_names(a, hosts.namespace(a).keys(tokens))[4:]


def test_what_another_host_has_published_is_not_sent_again(hosts):
    hosts.published(8)
    hosts.clock.advance(3)
    b = hosts.published(8)
    assert max(hosts.server.puts.values()) == 1
    assert b.stats().values["shared_duplicate_uploads"] == 8
    assert b.stats().values["shared_published"] == 0


@pytest.mark.parametrize("kind", [None, PlainEngine])
def test_of_eight_hosts_that_compute_the_same_prefix_at_once_one_uploads_it(hosts, kind):
    how = {} if kind is None else {"engine": kind}
    stores = [hosts.open(**how) for _ in range(8)]
    for store in stores:
        hosts.namespace(store).put_prefix(*prefix(16))
    turns = iter(stores[1:])

    def others_ask_too(names):  # between the first host's claim and its upload
        for store in turns:
            store.maintain()

    hosts.server.at["put"] = others_ask_too
    stores[0].maintain()
    chunks = {name: count for name, count in hosts.server.puts.items() if name in hosts.server.names()}
    hosts.clock.advance(3)
    for store in stores:
        store.maintain()
    assert len(chunks) == 16
    assert max(hosts.server.puts[name] for name in chunks) == 1


def test_a_host_that_takes_seconds_to_encode_is_the_only_one_that_uploads(hosts, monkeypatch):
    """A claim of 2 s ended meanwhile, and three of eight hosts on two cores sent the same sixteen chunks."""
    a, b = hosts.open(), hosts.open()
    for store in (a, b):
        hosts.namespace(store).put_prefix(*prefix(4))
    form = a._sharing.form

    def slow(key):
        hosts.clock.advance(1.5)
        b.maintain()
        return form(key)

    monkeypatch.setattr(a._sharing.source.publisher._held, "form", slow)
    a.maintain()
    hosts.clock.advance(3)
    b.maintain()
    assert [hosts.server.puts[name] for name in hosts.server.names()] == [1] * 4


def test_a_chunk_whose_claimant_died_is_published_by_another_once_the_claim_ends(hosts):
    a, b = hosts.open(), hosts.open()
    for store in (a, b):
        hosts.namespace(store).put_prefix(*prefix(4))

    def dies(names):
        raise SharedUnavailable("closed", "the host is gone")

    hosts.server.at["put"] = dies
    a.maintain()
    hosts.server.at.clear()
    for _ in range(4):  # the claim outlasts its host by 10 s
        b.maintain()
        assert hosts.server.names() == []
        hosts.clock.advance(3)
    b.maintain()
    assert len(hosts.server.names()) == 4


def test_a_chunk_that_the_shared_store_evicted_is_published_again_by_who_computes_it_again(hosts):
    """A host remembers what it has published; a lookup that finds nothing there ends that."""
    a = hosts.published(3)
    names = alias_names(a, hosts.namespace(a).keys(prefix(3)[0]))
    for name in names:
        del hosts.server.objects[name]
    a.evict(*hosts.namespace(a).keys(prefix(3)[0]))
    hosts.clock.advance(3)
    tokens, k, v = prefix(3)
    assert hosts.namespace(a).get_prefix(tokens)[0] == 0
    hosts.namespace(a).put_prefix(tokens, k, v)
    a.maintain()
    assert hosts.server.names() == names


def test_what_is_evicted_outside_between_a_match_and_its_get_is_published_again_to_its_last_chunk(hosts):
    """Only the first chunk that did not come was; the others counted as published for ever, on the host that had."""
    a = hosts.published(3)
    tokens, k, v = prefix(3)
    ns = hosts.namespace(a)
    names = alias_names(a, ns.keys(tokens))
    a.evict(*ns.keys(tokens))
    assert int(a.match(ns.keys(tokens))) == 3  # the heads are remembered
    for name in names:
        del hosts.server.objects[name]
    assert ns.get_prefix(tokens)[0] == 0
    ns.put_prefix(tokens, k, v)
    for _ in range(2):
        a.maintain()
        hosts.clock.advance(3)
    assert hosts.server.names() == names


def test_chunks_of_servers_that_do_not_answer_wait_for_them_with_what_continues_them(hosts):
    a = hosts.open()
    tokens, k, v = prefix(4)
    names = alias_names(a, hosts.namespace(a).keys(tokens))
    hosts.server.silent = {names[1]}
    hosts.namespace(a).put_prefix(tokens, k, v)
    for _ in range(20):  # an election of a real cluster takes its node timeout and more
        a.maintain()
        hosts.clock.advance(3)
    assert hosts.server.names() == names[:1]
    values = a.stats().values
    assert not [name for name in values if name.startswith("shared_dropped_")]
    assert values["shared_duplicate_uploads"] == 0
    assert values["shared_queue_nbytes"] > 0
    hosts.server.silent = set()
    a.maintain()
    assert hosts.server.names() == names
    assert a.stats().values["shared_queue_nbytes"] == 0


def test_only_whole_chunks_of_chains_that_may_leave_are_published(hosts):
    a = hosts.open()
    ns = hosts.namespace(a)
    ns.put_prefix(*prefix(2, tail=2))
    ns.put_prefix(*prefix(2, seed=1), priority="low")
    hosts.namespace(a, fidelity="exact").put_prefix(*prefix(2, seed=2))
    a.put(b"plain", {"x": torch.zeros(1000)})
    a.put_many([(b"fixed", {"x": torch.zeros(1000)})], chain=True, sliding=False)
    a.maintain()
    values = a.stats().values
    assert len(hosts.server.names()) == 2
    assert {name: values[name] for name in values if name.startswith("shared_dropped_")} == {
        "shared_dropped_partial": 1, "shared_dropped_low_priority": 2, "shared_dropped_exact": 2,
        "shared_dropped_fixed_deadline": 1,
    }  # fmt: skip
    explained = [of.shared for of in a.explain(*ns.keys(prefix(2, tail=2)[0]), b"plain", b"never")]
    assert explained[0].startswith("yes, 0.0 MiB, 3600 s left")
    assert explained[2:] == [
        "no: it is a partial chunk", "no: it is no chunk of a chain", "no: it is neither there nor here",
    ]  # fmt: skip


def test_exact_chunks_are_published_bit_for_bit_where_that_is_said(hosts, tmp_path):
    tokens, k, v = prefix(3)
    a = hosts.open(exact=True)
    hosts.namespace(a, fidelity="exact").put_prefix(tokens, k, v)
    a.maintain()
    for cold in (None, tmp_path / "cold"):
        b = hosts.open(cold=cold)
        n, got_k, got_v = hosts.namespace(b, fidelity="exact").get_prefix(tokens)
        assert n == len(tokens)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)
        assert b.inspect(hosts.namespace(b, fidelity="exact").keys(tokens)[0]).fidelity == "exact"


def test_a_prefix_of_fewer_tokens_than_tokens_min_waits_until_it_is_continued(hosts):
    a = hosts.open(tokens_min=3 * CHUNK)
    ns, (tokens, k, v) = hosts.namespace(a), prefix(3)
    ns.put_prefix(tokens[: 2 * CHUNK], k[:, : 2 * CHUNK], v[:, : 2 * CHUNK])
    a.maintain()
    assert hosts.server.names() == []
    ns.put_prefix(tokens, k, v)
    a.maintain()
    assert len(hosts.server.names()) == 3


def test_an_entry_is_encoded_once_whether_it_is_published_or_demoted_first(hosts):
    a = hosts.open()
    ns, (tokens, k, v) = hosts.namespace(a), prefix(4)
    ns.put_prefix(tokens, k, v)
    keys = ns.keys(tokens)
    a.demote(keys[3])
    a.maintain()
    assert a.stats().values["encodes"] == 4
    assert [a.inspect(key).tiers for key in keys] == [("hot", "warm")] * 3 + [("warm",)]
    assert torch.equal(ns.get_prefix(tokens)[1][:, : 3 * CHUNK], k[:, : 3 * CHUNK])  # hot still has it as put
    assert a.demote(keys[0]) == 3  # with the chunks that continue it
    assert a.stats().values["encodes"] == 4


def test_puts_while_the_store_is_down_stay_within_the_queues_bytes_and_the_oldest_are_dropped(hosts):
    a = hosts.open(buffer_nbytes=1 << 20)
    ns = hosts.namespace(a)
    hosts.server.down = True
    for seed in range(40):
        tokens, k, v = prefix(16, seed=seed)
        ns.put_prefix(tokens, k.repeat(1, 1, 1, 1), v)
        a._sharing.source.publisher._queue[-1].nbytes = 100_000  # as if they were large
        a._sharing.source.publisher._nbytes = sum(o.nbytes for o in a._sharing.source.publisher._queue)
        a.maintain()
        assert a.stats().values["shared_queue_nbytes"] <= 1 << 20
    assert a.stats().values["shared_dropped_full"] > 0
    hosts.server.down = False
    hosts.clock.advance(10)
    a.maintain()
    b = hosts.open()
    assert hosts.namespace(b).get_prefix(prefix(16, seed=39)[0])[0] == 16 * CHUNK
    assert hosts.namespace(b).get_prefix(prefix(16, seed=0)[0])[0] == 0


def test_reused_publishes_only_what_was_hit(hosts):
    a = hosts.published(3, admission="reused")
    assert hosts.server.names() == []
    hosts.namespace(a).get_prefix(prefix(3)[0])
    a.maintain()
    assert len(hosts.server.names()) == 3


def test_after_the_days_bytes_only_what_was_hit_is_published(hosts):
    a = hosts.published(3, write_nbytes_per_day=4000, store={"ttl_s": 2 * 86_400.0})
    assert len(hosts.server.names()) == 3  # the bucket may be overdrawn by one batch
    hosts.namespace(a).put_prefix(*prefix(3, seed=1))
    a.maintain()
    assert len(hosts.server.names()) == 3
    hosts.clock.advance(86_400)
    a.maintain()
    assert len(hosts.server.names()) == 6


def test_after_a_tenants_bytes_of_the_day_only_what_was_hit_of_it_is_published(hosts):
    a = hosts.open(
        tenants={"a": [b"a" * 16], "b": [b"b" * 16]},
        store={"ttl_s": 2 * 86_400.0, "quotas": {"a": QuotaConfig(shared_nbytes_per_day=1000)}},
    )

    def published(tenant: str, number: int) -> int:
        before = len(hosts.server.names())
        key = tenant.encode() * 16 + b"%016d" % number
        assert a.put_many([(key, {"kv": prefix(2)[1]})], chain=True) == 1
        a.maintain()
        return len(hosts.server.names()) - before

    assert [published("a", n) for n in range(3)] == [1, 0, 0], "the bucket may be overdrawn by one batch"
    assert [published("b", n) for n in range(3)] == [1, 1, 1]
    assert a.get_many([b"a" * 16 + b"%016d" % 1])[0] is not None
    a.maintain()
    assert len(hosts.server.names()) == 5, "it was hit"
    hosts.clock.advance(5 * 86_400)  # what was overdrawn is made up
    assert published("a", 9) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quotas": {"a": QuotaConfig(shared_nbytes_per_day=1)}}, "quotas.a.shared_nbytes_per_day is set and"),
        ({"namespaces": {"m": QuotaConfig(shared_nbytes_per_day=1)}}, "is a limit of tenants"),
    ],
)
def test_a_tenants_bytes_a_day_need_a_shared_store_and_a_tenant(how, said):
    with pytest.raises(ConfigError, match=said):
        StoreConfig(**how)


def test_what_no_key_file_covers_is_not_published_in_clear(hosts):
    a = hosts.published(2, key_files={"another model": str(hosts.seal)})
    assert hosts.server.names() == []
    assert a.stats().values["shared_dropped_gone"] == 2


def test_neither_a_name_nor_an_object_tells_a_key_or_a_value(hosts):
    a = hosts.published(4)
    tokens, _, _ = prefix(4)
    a.demote(*hosts.namespace(a).keys(tokens))
    everything = b"".join(name.encode() + data for name, (data, _) in hosts.server.objects.items())
    for key in (*hosts.namespace(a).keys(tokens), hosts.namespace(a).digest):
        assert key not in everything
        assert key.hex().encode() not in everything
    import xxhash

    assert all(xxhash.xxh3_128_digest(key) not in everything for key in hosts.namespace(a).keys(tokens))
    assert hosts.namespace(a).name.encode() not in everything
    packed = a._r.warm.get(Key(hosts.namespace(a).keys(tokens)[0]))
    for tensor in packed.tensors.values():
        for part in tensor.parts.values():
            data = part.contiguous().view(torch.uint8).numpy().tobytes()
            assert len(data) < 16 or data[:16] not in everything


def test_publishing_waits_for_nobody_and_a_put_for_no_publication(hosts):
    """A put with the store hung: it returns while a publication is in the middle of its call."""
    a = hosts.open()
    seen = []

    def during(names):
        hosts.server.at.clear()
        seen.append(hosts.namespace(a).put_prefix(*prefix(2, seed=7)))
        seen.append(hosts.namespace(a).get_prefix(prefix(2, seed=7)[0])[0])

    hosts.namespace(a).put_prefix(*prefix(2))
    hosts.server.at["put"] = during
    a.maintain()
    assert seen == [2, 2 * CHUNK]


def test_a_put_wakes_no_thread_until_half_of_the_queue_is_taken(hosts):
    """A publisher that woke at each put wanted the interpreter while the put answered: 1.3 times as long."""
    store = hosts.open(buffer_nbytes=1 << 20)
    publisher = store._sharing.source.publisher
    for seed in range(100):
        hosts.namespace(store).put_prefix(*prefix(32, seed=seed))
        if publisher.queue_nbytes > (1 << 20) // 2:
            break
        assert not publisher.awake.is_set()
    assert publisher.awake.is_set()
    publisher.awake.clear()
    for seed in range(100, 120):
        hosts.namespace(store).put_prefix(*prefix(32, seed=seed))
    assert not publisher.awake.is_set()  # once: while a store is down the queue stays full


def test_puts_that_never_pause_are_published_all_the_same(hosts):
    store = hosts.open(background=True, clock=SystemClock())
    until = time.monotonic() + 60
    for seed in count():
        hosts.namespace(store).put_prefix(*prefix(1, seed=seed))
        if store.stats().values["shared_published"]:
            break
        assert time.monotonic() < until
        time.sleep(0.01)
