"""A start takes over what the disk holds: each key's Meta as it was, none made before it is asked for, and no byte of a
directory changed before its index is known to be sound.
"""

import hashlib
import json
import logging
import random
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.disk import opening, recovery
from kvstore.disk.opening import Check
from kvstore.keys import Key
from kvstore.metadata.deadlines import Deadlines
from kvstore.metadata.index import Index
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner
from kvstore.metadata.resting import COLUMNS, NONE, Resting
from kvstore.policies import policy_named
from kvstore.store import Store
from kvstore.tiers.order import Order

PAGE = 4096
KEEPS = {"due_in", "due_previous", "due_next", "owner"}
"""Of a Meta: what belongs to one process. Owners are compared by name."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    cold = ColdConfig(path=str(tmp_path / "cold"), capacity_nbytes=64 << 20)
    return StoreConfig(hot=HotConfig(1 << 20), warm=WarmConfig(1 << 20), cold=cold)


def opened(config: StoreConfig, clock: ManualClock) -> Store:
    return Store.open(config, clock=clock, background=False)


def value(n: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((64,), n % 251, dtype=torch.uint8)}


def told(meta: Meta) -> dict[str, object]:
    return {f.name: getattr(meta, f.name) for f in fields(Meta) if f.name not in KEEPS} | {
        "owner": (meta.owner.tenant, meta.owner.namespace)
    }


def awake(index: Index) -> int:
    """Keys whose Meta has been made."""
    return sum(isinstance(held, Meta) for part in index._parts if part for held in part.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_start_knows_of_each_key_what_was_known_before(config: StoreConfig, clock: ManualClock, seed: int) -> None:
    rng = random.Random(seed)
    keys: list[bytes] = []
    tenant = b"0123456789abcdef"
    with opened(config, clock) as store:
        store.register_tenant("team", [tenant])
        for n in range(120):
            key = rng.choice([b"", tenant]) + b"%d" % n
            own = [held for held in keys if held.startswith(tenant) == key.startswith(tenant)]
            parent = rng.choice(own) if own and rng.random() < 0.6 else None
            store.put(
                key, value(n), parent=parent, ttl_s=rng.choice([50.0, 500.0, 1e6]), sliding=rng.random() < 0.5,
                pin=rng.random() < 0.1, namespace=rng.choice(["", "a", "model@00"]),
            )  # fmt: skip
            keys.append(key)
            clock.advance(1.0)
        store.touch(rng.sample(keys, 30))
        store.delete(*rng.sample(keys, 5))
        store.drain()
        before = {key: told(meta) for key, meta in store._r.index.items()}
        order = [key for key in _cold_keys(store) if not before[key]["pinned"]]
        owners = {(o.tenant, o.namespace): (o.entries, o.nbytes[2]) for o in store._r.tenants if o.entries}
    with opened(config, clock) as store:
        r = store._r
        assert awake(r.index) <= 2 * sum(bool(meta["pinned"]) for meta in before.values())
        store.register_tenant("team", [tenant])
        after = {key: told(meta) for key, meta in r.index.items()}
        now = clock.now()
        assert set(after) == {key for key, meta in before.items() if meta["pinned"] or meta["expires_at"] > now}  # type: ignore[operator]
        for key, meta in after.items():
            links = {"first_child", "previous", "next"}  # their order is that of use, which the disk tells
            assert {n: v for n, v in meta.items() if n not in links} == {
                n: v for n, v in before[key].items() if n not in links
            }
            assert sorted(r.chains.children(key)) == sorted(k for k, m in before.items() if m["parent"] == key)
        assert [key for key in _cold_keys(store) if key in order] == [key for key in order if key in after]
        assert owners == {(o.tenant, o.namespace): (o.entries, o.nbytes[2]) for o in r.tenants if o.entries}


def _cold_keys(store: Store) -> list[Key]:
    assert store._r.cold is not None
    return list(store._r.cold.keys())


def resting(count: int) -> tuple[list[Key], Resting]:
    table = np.zeros(count, COLUMNS)
    table["expires_at"] = 100.0 + np.arange(count)
    for name in ("parent", "first_child", "previous", "next"):
        table[name] = NONE
    keys = [Key(b"%d" % n) for n in range(count)]
    return keys, Resting(keys, table, ["raw"])


def test_threads_that_ask_for_a_key_at_once_get_one_meta() -> None:
    keys, rows = resting(2000)
    index = Index()
    index.rest(keys, rows)
    found: list[list[Meta | None]] = [[], [], [], []]
    start = threading.Barrier(4)

    def ask(own: list[Meta | None]) -> None:
        start.wait()
        own.extend(map(index.get, keys))

    threads = [threading.Thread(target=ask, args=(own,)) for own in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len({id(meta) for meta in metas}) == 1 for metas in zip(*found, strict=True))
    assert index.get(Key(b"absent")) is None
    with pytest.raises(KeyError):
        index[Key(b"absent")]


def test_keys_of_a_restart_are_due_when_they_were() -> None:
    keys, rows = resting(10)
    index = Index()
    index.rest(keys, rows)
    deadlines = Deadlines(index, 0.0)
    deadlines.rest(keys, rows.table["expires_at"])
    assert len(deadlines) == 10
    index[keys[0]].expires_at = 500.0  # used: later
    index[keys[1]].expires_at = 50.0  # earlier, which is said
    deadlines.watch(keys[1], index[keys[1]])
    deadlines.unwatch(index[keys[2]])
    del index[keys[2]]
    index[keys[3]] = Meta(0.0, 1e9, 1e9, 1)  # put again
    deadlines.watch(keys[3], index[keys[3]])
    assert deadlines.due(99.0, 100) == [keys[1]]
    del index[keys[1]]
    assert deadlines.due(99.0, 100) == []
    assert awake(index) == 2, "who is not due is not asked for"
    assert deadlines.due(104.0, 3) == []
    assert deadlines.behind, "it looked at three that are not due, of five"
    assert deadlines.due(104.0, 3) == [keys[4]]
    assert not deadlines.behind
    assert deadlines.due(499.0, 100) == keys[5:]
    assert deadlines.due(501.0, 100) == [keys[0]]
    assert len(deadlines) == 1


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_an_order_takes_over_the_keys_of_each_lane_as_they_were_used(policy: str) -> None:
    keys = [Key(b"%d" % n) for n in range(9)]
    owners = [NOBODY, Owner("t", lane="t"), Owner("t", "n", lane="t")]
    owner = np.array([n % 3 for n in range(9)])
    order = Order(policy_named(policy), owner_of=lambda key: owners[int(key) % 3])
    order.recover(keys, np.array([8, 3, 0, 4, 1, 2]), owners, owner)
    assert list(order) == [keys[n] for n in (3, 0, 8, 4, 1, 2)]
    assert order.keys_now() == list(order)
    assert keys[5] not in order


class Checks:
    """What was checked and how, and whether the directory had changed by the time that a check was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.how: list[str] = []
        self.changed: list[str] = []
        self._path = path
        begin, wait = Check.__init__, Check.problem

        def begun(check: Check, index: Path, timeout_s: float, how: str) -> None:
            self.how.append(how)
            begin(check, index, timeout_s, how)
            self.before = self._files()

        def waited(check: Check) -> str | None:
            now = self._files()
            self.changed += [name for name in {*now, *self.before} if now.get(name) != self.before.get(name)]
            return wait(check)

        monkeypatch.setattr(Check, "__init__", begun)
        monkeypatch.setattr(Check, "problem", waited)

    def _files(self) -> dict[str, str]:
        held = [self._path / "index" / "data.mdb", *(self._path / "segments").glob("*")]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in held}


def filled(config: StoreConfig, clock: ManualClock, **state: object) -> Path:
    """A directory with entries, one of them expired by now, whose STATE says so much besides."""
    with opened(config, clock) as store:
        for n in range(200):
            store.put(b"%d" % n, value(n), ttl_s=10.0 if n == 7 else 1e6)
    clock.advance(20.0)
    path = Path(config.cold.path or "")
    said = json.loads((path / "STATE").read_text())
    (path / "STATE").write_text(json.dumps({**said, **state}))
    return path


def state_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "STATE").read_text())
    return found


@pytest.mark.parametrize(
    ("state", "how"),
    [
        ({}, ["quick"]),
        ({"clean": False}, ["read", "bytes"]),
        ({"clean": False, "loading": True}, ["whole"]),
        ({"clean": False, "loading": None}, ["whole"]),
    ],
    ids=["in order", "killed", "killed while it loaded", "an older version"],
)
def test_nothing_is_written_before_the_index_is_known_to_be_sound(
    config: StoreConfig, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, state: dict[str, object], how: list[str]
) -> None:
    path = filled(config, clock, **state)
    checks = Checks(monkeypatch, path)
    with opened(config, clock) as store:
        assert len(store._r.index) == 199
        assert state_of(path) | {"boot_id": ""} == {"format": 2, "clean": False, "boot_id": "", "loading": False}
    assert checks.how == how
    assert checks.changed == []


def test_a_start_that_was_killed_while_it_loaded_says_so(
    config: StoreConfig, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(config, clock, clean=False)
    seen: list[bool] = []
    wait = Check.problem

    def waited(check: Check) -> str | None:
        seen.append(state_of(path)["loading"])
        return wait(check)

    monkeypatch.setattr(Check, "problem", waited)
    opened(config, clock).close()
    assert seen[1:] == [True]


@pytest.mark.parametrize("dies", [False, True], ids=["reads it all", "stumbles over it"])
def test_damage_that_only_the_bytes_show_empties_the_directory(
    config: StoreConfig,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dies: bool,
) -> None:
    caplog.set_level(logging.CRITICAL)
    path = filled(config, clock, clean=False)
    data = path / "index" / "data.mdb"
    found = bytearray(data.read_bytes())
    for leaf in range(2 * PAGE, len(found), PAGE):
        if found[leaf + 10 : leaf + 12] == b"\2\0":
            found[leaf] ^= 0x80  # LMDB does not look at the number that a page has of itself
    data.write_bytes(found)
    whole = recovery.recover
    read = iter([lambda *_: 1 // 0] if dies else [])
    monkeypatch.setattr("kvstore.disk.record_log.recover", lambda *args: next(read, whole)(*args))  # noqa: PLW0108 - asked anew each time
    with opened(config, clock) as store:
        assert len(store._r.index) == 0
        stats = store._r.cold.stats()  # type: ignore[union-attr]
        assert stats.quarantined is not None
        assert "check ended with 1" in stats.quarantined
        store.put(b"new", value(5), fidelity="exact")
        store.drain()
    with opened(config, clock) as store:
        assert torch.equal(store.get(b"new").tensors["x"], value(5)["x"])  # type: ignore[union-attr]
    assert len(list((path / "quarantine").iterdir())) == 1


def test_a_large_index_has_more_time_for_its_check(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with (index / "data.mdb").open("wb") as file:
        file.truncate(opening.VERIFY_NBYTES_PER_S * 30)
    check = Check(index, 60.0, "bytes")
    assert check._timeout_s == 90.0
    check.end()
