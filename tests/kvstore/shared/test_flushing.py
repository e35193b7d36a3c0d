"""A flush puts objects out of reach for every host, and none of them comes back."""

import pytest

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.shared import SharedUnavailable
from kvstore.store import Store
from tests.kvstore.shared.conftest import CHUNK, prefix


def got(hosts, store, seed=0, **other):
    return hosts.namespace(store, **other).get_prefix(prefix(4, seed=seed)[0])[0]


def test_after_a_flush_all_hosts_miss_within_two_seconds(hosts):
    a = hosts.published(4)
    others = [hosts.open() for _ in range(3)]
    for store in others:
        store.maintain()
    a.flush_shared()
    hosts.clock.advance(2.1)  # with or without a turn of their background
    others[0].maintain()
    assert [got(hosts, store) for store in others] == [0, 0, 0]
    assert got(hosts, hosts.open()) == 0


def test_a_flush_of_a_namespace_leaves_the_others(hosts):
    a = hosts.open()
    for model in ("m", "n"):
        hosts.namespace(a, model=model).put_prefix(*prefix(4))
    a.maintain()
    a.flush_shared(hosts.namespace(a, model="m").name)
    b = hosts.open()
    assert got(hosts, b, model="m") == 0
    assert got(hosts, b, model="n") == 4 * CHUNK


@pytest.mark.parametrize("of", ["everything", "namespace"])
def test_what_is_put_after_a_flush_is_published_and_found_again(hosts, of):
    a = hosts.published(4)
    a.flush_shared(None if of == "everything" else hosts.namespace(a).name)
    hosts.clock.advance(3)
    c = hosts.published(4)  # computed again, by another host
    assert c.stats().values["shared_published"] == 4
    assert got(hosts, hosts.open()) == 4 * CHUNK


def test_objects_replayed_after_a_flush_are_not_believed(hosts):
    a = hosts.published(4)
    before = dict(hosts.server.objects)
    a.flush_shared()
    after = [name for name in hosts.server.objects if name not in before or hosts.server.objects[name] != before[name]]
    hosts.server.objects.update({name: data for name, data in before.items() if name not in after})
    assert got(hosts, hosts.open()) == 0
    b = hosts.published(4, seed=1)
    names = [name for name in hosts.server.names() if name not in before]
    for new, old in zip(names, [name for name in before if name in hosts.server.names()], strict=False):
        hosts.server.objects[new] = before[old]  # under the names of now
    c = hosts.open()
    assert got(hosts, c, seed=1) == 0
    assert c.stats().values["shared_corrupt"] > 0
    assert got(hosts, b, seed=1) == 4 * CHUNK


def test_a_table_of_epochs_that_the_server_lost_is_written_again_by_a_host_that_knows_it(hosts):
    a = hosts.published(4)
    b = hosts.open()
    a.flush_shared()
    hosts.clock.advance(1.5)
    b.maintain()
    for name in [name for name in hosts.server.objects if name not in hosts.server.names()]:
        del hosts.server.objects[name]
    hosts.clock.advance(1.5)
    b.maintain()
    assert got(hosts, hosts.open()) == 0


def test_two_flushes_at_once_both_hold(hosts):
    a, b = hosts.open(), hosts.open()
    for model in ("m", "n"):
        hosts.namespace(a, model=model).put_prefix(*prefix(4))
    a.maintain()

    def other_flush(names):
        hosts.server.at.clear()
        b.flush_shared(hosts.namespace(b, model="n").name)

    hosts.server.at["put"] = other_flush  # between what the first one read and what it writes
    a.flush_shared(hosts.namespace(a, model="m").name)
    hosts.clock.advance(1.5)
    b.maintain()  # writes back what the other one overwrote
    c = hosts.open()
    assert (got(hosts, c, model="m"), got(hosts, c, model="n")) == (0, 0)


def test_a_damaged_table_of_epochs_flushes_everything_and_sharing_goes_on(hosts):
    hosts.published(4)
    (table,) = [name for name in hosts.server.objects if name not in hosts.server.names()] or [""]
    if not table:
        a = hosts.stores[0]
        a.flush_shared("nobody's")
        (table,) = [name for name in hosts.server.objects if name not in hosts.server.names()]
    data, until = hosts.server.objects[table]
    hosts.server.objects[table] = data[:50] + bytes([data[50] ^ 1]) + data[51:], until
    b = hosts.open()
    assert got(hosts, b) == 0
    hosts.clock.advance(3)
    hosts.published(4)
    assert got(hosts, hosts.open()) == 4 * CHUNK


def test_a_table_of_epochs_whose_body_is_lost_flushes_everything_and_sharing_goes_on(hosts):
    a = hosts.published(4)
    a.flush_shared("nobody's")
    (table,) = [name for name in hosts.server.objects if name not in hosts.server.names()]
    data, until = hosts.server.objects[table]
    hosts.server.objects[table] = data[:100], until
    b = hosts.open()
    for _ in range(3):
        b.maintain()
        hosts.clock.advance(1.5)
    assert got(hosts, b) == 0
    hosts.clock.advance(3)
    c = hosts.published(4)
    assert got(hosts, hosts.open()) == 4 * CHUNK
    assert c.stats().values["shared_published"] == 4


def test_an_unreachable_store_refuses_a_flush_with_a_sentence(hosts):
    a = hosts.open()
    hosts.server.down = True
    with pytest.raises(SharedUnavailable):
        a.flush_shared()


def test_a_check_finds_nothing_wrong_with_a_good_store_and_says_what_is_wrong_with_a_bad_one(hosts):
    a = hosts.open()
    assert a.check_shared() == []
    assert hosts.server.names() == []
    hosts.server.down = True
    assert a.check_shared()[0].startswith("put of a probe failed: no answer within")


def test_without_a_shared_store_there_is_nothing_to_check_or_flush():
    with Store.open(StoreConfig(), background=False) as store:
        with pytest.raises(ConfigError, match=r"store\.shared\.url"):
            store.check_shared()
        with pytest.raises(ConfigError, match=r"store\.shared\.url"):
            store.flush_shared()
        assert not [name for name in store.stats().values if name.startswith("shared")]
        assert store.explain(b"k")[0].shared == ""
