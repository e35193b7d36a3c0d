"""The longest time that a verb holds the store's lock, with a million entries held: a third of them under one root, a
third in one chain, the rest alone. Calls name as many keys as a call may.

.venv/bin/python bench/lock_hold.py --json

Times are of the processor: by the wall clock thousands of holds meet whatever else the machine does (`wall_ms`).
Entries have no tensors: index, tiers, chains and deadlines are the store's own, and no value is read under the lock.
"""

# ruff: noqa: SLF001 - fills a store without tensors, and times its own lock

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.keys import KEYS_PER_CALL_MAX, Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.slices import SLICE
from kvstore.residency.state import Lock
from kvstore.simulation.simulator import LAYOUTS, Setup, SizedTranscoder
from kvstore.simulation.trace import block_key
from kvstore.store import Store
from kvstored.host.process import GC_THRESHOLDS

DUE_MS = 5.0
ROUNDS = 3
"""Of verbs that change nothing that counts: the best is taken, since other processes share the machine."""


class TimedLock(Lock):
    """The store's lock, which notes how long each hold was. cpu_s, wall_s: the longest by each of the two clocks."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._began = 0.0, 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.cpu_s = self.wall_s = 0.0
        self.holds = 0

    def __enter__(self) -> bool:
        self.acquire()
        self._depth += 1
        if self._depth == 1:
            self._began = time.thread_time(), time.perf_counter()
        entered = super().__enter__()
        self.release()  # `super` took it once more
        return entered

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            cpu, wall = self._began
            self.holds += 1
            self.cpu_s = max(self.cpu_s, time.thread_time() - cpu)
            self.wall_s = max(self.wall_s, time.perf_counter() - wall)
        super().__exit__(*error)  # type: ignore[arg-type]


class Filled:
    """A store with many entries, and the calls that are measured."""

    def __init__(self, store: Store, entries: int) -> None:
        self.store = store
        self.lock = store._r.lock = TimedLock()
        self._transcoder = store._mover._transcoder = SizedTranscoder(
            Setup(1 << 40, layout=LAYOUTS["smollm2-135m"]), store._r
        )
        third = entries // 3
        self.root, self.wide = Key(b"root"), [Key(block_key(n)) for n in range(third)]
        self.chain = [Key(block_key(n)) for n in range(third, 2 * third)]
        self.alone = [Key(block_key(n)) for n in range(2 * third, entries)]
        self._next = 1 << 40
        self.put([self.root], None)
        for key in self.wide:
            self.put([key], self.root, use=False)
        before: Key | None = None
        for start in range(0, third, KEYS_PER_CALL_MAX):
            part = self.chain[start : start + KEYS_PER_CALL_MAX]
            self.put(part, before)
            before = part[-1]
        for key in self.alone:
            self.put([key], None)
        self.filling = self.lock.cpu_s, self.lock.wall_s, self.lock.holds

    def put(self, keys: Sequence[Key], parent: Key | None, *, use: bool = True, ttl_s: float = 86400.0) -> None:
        """Put a chain. use: as a put of a chain, which counts as use of what it continues."""
        now = self.store._r.clock.now()
        made = ((self._transcoder.raw(key), Meta(now, now + ttl_s, ttl_s, 1)) for key in reversed(keys))
        path = self.store._write_path
        if use:
            # A list, as from a door: a short one of new keys is taken at once.
            path.take_chain(keys, list(made) if len(keys) <= SLICE else made, parent)
            return
        for entry, meta in made:
            meta.parent = parent
            path._take(entry, meta)

    def verbs(self) -> Iterator[tuple[str, Callable[[], object], int]]:
        """(name, call, rounds), in an order in which each finds what it needs."""
        s, most = self.store, KEYS_PER_CALL_MAX
        some, deep = self.alone[:most], self.chain[-most:]
        for name, keys in (("alone", some), ("wide", self.wide[:most]), ("chain", deep)):
            yield f"get {name}", lambda keys=keys: s.plan(keys), ROUNDS
            yield f"touch {name}", lambda keys=keys: s.touch(keys, ttl_s=50_000.0), ROUNDS
        yield "match", lambda: s.match(self.chain[:most]), ROUNDS
        yield "locate", lambda: s.locate(some), ROUNDS
        yield "stats", s.stats, ROUNDS
        yield "list", lambda: next(iter(s.entries(limit=1))), ROUNDS
        yield "explain", lambda: s.explain(*some), ROUNDS
        yield "unpin the root, many times", lambda: s.unpin(*[self.root] * most), ROUNDS
        yield "put over the root", lambda: self.put([self.root], None), ROUNDS
        yield "put new ones at once", self._put_new, ROUNDS
        yield "put behind a long chain", lambda: self.put([Key(b"end")], self.chain[-1]), ROUNDS
        yield "pin the end of a long chain", lambda: s.pin(self.chain[-1]), 1
        yield "unpin a long chain", lambda: s.unpin(*self.chain[:most]), ROUNDS
        yield "pin many", lambda: s.pin(*some), 1
        yield "unpin many", lambda: s.unpin(*some), 1
        yield "demote the root", lambda: s.demote(self.wide[0]), 1
        yield "delete many", lambda: s.delete(*self.alone[:most]), 1
        yield "evict many", lambda: s.evict(*self.alone[most : 2 * most]), 1
        yield "new tenant", lambda: s.register_tenant("t", [b"0123456789abcdef"]), 1
        yield "shrink hot", lambda: s.set_hot_capacity(s._r.hot.used_nbytes * 99 // 100), 1
        yield "delete the root", lambda: s.delete(self.root), 1
        yield "delete a long chain", lambda: s.delete(self.chain[0]), 1
        yield "get expired", self._expire, 1
        yield "sweep", s.maintain, 1

    def _put_new(self) -> None:
        self._next += SLICE
        self.put([Key(block_key(self._next + i)) for i in range(SLICE)], None)

    def _expire(self) -> None:
        clock = self.store._r.clock
        assert isinstance(clock, ManualClock)
        clock.advance(100_000.0)
        self.store.plan(self.alone[-KEYS_PER_CALL_MAX:])

    def longest(self, call: Callable[[], object], rounds: int) -> tuple[float, float, int]:
        """(seconds of processor, of wall clock, holds) of the longest hold of a call, in the best round."""
        found: list[tuple[float, float, int]] = []
        for _ in range(rounds):
            self.lock.reset()
            call()
            found.append((self.lock.cpu_s, self.lock.wall_s, self.lock.holds))
        return min(found)


def report(rows: Iterable[tuple[str, float, float, int]], entries: int, *, as_json: bool, last: bool = True) -> None:
    """One line a verb, and one of the longest. last: with that one."""
    worst = 0.0
    for verb, cpu_s, wall_s, holds in rows:
        worst = max(worst, cpu_s)
        line = {"name": "lock_hold", "params": {"verb": verb, "entries": entries, "holds": holds,
                "wall_ms": round(1000 * wall_s, 3)}, "value": round(1000 * cpu_s, 3), "unit": "ms"}  # fmt: skip
        shown = f"{verb:32} {1000 * cpu_s:8.2f} ms, {1000 * wall_s:8.2f} by the wall clock; {holds} holds"
        print(json.dumps(line) if as_json else shown, flush=True)
    if not last:
        return
    line = {"name": "lock_hold", "params": {"verb": "longest", "entries": entries},
            "value": round(1000 * worst, 3), "unit": "ms", "ratios": {"due": DUE_MS / (1000 * worst)}}  # fmt: skip
    print(json.dumps(line) if as_json else f"{'longest':32} {1000 * worst:8.2f} ms, due {DUE_MS} ms")


def main() -> None:
    """Fill, and measure each verb."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--entries", type=int, default=1_000_000)
    args = parser.parse_args()
    with ExitStack() as stack:
        config = StoreConfig(hot=HotConfig(1 << 50), warm=WarmConfig(1 << 50))
        store = stack.enter_context(Store.open(config, clock=ManualClock(), background=False))
        gc.disable()
        filled = Filled(store, args.entries)
        gc.enable()
        # As the daemon sets the garbage collector: what was made to fill the store is not looked through again, and a
        # full collection is rare. In a process that does not do so, each of them takes as long as this one.
        began = time.thread_time(), time.perf_counter()
        gc.collect()
        collected = time.thread_time() - began[0], time.perf_counter() - began[1], 1
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        verbs = ((name, *filled.longest(call, rounds)) for name, call, rounds in filled.verbs())
        report([("a full garbage collection", *collected)], args.entries, as_json=args.json, last=False)
        report(chain([("put, until all are held", *filled.filling)], verbs), args.entries, as_json=args.json)


if __name__ == "__main__":
    main()
