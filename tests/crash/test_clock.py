"""The wall clock steps, both ways and over restarts: no wrong bytes, no life beyond the rule, nothing comes back.

The rule: at a start no deadline is further away than its TTL, and nothing began in the future. So a clock that steps
back lets an entry live one TTL more from then, once; one that steps forward expires what is due. The first run of this
found that each restart after a step back gave one TTL more: what is clamped is written down since.
"""

import logging
import random
from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store
from tests.crash.history import say, seeds

KEYS = 12
STEPS = [-40 * 365 * 86_400.0, -30 * 86_400.0, -3_600.0, -5.0, 0.0, 5.0, 3_600.0, 30 * 86_400.0]


def key_of(n: int) -> bytes:
    return b"clock-%02d" % n


def opened(path: Path, clock: ManualClock) -> Store:
    cold = ColdConfig(path=str(path), capacity_nbytes=64 << 20)
    config = StoreConfig(hot=HotConfig(8 << 10), warm=WarmConfig(8 << 10), cold=cold)
    return Store.open(config, clock=clock, background=False)


class Life:
    """One directory through restarts. alive: the version of each key that may be there; gone: never again."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.path = path
        self.clock = ManualClock()
        self.store = opened(path, self.clock)
        self.alive: dict[int, int] = {}
        self.ttl: dict[int, float] = {}
        self.version = 0
        self.checked = 0

    def step(self) -> None:
        kind = self.rng.random()
        if kind < 0.5:
            n = self.rng.randrange(KEYS)
            self.version += 1
            self.alive[n], self.ttl[n] = self.version, self.rng.choice([10.0, 600.0, 7_200.0])
            value = torch.full((500,), self.version, dtype=torch.int64)
            self.store.put(key_of(n), {"x": value}, ttl_s=self.ttl[n])
        elif kind < 0.8:
            self.look(self.rng.randrange(KEYS))
        elif kind < 0.9:
            self.clock.advance(self.rng.choice([1.0, 30.0, 1_000.0]))
            self.store.maintain()
        else:
            self.restart()

    def look(self, n: int) -> None:
        hit, info = self.store.get(key_of(n)), self.store.inspect(key_of(n))
        self.checked += 1
        if hit is None:
            self.alive.pop(n, None)  # a miss is for good: from here on only a put brings the key back
            return
        assert n in self.alive, f"LIE: key {n} came back"
        assert hit.tensors["x"].unique().tolist() == [self.alive[n]], f"LIE: key {n} has another value"
        assert info is not None
        assert info.ttl_left_s is not None
        assert 0 < info.ttl_left_s <= self.ttl[n], f"key {n} lives {info.ttl_left_s} s, its TTL is {self.ttl[n]} s"
        assert info.age_s >= 0

    def restart(self) -> None:
        """In order, with the clock elsewhere afterwards."""
        due = {
            n: info.ttl_left_s
            for n in range(KEYS)
            if (info := self.store.inspect(key_of(n))) is not None and info.ttl_left_s is not None
        }
        self.store.close()
        by_s = self.rng.choice(STEPS)
        self.clock = ManualClock(max(0.0, self.clock.now() + by_s))
        self.store = opened(self.path, self.clock)
        for n in range(KEYS):
            info = self.store.inspect(key_of(n))
            if n not in due or due[n] <= by_s:
                assert info is None, f"key {n} outlived its deadline by a step of {by_s} s"
                self.alive.pop(n, None)
            elif by_s >= 0:
                assert info is not None, f"key {n} is lost after a step of {by_s} s with {due[n]} s to live"
                assert info.ttl_left_s == pytest.approx(due[n] - by_s, abs=1e-3)
            else:
                assert info is not None
                assert info.ttl_left_s is not None
                assert info.ttl_left_s <= self.ttl[n]


def test_the_clock_steps_over_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    checked = 0
    for seed in seeds(6, "clock steps"):
        life = Life(tmp_path / str(seed), seed)
        try:
            for _ in range(120):
                life.step()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None
        finally:
            life.store.close()
        checked += life.checked
    say(f"clock steps: {checked} values checked, 0 lies")
