"""Deleted for good: not read back from the shared store, with the store down and up again, and over a restart."""

import threading

import pytest

from kvstore.keys import Key
from kvstore.shared.bars import FILE, Bars
from kvstore.shared.names import name_of
from tests.kvstore.shared.conftest import CHUNK, prefix


def test_what_a_host_deletes_never_comes_back_to_it_from_the_shared_store(hosts):
    a = hosts.published(16)
    ns, (tokens, _, _) = hosts.namespace(a), prefix(16)
    assert a.delete(ns.keys(tokens)[0]) == 1  # the root: the others go with it
    assert ns.get_prefix(tokens)[0] == 0
    a.maintain()
    hosts.clock.advance(5)
    assert ns.get_prefix(tokens)[0] == 0
    assert hosts.server.names() == []
    assert hosts.namespace(hosts.open()).get_prefix(tokens)[0] == 0


def test_a_key_deleted_while_the_store_is_down_stays_barred_until_it_is_up_and_has_deleted_it(hosts):
    a = hosts.published(8)
    ns, (tokens, _, _) = hosts.namespace(a), prefix(8)
    keys = ns.keys(tokens)
    hosts.server.down = True
    a.delete(*keys)
    a.maintain()
    assert a.stats().values["shared_barred"] == 8
    hosts.server.down = False
    assert ns.get_prefix(tokens)[0] == 0  # up again, and not yet told
    assert len(hosts.server.names()) == 8
    hosts.clock.advance(5)
    a.maintain()
    assert hosts.server.names() == []
    assert a.stats().values["shared_barred"] == 0
    hosts.clock.advance(5)
    assert ns.get_prefix(tokens)[0] == 0


def test_a_restart_with_the_store_down_forgets_no_deletion(hosts, tmp_path):
    a = hosts.published(4, cold=tmp_path / "cold")
    tokens, _, _ = prefix(4)
    hosts.server.down = True
    a.delete(*hosts.namespace(a).keys(tokens))
    a.close()
    hosts.server.down = False
    again = hosts.open(cold=tmp_path / "cold")
    ns = hosts.namespace(again)
    assert ns.get_prefix(tokens)[0] == 0
    again.maintain()
    assert hosts.server.names() == []
    assert (tmp_path / "cold" / FILE).stat().st_size == 0
    assert (tmp_path / "cold" / FILE).stat().st_mode & 0o077 == 0


def test_a_key_that_only_the_shared_store_has_is_deleted_there_too(hosts):
    hosts.published(4)
    b = hosts.open()
    tokens, _, _ = prefix(4)
    assert b.delete(*hosts.namespace(b).keys(tokens)) == 0
    b.maintain()
    assert hosts.server.names() == []


@pytest.mark.parametrize("point", ["heads:done", "get:done"])
def test_a_prefix_deleted_while_it_is_being_fetched_is_not_installed(hosts, point):
    hosts.published(4)
    b = hosts.open()
    ns, (tokens, _, _) = hosts.namespace(b), prefix(4)
    keys = ns.keys(tokens)

    def delete(names):
        if name_of(b._sharing.source.outside.alias(Key(keys[0]))) in names:
            hosts.server.at.clear()
            b.delete(*keys)
            b._sharing.source.publisher.run_once()  # acknowledged before the fetch goes on
            assert b.stats().values["shared_barred"] == 0

    b.maintain()
    hosts.server.at[point] = delete
    assert ns.get_prefix(tokens)[0] == 0
    assert [b.inspect(key) for key in keys] == [None] * 4


def test_a_deletion_during_an_upload_is_carried_out_after_it(hosts):
    a = hosts.open()
    a.maintain()
    ns, (tokens, k, v) = hosts.namespace(a), prefix(4)
    ns.put_prefix(tokens, k, v)
    hosts.server.at["put"] = lambda names: a.delete(*ns.keys(tokens))
    a.maintain()
    hosts.server.at.clear()
    hosts.clock.advance(5)
    a.maintain()
    assert hosts.server.names() == []


def test_a_key_put_again_after_its_deletion_is_published_once_that_is_acknowledged(hosts):
    a = hosts.published(2)
    ns, (tokens, k, v) = hosts.namespace(a), prefix(2)
    a.delete(*ns.keys(tokens))
    ns.put_prefix(tokens, k, v)
    a.maintain()
    hosts.clock.advance(3)  # its own claim of the first time has passed
    a.maintain()
    assert len(hosts.server.names()) == 2
    assert hosts.namespace(hosts.open()).get_prefix(tokens)[0] == 2 * CHUNK


def test_what_forget_leaves_to_another_prompt_stays_in_the_shared_store(hosts):
    a = hosts.open()
    ns, (tokens, k, v) = hosts.namespace(a), prefix(3)
    ns.put_prefix(tokens, k, v)
    other = [*tokens[: 2 * CHUNK], *range(9000, 9000 + CHUNK)]
    ns.put_prefix(other, k, v)
    a.maintain()
    assert len(hosts.server.names()) == 4
    ns.forget(other)
    a.maintain()
    assert len(hosts.server.names()) == 3
    assert hosts.namespace(hosts.open()).get_prefix(tokens)[0] == 3 * CHUNK


def test_more_deletions_than_are_remembered_become_one_of_everything(hosts, tmp_path, monkeypatch):
    a = hosts.published(4, cold=tmp_path / "cold")
    a._sharing.source.outside.bars._at_most = 3
    tokens, _, _ = prefix(4)
    hosts.published(4, seed=1)
    hosts.server.down = True
    a.delete(*hosts.namespace(a).keys(tokens))
    a.close()
    hosts.server.down = False
    again = hosts.open(cold=tmp_path / "cold")
    ns = hosts.namespace(again)
    assert ns.get_prefix(prefix(4, seed=1)[0])[0] == 0  # nothing is read ...
    again.maintain()
    hosts.clock.advance(3)
    assert ns.get_prefix(tokens)[0] == 0  # ... and everything that was there is out of reach
    ns.put_prefix(*prefix(4, seed=2))
    again.maintain()
    assert hosts.namespace(hosts.open()).get_prefix(prefix(4, seed=2)[0])[0] == 4 * CHUNK


def test_a_line_that_a_crash_cut_off_bars_nothing_and_swallows_no_other(tmp_path):
    bars = Bars(tmp_path)
    bars.add([Key(b"one"), Key(b"two")])
    bars.keep()
    bars.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-5])
    bars = Bars(tmp_path)
    assert (Key(b"one") in bars, Key(b"two") in bars, len(bars)) == (True, False, 1)
    bars.add([Key(b"three")])
    bars.keep()
    bars.close()
    bars = Bars(tmp_path)
    assert Key(b"three") in bars
    bars.close()


def test_the_file_of_deletions_is_rewritten_when_most_of_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("kvstore.shared.bars._REWRITE_NBYTES", 100)
    bars = Bars(tmp_path)
    keys = [Key(b"%032d" % i) for i in range(100)]
    bars.add(keys)
    bars.keep()
    bars.done(bars.waiting(99))
    assert (tmp_path / FILE).stat().st_size < 200
    bars.close()
    bars = Bars(tmp_path)
    assert [key for key, _ in bars.waiting(10)] == keys[99:]
    bars.close()


def test_no_thread_is_left_when_a_store_is_closed(hosts):
    store = hosts.open(background=True)
    assert {t.name for t in threading.enumerate()} >= {f"kvstore-shared-{n}" for n in ("publish", "fetch", "epochs")}
    store.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("kvstore-shared")]
