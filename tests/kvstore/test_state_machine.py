"""Any sequence of verbs, against a plain dictionary: a get gives the value put, its one NF4 form, or nothing."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.arrays import as_bytes
from kvstore.clock import ManualClock
from kvstore.codecs import decode_entry, encode_entry
from kvstore.codecs.by_role import ByRole
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
MIB = 1 << 20


@dataclass
class Expected:
    """What the dictionary knows of a key."""

    tensors: dict[str, torch.Tensor]
    nf4: dict[str, torch.Tensor]
    ttl_s: float
    expires_at: float
    exact: bool
    sliding: bool
    pinned: bool = False


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Values as comparable bytes."""
    return {name: as_bytes(x).tobytes() for name, x in tensors.items()}


class VerbsAgainstADictionary(RuleBasedStateMachine):
    """Roomy tiers: nothing may be lost but by deadline or delete. Tight ones: anything may be lost, nothing changed."""

    hot_nbytes = 4 * MIB
    warm_nbytes = 4 * MIB
    cold = True
    forgets = False

    @initialize()
    def open_store(self) -> None:
        """An empty store on a clock of our own."""
        self.clock = ManualClock()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
        self.config = StoreConfig(
            hot=HotConfig(self.hot_nbytes),
            warm=WarmConfig(self.warm_nbytes),
            cold=ColdConfig(path=str(self.folder / "cold") if self.cold else None, capacity_nbytes=8 * MIB),
        )
        self.store = Store.open(self.config, clock=self.clock, background=False)
        self.model: dict[bytes, Expected] = {}
        self.first_lossy: dict[bytes, dict[str, bytes]] = {}

    def teardown(self) -> None:
        """Close and leave nothing behind."""
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    def live(self, key: bytes) -> Expected | None:
        """The dictionary's entry, unless it has expired."""
        expected = self.model.get(key)
        if expected is not None and not expected.pinned and self.clock.now() >= expected.expires_at:
            del self.model[key]
            return None
        return expected

    @rule(
        key=KEYS,
        seed=st.integers(0, 1 << 30),
        rows=st.integers(1, 40),
        ttl_s=st.sampled_from([5.0, 50.0, 3600.0]),
        exact=st.booleans(),
        sliding=st.booleans(),
    )
    def put(self, key: bytes, seed: int, rows: int, ttl_s: float, exact: bool, sliding: bool) -> None:
        """A new value, or another one under the same key."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 64, generator=generator)
        tensors = {"k": x, "n": torch.arange(rows)}
        try:
            self.store.put(key, tensors, ttl_s=ttl_s, fidelity="exact" if exact else "auto", sliding=sliding)
        except OverQuota:
            # Pins leave it no room. The value before it may be gone, as after any put.
            assert self.forgets
            assert any(expected.pinned for expected in self.model.values())
            if self.store.inspect(key) is None:
                self.model.pop(key, None)
            return
        nf4 = decode_entry(encode_entry(raw_entry(Key(key), {n: t.clone() for n, t in tensors.items()}), ByRole()))
        self.model[key] = Expected(tensors, nf4, ttl_s, self.clock.now() + ttl_s, exact, sliding)

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        """The value, or its NF4 form if it is not exact, or nothing."""
        expected = self.live(key)
        hit = self.store.get(key)
        if expected is None:
            assert hit is None
            return
        if hit is None:
            assert self.forgets
            del self.model[key]
            return
        if hit.lossy:
            assert not expected.exact
            assert bits(dict(hit.tensors)) == bits(expected.nf4)
        else:
            assert bits(dict(hit.tensors)) == bits(expected.tensors)
        if expected.sliding:
            expected.expires_at = self.clock.now() + expected.ttl_s

    @rule(key=KEYS, deleted=st.booleans())
    def get_counted_later(self, key: bytes, deleted: bool) -> None:
        """What hot holds is handed out and counted afterwards, also where it is gone by then."""
        expected = self.live(key)
        if expected is None or self.store._r.hot.get(Key(key)) is None:
            return
        found = self.store.plan([key], count_later=True)
        assert found.hot
        got = {name: held.parts[""] for name, held in found.entries[0].tensors.items()}
        assert bits(got) == bits(expected.nf4 if found.entries[0].lossy else expected.tensors)
        if deleted:
            self.delete(key)
        hits = self.store.stats().tiers["hot"].hits
        self.store.settle()
        assert self.store.stats().tiers["hot"].hits == hits, "stats counts what is due"
        if expected.sliding:
            expected.expires_at = self.clock.now() + expected.ttl_s

    @rule(keys=st.lists(KEYS, unique=True, max_size=4))
    def match(self, keys: list[bytes]) -> None:
        """As many leading keys as the dictionary has."""
        due = 0
        while due < len(keys) and self.live(keys[due]) is not None:
            due += 1
        held = self.store.match(keys)
        assert held <= due
        assert held == due or self.forgets

    @rule(keys=st.lists(KEYS, unique=True, max_size=4), ttl_s=st.sampled_from([None, 20.0]))
    def touch(self, keys: list[bytes], ttl_s: float | None) -> None:
        """Sliding deadlines move."""
        held = [key for key, at in zip(keys, self.store.locate(keys), strict=True) if at is not None]
        assert self.store.touch(keys, ttl_s=ttl_s) == len(held)
        for key in held:
            expected = self.live(key)
            assert expected is not None
            if expected.sliding:
                expected.ttl_s = ttl_s or expected.ttl_s
                expected.expires_at = self.clock.now() + expected.ttl_s

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        """Gone."""
        held = self.live(key) is not None
        assert self.store.delete(key) == held or self.forgets
        self.model.pop(key, None)

    @rule(key=KEYS, pinned=st.booleans())
    def pin(self, key: bytes, pinned: bool) -> None:
        """Kept, or let go."""
        expected = self.live(key)
        try:
            changed = self.store.pin(key) if pinned else self.store.unpin(key)
        except OverQuota:
            assert self.forgets
            return
        assert changed == (expected is not None) or self.forgets
        if changed and expected is not None:
            expected.pinned = pinned
            if not pinned:
                expected.expires_at = self.clock.now() + expected.ttl_s

    @rule(seconds=st.sampled_from([1.0, 4.0, 30.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; the maintainer has its turn."""
        self.clock.advance(seconds)
        self.store.maintain()

    @rule(key=KEYS)
    def demote(self, key: bytes) -> None:
        """Down one tier."""
        self.store.demote(key)

    @rule(key=KEYS)
    def promote(self, key: bytes) -> None:
        """Up to hot."""
        self.store.promote(key)

    @rule()
    def restart(self) -> None:
        """Close and open again: with a disk nothing is lost, without one everything is."""
        self.store.close()
        self.store = Store.open(self.config, clock=self.clock, background=False)
        if not self.cold:
            self.model.clear()

    @invariant()
    def budgets_hold(self) -> None:
        """Nothing holds more than it may, and the index knows exactly what is held."""
        if not hasattr(self, "store"):
            return
        r = self.store._r
        for tier in (r.hot, r.warm):
            entries = [tier.get(key) for key in list(tier.keys())]
            assert tier.used_nbytes == sum(entry.nbytes for entry in entries if entry is not None)
            assert tier.used_nbytes <= tier.capacity_nbytes
        assert not r.transit
        assert all(r.tiers_of(key) for key in r.index)
        for key in [*r.hot.keys(), *r.warm.keys()]:
            assert key in r.index
            held = r.hot.get(key)
            if held is not None and held.lossy:
                assert key in r.warm or r.in_cold(key), "a lossy copy outlived its encoded form"


class TightMemory(VerbsAgainstADictionary):
    """No disk, and room for a few entries only."""

    hot_nbytes = 20_000
    warm_nbytes = 8_000
    cold = False
    forgets = True


class TightWithDisk(VerbsAgainstADictionary):
    """Everything overflows into the next tier."""

    hot_nbytes = 14_000
    warm_nbytes = 5_000
    forgets = True


# Not Phase.explain: it traces every line of the shortened run, which then meets pytest's timeout and says nothing.
_SETTINGS = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck),
    phases=set(Phase) - {Phase.explain},
)  # fmt: skip
TestRoomy = VerbsAgainstADictionary.TestCase
TestRoomy.settings = _SETTINGS
TestTightMemory = TightMemory.TestCase
TestTightMemory.settings = _SETTINGS
TestTightWithDisk = TightWithDisk.TestCase
TestTightWithDisk.settings = _SETTINGS
