"""The share of the memory for hot with `split = "auto"`, learned from hits by depth.

Hot and warm share their two budgets, and the border between them moves in steps. A step of warm holds 7.4 times the
entries of a step of hot where they are float32, 3.7 times where they are bfloat16 or float16, and as many where they
are of a type that is never encoded; but a hit in hot needs no decoding. The gain or loss of moving the border by some
steps is counted from hits and misses, by depth:

    ghosts   keys that left memory, in order: a get of one is a prefill that a larger warm would have saved
    tails    hits in the deepest steps of a tier, which a smaller tier would have lost
    top      hits in warm of entries that a larger hot would still hold

The depth of a ghost is the bytes that left after it. The depth of a hit is its idle time compared with that of the
tier's oldest entry, so no entry stores a position.
Not thread-safe: the store's lock covers each call.
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal

from kvstore.dtypes import BY_NAME, LOSSY_ALLOWED
from kvstore.entries.entry import TENSOR_OVERHEAD_NBYTES, EncodedTensor
from kvstore.keys import Key
from kvstore.tiers.memory import MemoryTier

STEPS = 32
"""Steps into which the memory is cut: the border settles within a few per cent of the best."""
DECODE_COST = 0.05
"""As a share of a prefill: decoding a chunk runs at memory speed, computing it takes a forward pass of the model."""
VALUE_BITS = 4.35
"""Of a value in warm, as NF4 with its scales: 4.1 to 4.4."""
DENSITY_MIN = 3.7
"""Bytes in hot for a byte in warm where the type of a value is not known: those of 16 bits, which engines hold."""
EVENTS_MIN = 64
"""Events between two decisions: fewer are noise."""
MOVE_MAX = 2
"""Steps per decision at most: the counts are valid for the present border."""
GHOSTS_MAX = 65_536
"""About 10 MB of keys."""
TRIM_MAX = 64
"""Ghosts dropped at one departure: one large entry may make all of them too old at once."""


def packed_nbytes(tensors: Mapping[str, EncodedTensor]) -> int:
    """Bytes that tensors take in warm, by the type of each. Looks at no part of a raw one: it may be on a device."""
    return sum(
        of.nbytes
        if of.encoding != "raw"
        else int(of.spec.nbytes * VALUE_BITS / (8 * BY_NAME[of.spec.dtype].itemsize))
        if of.spec.dtype in LOSSY_ALLOWED
        else of.spec.nbytes + TENSOR_OVERHEAD_NBYTES
        for of in tensors.values()
    )


class Balance:
    """Counts hits by depth and decides where the border should be. hot_nbytes: the budget that hot should have now."""

    def __init__(self, hot: MemoryTier, warm: MemoryTier) -> None:
        self._tiers = {"hot": hot, "warm": warm}
        self.total_nbytes = hot.capacity_nbytes + warm.capacity_nbytes
        self.step_nbytes = max(1, self.total_nbytes // STEPS)
        self.hot_nbytes = hot.capacity_nbytes
        self._ghosts: OrderedDict[Key, int] = OrderedDict()
        self._left_nbytes = 0
        self._oldest_s = {"hot": 0.0, "warm": 0.0}
        self._avoidable, self._hot_tail, self._warm_tail, self._warm_top = ([0.0] * STEPS for _ in range(4))
        self._events = 0

    def resize(self, hot_nbytes: int, warm_nbytes: int) -> None:
        """Other budgets: the border goes where they put it, and is learned from there."""
        self.total_nbytes = hot_nbytes + warm_nbytes
        self.step_nbytes = max(1, self.total_nbytes // STEPS)
        self.hot_nbytes = hot_nbytes
        for by_step in (self._avoidable, self._hot_tail, self._warm_tail, self._warm_top):
            by_step[:] = [0.0] * STEPS
        self._events = 0

    def left(self, key: Key, nbytes: int) -> None:
        """Note that an entry left memory. nbytes: its bytes in warm."""
        self._left_nbytes += nbytes
        self._ghosts.pop(key, None)
        self._ghosts[key] = self._left_nbytes
        for _ in range(TRIM_MAX):
            oldest = next(iter(self._ghosts.values()))
            if len(self._ghosts) <= GHOSTS_MAX and oldest >= self._left_nbytes - self.hot_nbytes:
                break
            self._ghosts.popitem(last=False)

    def put(self, key: Key) -> None:
        """Note a put of a key: if it left memory lately, a larger warm would have kept it."""
        left_at = self._ghosts.pop(key, None) if self._ghosts else None
        if left_at is not None:
            self._count(self._avoidable, self._left_nbytes - left_at)

    def hit(self, tier: Literal["hot", "warm"], idle_s: float, density: float = 1.0) -> None:
        """Note a hit in memory. idle_s: seconds since the last use. density: the entry's bytes in hot for one here."""
        oldest_s, own = self._oldest_s[tier], self._tiers[tier]
        depth = int(min(1.0, idle_s / oldest_s) * own.used_nbytes) if oldest_s > 0 else 0
        from_below = max(0, own.capacity_nbytes - depth)
        if tier == "hot":
            self._count(self._hot_tail, from_below)
        else:
            self._count(self._warm_tail, from_below)
            self._count(self._warm_top, int(depth * density))

    def _count(self, by_step: list[float], nbytes: int) -> None:
        step = nbytes // self.step_nbytes
        if step < STEPS:
            by_step[step] += 1
            self._events += 1

    def observe(self, tier: Literal["hot", "warm"], oldest_s: float) -> None:
        """Note for how many seconds a tier's oldest entry has been idle."""
        self._oldest_s[tier] = oldest_s

    def decide(self) -> int:
        """The budget that hot should have, in bytes."""
        if self._events < EVENTS_MIN:
            return self.hot_nbytes
        shrink = _best(self._avoidable, self._hot_tail, 1.0, DECODE_COST)
        grow = _best(self._warm_top, self._warm_tail, DECODE_COST, 1.0)
        steps = 0
        # Only for a clear gain: each move costs the encoding of one step.
        if max(shrink[0], grow[0]) > 1.0:
            steps = -min(shrink[1], MOVE_MAX) if shrink[0] > grow[0] else min(grow[1], MOVE_MAX)
        wanted = self.hot_nbytes + steps * self.step_nbytes
        self.hot_nbytes = min(max(wanted, self.step_nbytes), self.total_nbytes - self.step_nbytes)
        for by_step in (self._avoidable, self._hot_tail, self._warm_tail, self._warm_top):
            by_step[:] = [count / 2 for count in by_step]
        self._events = 0
        return self.hot_nbytes


def _best(gained: list[float], lost: list[float], gain: float, loss: float) -> tuple[float, int]:
    """(gain, steps) of the best move."""
    worths = accumulate(gain * a - loss * b for a, b in zip(gained, lost, strict=True))
    worth, steps = max((worth, -steps) for steps, worth in enumerate(worths, start=1))
    return worth, -steps
