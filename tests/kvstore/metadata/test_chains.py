"""No orphans: whatever happens, a chunk is held nowhere unless the chunk it continues is held somewhere."""

import random
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.disk.columns import KeyColumn, rows_of
from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.chains import MISSING, Chains, links_of
from kvstore.metadata.meta import Meta
from kvstore.metadata.resting import NONE
from kvstore.store import Store

MIB = 1 << 20
PATHS = st.text(alphabet="ab", min_size=1, max_size=5)
"""A chunk is named by the way to it: "aba" continues "ab"."""


def chain(path: str) -> list[bytes]:
    """The keys of a path, root first."""
    return [path[: i + 1].encode() for i in range(len(path))]


def value(key: bytes, rows: int = 8) -> dict[str, torch.Tensor]:
    return {"k": torch.full((rows, 64), float(len(key)))}


class Trees(RuleBasedStateMachine):
    """A tree of chunks in tiers that overflow all the time."""

    policy = "lru"
    admission = "all"
    cold = True

    @initialize()
    def open_store(self) -> None:
        self.clock = ManualClock()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
        path = str(self.folder / "cold") if self.cold else None
        self.config = StoreConfig(
            hot=HotConfig(12_000),
            warm=WarmConfig(6_000),
            cold=ColdConfig(path=path, capacity_nbytes=MIB, admission=self.admission),
            policy=self.policy,
        )
        self.store = Store.open(self.config, clock=self.clock, background=False)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    @rule(path=PATHS, ttl_s=st.sampled_from([10.0, 1000.0]), exact=st.booleans(), low=st.booleans())
    def put(self, path: str, ttl_s: float, exact: bool, low: bool) -> None:
        """What a worker does: use what is held of the prefix, put the rest."""
        keys = chain(path)
        held = len(self.store.get_many(keys, leading=True))
        self.store.put_many(
            [(key, value(key)) for key in keys[held:]],
            ttl_s=ttl_s,
            fidelity="exact" if exact else "auto",
            priority="low" if low else "normal",
            chain=True,
            parent=keys[held - 1] if held else None,
        )

    @rule(path=PATHS)
    def put_again(self, path: str) -> None:
        """Another worker prefilled the same and puts it whole."""
        self.store.put_many([(key, value(key)) for key in chain(path)], chain=True)

    @rule(path=PATHS)
    def put_without_its_parents(self, path: str) -> None:
        keys = chain(path)
        parent = keys[-2] if len(keys) > 1 else None
        held = parent is None or self.store.locate([parent])[0] is not None
        stored = self.store.put(keys[-1], value(keys[-1]), parent=parent)
        assert held or not stored

    @rule(path=PATHS)
    def get(self, path: str) -> None:
        hits = self.store.get_many(chain(path), leading=True)
        assert all(hit is not None and bool((hit.tensors["k"] == len(hit.key)).all()) for hit in hits)

    @rule(path=PATHS)
    def touch_one(self, path: str) -> None:
        self.store.touch([path.encode()])

    @rule(path=PATHS, verb=st.sampled_from(["delete", "evict", "demote", "promote", "unpin"]))
    def one(self, path: str, verb: str) -> None:
        """A chunk in the middle of its chains."""
        getattr(self.store, verb)(path.encode())

    @rule(path=PATHS)
    def forget(self, path: str) -> None:
        self.store.delete(*reversed(chain(path)), keep_shared=True)

    @rule(path=PATHS, ttl_s=st.sampled_from([None, 20.0]))
    def pin(self, path: str, ttl_s: float | None) -> None:
        try:
            self.store.pin(path.encode(), ttl_s=ttl_s)
        except OverQuota:
            return

    @rule(seconds=st.sampled_from([1.0, 9.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.store.maintain()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store.open(self.config, clock=self.clock, background=False)

    @invariant()
    def no_orphans(self) -> None:
        if not hasattr(self, "store"):
            return
        r = self.store._r
        assert r.chains.awaited == {}
        held = {*r.hot.keys(), *r.warm.keys(), *(r.cold.keys() if r.cold else ())}
        assert held == set(r.index)
        for key, meta in r.index.items():
            assert key in held
            if len(key) > 1 and meta.parent is not None:
                assert meta.parent == key[:-1]
                assert meta.parent in held, "an orphan"
                assert key in set(r.chains.children(meta.parent))
            assert meta.rooted, "all chunks before it are there"
            if meta.pinned:
                assert all(r.index[at].pinned for at in r.chains.ancestors(key)), "a pin without its prefix"
        assert all(r.index[child].parent == key for key in r.index for child in r.chains.children(key))


class WithARC(Trees):
    policy = "arc"
    cold = False


class WithS3FIFO(Trees):
    policy = "s3fifo"


class Reused(Trees):
    admission = "reused"


_SETTINGS = settings(max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestLRU = Trees.TestCase
TestLRU.settings = _SETTINGS
TestARC = WithARC.TestCase
TestARC.settings = _SETTINGS
TestS3FIFO = WithS3FIFO.TestCase
TestS3FIFO.settings = _SETTINGS
TestReused = Reused.TestCase
TestReused.settings = _SETTINGS


def memory_store(policy: str = "lru", **settings: object) -> Store:
    config = StoreConfig(hot=HotConfig(1 << 20), warm=WarmConfig(1 << 20), policy=policy, **settings)  # type: ignore[arg-type]
    return Store.open(config, clock=ManualClock(), background=False)


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_every_policy_evicts_the_deepest_chunk_of_a_chain_first(policy: str) -> None:
    with memory_store(policy) as store:
        keys = chain("abababab")
        store.put_many([(key, value(key)) for key in keys], chain=True)
        tier, left = store._r.hot, []
        tier.capacity_nbytes = 0
        while len(tier):
            gone = tier.displace(1, Key(b"x"))
            assert gone is not None
            left.append(gone.key)
        assert left == keys[::-1]


def test_a_chunk_without_its_parent_is_not_stored() -> None:
    with memory_store() as store:
        assert not store.put(b"ab", value(b"ab"), parent=b"a")
        assert store.put_many([(b"ab", value(b"ab")), (b"aba", value(b"aba"))], chain=True, parent=b"a") == 0
        assert store.stats().values["refused_chunks"] == 3
        assert store.put(b"a", value(b"a"))
        assert store.put(b"ab", value(b"ab"), parent=b"a")


def test_what_continues_a_deleted_chunk_goes_with_it() -> None:
    with memory_store() as store:
        store.put_many([(key, value(key)) for key in chain("aaa")], chain=True)
        store.put(b"aab", value(b"aab"), parent=b"aa")
        assert store.delete(b"aa") == 1
        assert store.locate([b"a", b"aa", b"aaa", b"aab"]).count(None) == 3
        assert [e.state for e in store.explain(b"a", b"aa", b"aaa", b"zz")] == [
            "held",
            "deleted",
            "orphaned",
            "never put",
        ]


def test_a_chain_that_fails_half_way_leaves_nothing_hanging() -> None:
    with memory_store() as store:
        entries = [(key, value(key)) for key in chain("aaa")]
        entries[1] = (b"aa", {"k": "no tensor"})  # type: ignore[dict-item]
        with pytest.raises(Exception, match="got str"):
            store.put_many(entries, chain=True)
        assert store.stats().values["entries"] == 0
        assert store._r.chains.awaited == {}


def test_a_ring_of_parents_is_no_ring() -> None:
    with memory_store() as store:
        store.put(b"a", value(b"a"))
        store.put(b"b", value(b"b"), parent=b"a")
        store.put(b"a", value(b"a"), parent=b"b")
        store.put(b"c", value(b"c"), parent=b"c")
        assert store.delete(b"b") == 1
        assert store.locate([b"a"])[0] is not None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True), st.sampled_from(" abcdef")),
        max_size=12,
    )
)
def test_whatever_parents_are_named_no_chunk_continues_itself(puts: list[tuple[list[str], str]]) -> None:
    with memory_store() as store:
        index = store._r.index
        for names, parent in puts:
            entries = [(name.encode(), {"k": torch.ones(1)}) for name in names]
            store.put_many(entries, chain=True, parent=parent.encode() if parent != " " else None)
            for at in list(index):
                above = list(islice(store._r.chains.ancestors(at), len(index) + 1))
                assert len(above) < len(index), "a ring"
                assert index[at].rooted
                assert index[[at, *above][-1]].parent is None
            assert store._r.chains.awaited == {}


def test_the_last_chunk_of_a_chain_put_behind_a_long_one_is_linked_without_following_either() -> None:
    with Store.open(StoreConfig(HotConfig(1 << 24)), clock=ManualClock(), background=False) as store:
        x = {"k": torch.ones(1)}
        first, second = ([b"%d-%d" % (n, i) for i in range(600)] for n in range(2))
        store.put_many([(key, x) for key in first], chain=True)
        looked_up: list[Key] = []
        ancestors = store._r.chains.ancestors
        store._r.chains.ancestors = lambda key: (looked_up.append(at) or at for at in ancestors(key))  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store._write_path, "_touch_upwards", lambda _: None)
            assert store.put_many([(key, x) for key in second], chain=True, parent=first[-1]) == len(second)
        assert looked_up == []
        assert store._r.index[Key(second[0])].parent == first[-1]


def test_a_root_is_not_put_below_a_chunk_that_waits_for_its_own_parent() -> None:
    chains = Chains()

    def put(name: str, parent: str | None) -> Meta:
        key = Key(name.encode())
        old = chains.index.get(key)
        meta = chains.index[key] = Meta(0, 1, 1, 1, parent=None if parent is None else Key(parent.encode()))
        chains.link(key, meta) if old is None else chains.replace(key, meta, old)
        return meta

    put("waits", "coming")
    put("root", None)
    put("below", "root")
    assert put("root", "waits").parent is None
    put("coming", "below")
    assert list(chains.ancestors(Key(b"waits"))) == [b"coming", b"below", b"root"]


def test_a_pin_holds_the_prefix_it_ends_and_lapses_by_itself() -> None:
    with memory_store() as store:
        clock = store._r.clock
        assert isinstance(clock, ManualClock)
        store.put_many([(key, value(key)) for key in chain("aaa")], chain=True, ttl_s=10)
        assert store.pin(b"aaa", ttl_s=100) == 1
        assert [info.pinned for info in store.entries()] == [True] * 3
        assert store.unpin(b"a") == 0
        clock.advance(99)
        store.maintain()
        assert store.match(chain("aaa")) == 3
        clock.advance(2)
        store.maintain()
        assert [info.pinned for info in store.entries()] == [False] * 3
        clock.advance(11)
        assert store.match(chain("aaa")) == 0


def test_an_entry_of_low_priority_leaves_first_unless_it_was_hit() -> None:
    with memory_store(promote_after=0) as store:
        for key in (b"old", b"low", b"hit"):
            store.put(key, value(key), priority="normal" if key == b"old" else "low")
        store.get(b"hit")
        tier = store._r.hot
        tier.capacity_nbytes = 0
        order = [gone.key for _ in range(3) if (gone := tier.displace(1, Key(b"x"))) is not None]
        assert order == [b"low", b"old", b"hit"]


@pytest.mark.parametrize("seed", range(4))
def test_links_made_at_once_are_those_made_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    keys = [Key(b"%d" % n) for n in range(60)]
    rng.shuffle(keys)
    parents: list[Key | None] = [
        rng.choice([None, keys[rng.randrange(i + 1, 60)]]) if i < 59 else None for i in range(60)
    ]
    one_by_one = Chains()
    for key, parent in zip(keys, parents, strict=True):
        meta = one_by_one.index[key] = Meta(0, 1, 1, 1, parent=parent)
        one_by_one.link(key, meta)
    order = list(range(60))
    rng.shuffle(order)  # the rows need not lie as they were used
    rows = [keys[order.index(row)] for row in range(60)]
    above = [parents[order.index(row)] for row in range(60)]
    found = links_of(rows_of(rows, KeyColumn.made([key or b"" for key in above])), np.array(order))
    columns = (found.parents, found.first_children, found.previous, found.nexts)
    for key, *at_once in zip(rows, *(column.tolist() for column in columns), strict=True):
        meta = one_by_one.index[key]
        links = [None if row == NONE else rows[row] for row in at_once]
        assert links == [meta.parent, meta.first_child, meta.previous, meta.next]
    assert found.orphans == []


@pytest.mark.parametrize("size", [4, 32, 48, 64, 65, 256])
def test_the_row_of_a_key_is_found_whatever_its_length(size: int) -> None:
    keys = [Key(b"%d" % n * size)[: size - n % 3] for n in range(1, 200)]
    keys = [Key(key) for key in dict.fromkeys(keys)]
    wanted = [*keys[::-1], b"", b"absent", keys[0] + b"\0"]
    expected = [*range(len(keys) - 1, -1, -1), NONE, MISSING, MISSING]
    assert rows_of(keys, KeyColumn.made(wanted)).tolist() == expected
    assert rows_of([], KeyColumn.made([b"", b"k"])).tolist() == [NONE, MISSING]


def test_keys_with_the_same_sum_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.disk.columns._mixed", lambda words, _sizes: np.zeros(len(words), np.uint64))
    keys = [Key(b"%032d" % n) for n in range(9)]
    assert rows_of(keys, KeyColumn.made([*keys[3:], b"%032d" % 99])).tolist() == [3, 4, 5, 6, 7, 8, MISSING]


def test_orphans_and_rings_found_at_a_start_have_no_parent() -> None:
    a, b, c, d, lost = (Key(name) for name in (b"a", b"b", b"c", b"d", b"lost"))
    keys = [a, b, c, d]
    links = links_of(rows_of(keys, KeyColumn.made([b, a, a, lost])), np.arange(4))
    assert links.parents.tolist() == [NONE] * 4
    assert links.first_children.tolist() == [NONE] * 4
    assert links.orphans == [3]
    assert links_of(np.empty(0, np.int64), np.empty(0, np.int64)).parents.tolist() == []


def test_a_key_put_again_as_a_chunk_continues_the_parent_it_names_then() -> None:
    with Store.open(StoreConfig(), clock=ManualClock(), background=False) as store:
        store.put(b"child", value(b"child"))
        store.put(b"root", value(b"root"))
        store.put(b"child", value(b"child"), parent=b"root")
        assert store.delete(b"root") == 1
        assert store.get(b"child") is None


def test_a_key_cannot_continue_itself() -> None:
    with Store.open(StoreConfig(), clock=ManualClock(), background=False) as store:
        store.put(b"k", value(b"k"))
        store.put(b"k", value(b"k"), parent=b"k")
        assert store._r.index[Key(b"k")].parent is None
        assert store._r.index[Key(b"k")].first_child is None
        assert store.delete(b"k") == 1


def test_a_chunk_that_others_continue_is_put_again_below_a_parent_that_comes_after_it() -> None:
    """A chain is put deepest first: when the chunk is there again, its new parent is in no index yet."""
    with memory_store() as store:
        store.put(b"a", value(b"a"))
        store.put(b"b", value(b"b"), parent=b"a")
        assert store.put_many([(b"root", value(b"root")), (b"a", value(b"a"))], chain=True) == 2
        assert store._r.index[Key(b"a")].parent == b"root"
        assert store._r.chains.awaited == {}
        assert store.delete(b"root") == 1
        assert store.locate([b"a", b"b"]) == [None, None]
