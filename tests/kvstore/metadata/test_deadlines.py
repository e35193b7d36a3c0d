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

    def forget(self, name: bytes) -> None:
        self.deadlines.unwatch(self.index[Key(name)])
        del self.index[Key(name)]

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
    watched.forget(b"gone")
    watched.forget(b"again")
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


def test_deadlines_that_shrink_with_each_touch_are_held_once_a_key() -> None:
    watched = Watched()
    metas = [watched.put(b"%d" % n, 30 * 86400.0 + n) for n in range(100)]
    for step in range(1000):
        for n, meta in enumerate(metas):
            meta.expires_at = 30 * 86400.0 + n - 2500.0 * step
            watched.deadlines.watch(Key(b"%d" % n), meta)
    assert len(watched.deadlines) == 100
    assert _held(watched.deadlines) == 100
    assert len(watched.due(watched.index[Key(b"99")].expires_at, limit=1000)) == 100


def test_a_key_put_again_and_again_for_a_month_is_held_once() -> None:
    watched = Watched()
    for step in range(1000):
        watched.put(b"a", 30 * 86400.0 + 97.0 * step)
        if step < 999:
            watched.forget(b"a")
    assert _held(watched.deadlines) == 1
    assert len(watched.deadlines._buckets) == 1


def test_any_deadlines_take_a_few_hundred_buckets() -> None:
    watched = Watched()
    for n in range(50_000):
        watched.put(b"%d" % n, 1.0 + n * 97.3)
    assert len(watched.deadlines._buckets) < 64 * 7
    assert watched.due(1.0 + 97.3 * 1000, limit=10**6) == sorted(b"%d" % n for n in range(1001))
    assert _held(watched.deadlines) == 48_999


def test_one_look_looks_at_no_more_keys_than_it_may_whatever_it_finds() -> None:
    watched = Watched()
    looked: list[Key] = []

    class Index(dict[Key, Meta]):
        def __getitem__(self, key: Key) -> Meta:
            looked.append(key)
            return super().__getitem__(key)

    watched.index = Index()
    watched.deadlines = Deadlines(watched.index)
    for n in range(5000):
        watched.put(b"%d" % n, 100.5).expires_at = 5000.0 + n  # each lives longer than its bucket says
    turns = 0
    while True:
        looked.clear()
        assert watched.due(2000.0, limit=64) == []
        assert len(looked) <= 64 * 5, "a key, and the two beside it in the bucket it leaves and in the one it enters"
        turns += 1
        if not watched.deadlines.behind:
            break
    assert 5000 / 64 <= turns <= 5000 / 64 + 2


def _held(deadlines: Deadlines) -> int:
    """Items in all buckets, counted one by one."""
    count = 0
    for bucket in deadlines._buckets.values():
        key = bucket.first
        while key is not None:
            count += 1
            key = deadlines._index[key].due_next
    return count
