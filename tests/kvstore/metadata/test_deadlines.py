"""Which keys are due: each at its deadline, wherever that has moved to since it was watched, and once."""

from math import inf

from kvstore.keys import Key
from kvstore.metadata.deadlines import Deadlines
from kvstore.metadata.meta import Meta


class Watched:
    """An index and its deadlines."""

    def __init__(self) -> None:
        self.index: dict[Key, Meta] = {}
        self.deadlines = Deadlines(self.index)

    def put(self, name: bytes, expires_at: float) -> Meta:
        meta = self.index[Key(name)] = Meta(0.0, expires_at, 10.0, 1)
        self.deadlines.watch(Key(name), meta)
        return meta

    def due(self, now: float, limit: int = 100) -> list[bytes]:
        return sorted(self.deadlines.due(now, limit))


def test_a_key_is_due_at_its_deadline_and_once() -> None:
    watched = Watched()
    watched.put(b"a", 10.0)
    watched.put(b"b", 10.5)
    watched.put(b"c", 11.0)
    assert watched.due(9.99) == []
    assert watched.due(10.0) == [b"a"]
    assert watched.due(10.49) == []
    assert watched.due(10.5) == [b"b"]
    assert watched.due(100.0) == [b"c"]
    assert watched.due(100.0) == []
    assert len(watched.deadlines) == 0
    assert watched.deadlines._buckets == {}
    assert watched.deadlines._order == []


def test_a_deadline_that_moved_to_later_is_found_late_enough() -> None:
    watched = Watched()
    meta = watched.put(b"a", 10.0)
    meta.expires_at = 20.0
    assert watched.due(19.0) == []
    assert len(watched.deadlines) == 1
    assert watched.due(20.0) == [b"a"]


def test_a_deadline_that_moved_to_earlier_counts_once_it_is_watched() -> None:
    watched = Watched()
    meta = watched.put(b"a", 20.0)
    meta.expires_at = 5.0
    watched.deadlines.watch(Key(b"a"), meta)
    assert watched.due(5.0) == [b"a"]
    assert watched.due(30.0) == [], "what is left in the later bucket is nobody's"
    assert len(watched.deadlines) == 0


def test_a_key_watched_again_at_the_same_deadline_is_in_one_bucket_once() -> None:
    watched = Watched()
    meta = watched.put(b"a", 10.0)
    for _ in range(3):
        watched.deadlines.watch(Key(b"a"), meta)
    assert len(watched.deadlines) == 1


def test_a_key_that_is_gone_is_not_due_and_one_put_again_has_its_new_deadline() -> None:
    watched = Watched()
    watched.put(b"gone", 10.0)
    watched.put(b"again", 10.0)
    del watched.index[Key(b"gone")]
    watched.put(b"again", 15.0)
    assert watched.due(14.0) == []
    assert watched.due(15.0) == [b"again"]


def test_a_pinned_key_is_due_when_its_pin_lapses_and_never_without_an_end() -> None:
    watched = Watched()
    meta = watched.put(b"a", 10.0)
    meta.pinned, meta.pinned_until = True, 30.0
    watched.deadlines.watch(Key(b"a"), meta)
    assert watched.due(29.0) == []
    assert watched.due(30.0) == [b"a"]
    meta.pinned_until = inf
    watched.deadlines.watch(Key(b"a"), meta)
    assert len(watched.deadlines) == 0


def test_so_many_at_a_time_and_the_rest_in_the_next_turn() -> None:
    watched = Watched()
    for n in range(7):
        watched.put(b"%d" % n, 10.0 + n % 2)
    found = [watched.due(20.0, limit=3) for _ in range(4)]
    assert [len(some) for some in found] == [3, 3, 1, 0]
    assert sorted(name for some in found for name in some) == [b"%d" % n for n in range(7)]
