"""What a store of a given size would do with a trace: the real read path, write path, mover, tiers and policies,
without tensors.

Only sizes are simulated: entries are sizes (`SizedTensors`), the transcoder computes sizes (`SizedTranscoder`), the
disk is a tier in memory (`SizedCold`). So a laptop can simulate a terabyte, and all decisions are made by the daemon's
code. Also the upper bound: the offline optimum for prefix chains (`optimum`), which knows the future. Python bounds its
speed: a put goes through every check and counter of the store. docs/prefixes.md has figures.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import cast

from kvstore.checks import check_range
from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.entries.compact import PACK_MAX_NBYTES, PACKED_OVERHEAD_NBYTES
from kvstore.entries.entry import ENTRY_OVERHEAD_NBYTES, TENSOR_OVERHEAD_NBYTES, EncodedTensor, Entry
from kvstore.errors import ConfigError
from kvstore.hit import Verified
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.maintainer import Maintainer
from kvstore.residency.mover import NO_KEY, Mover
from kvstore.residency.opening import residency_of
from kvstore.residency.read_path import ReadPath
from kvstore.residency.state import Residency
from kvstore.residency.write_path import WritePath
from kvstore.simulation.trace import BLOCK_TOKENS, TRACE_KEY_NBYTES, Request, block_key
from kvstore.tiers import TierName
from kvstore.tiers.admission import Admission
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.order import Order

DAY_S = 86_400.0
DTYPE_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NF4_VALUE_NBYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Half a byte of code, a byte of scale for 64 values, four for 256 scales."""
RECORD_NBYTES = 640
"""Header and row of a record on disk."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The numbers that a model keeps per token: layers * kv_heads * head_dim, for K and for V."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def token_values(self) -> int:
        """K and V of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


LAYOUTS = {
    "llama3-8b": Layout(32, 8, 128),
    "llama3-70b": Layout(80, 8, 128),
    "qwen2.5-7b": Layout(28, 4, 128),
    "smollm2-135m": Layout(30, 3, 64),
}


def layout_of(text: str) -> Layout:
    """A layout by name, or as "LAYERSxKV_HEADSxHEAD_DIM". Raises ConfigError."""
    if text in LAYOUTS:
        return LAYOUTS[text]
    parts = text.split("x")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,6}", part) for part in parts):
        known = ", ".join(LAYOUTS)
        raise ConfigError(f"a layout is one of {known}, or LAYERSxKV_HEADSxHEAD_DIM such as 32x8x128, got {text!r:.80}")
    return Layout(*map(int, parts))


@dataclass(frozen=True, slots=True)
class Setup:
    """What to simulate. hot_fraction: the share of RAM that holds tensors as put, the rest holds NF4; if
    `store.split` is "auto", the share at the start.
    """

    ram_nbytes: int
    disk_nbytes: int = 0
    hot_fraction: float = 0.1
    layout: Layout = LAYOUTS["llama3-8b"]
    dtype: str = "float32"
    block_tokens: int = BLOCK_TOKENS
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        check_range("ram_nbytes", self.ram_nbytes, 1, 1 << 50)
        check_range("disk_nbytes", self.disk_nbytes, 0, 1 << 50)
        check_range("hot_fraction", self.hot_fraction, 0, 1)
        check_range("block_tokens", self.block_tokens, 1, 1 << 20)
        if self.dtype not in DTYPE_NBYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_NBYTES)}, got {self.dtype!r}")

    @property
    def config(self) -> StoreConfig:
        """The store's configuration with these budgets."""
        hot = max(1, int(self.ram_nbytes * self.hot_fraction))
        cold = replace(self.store.cold, path=None, capacity_nbytes=max(self.disk_nbytes, 1 << 20))
        return replace(
            self.store, hot=HotConfig(hot), warm=WarmConfig(max(0, self.ram_nbytes - hot)), cold=cold,
            entry_max_nbytes=4 << 30,
        )  # fmt: skip

    @property
    def value_nbytes(self) -> int:
        """Bytes of one block's tensors."""
        return self.layout.token_values * self.block_tokens * DTYPE_NBYTES[self.dtype]


class SizedTensors(Mapping[str, EncodedTensor]):
    """Stands for an entry's tensors: the bytes that they would count."""

    __slots__ = ("encoding", "entry_nbytes", "nbytes")

    def __init__(self, nbytes: int, encoding: str) -> None:
        self.nbytes = nbytes
        self.entry_nbytes = nbytes + ENTRY_OVERHEAD_NBYTES + TRACE_KEY_NBYTES
        self.encoding = encoding

    def __getitem__(self, name: str) -> EncodedTensor:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class SizedEntry:
    """Stands for an `Entry`: its key and size. A frozen dataclass would take four times as long to make."""

    __slots__ = ("encoding", "kept_reply", "key", "lossy", "nbytes", "tensors")

    def __init__(self, key: Key, tensors: SizedTensors, *, lossy: bool) -> None:
        self.key = key
        self.tensors = tensors
        self.lossy = lossy
        self.nbytes = tensors.entry_nbytes
        self.encoding = tensors.encoding


def _nf4(values: int) -> SizedTensors:
    """A block of so many numbers in NF4."""
    nbytes = int(values * NF4_VALUE_NBYTES)
    beside = PACKED_OVERHEAD_NBYTES if nbytes <= PACK_MAX_NBYTES else 6 * TENSOR_OVERHEAD_NBYTES
    return SizedTensors(nbytes + beside, "nf4")


class SizedTranscoder:
    """A `Transcoder` for blocks of one size."""

    def __init__(self, setup: Setup, residency: Residency) -> None:
        self._r = residency
        values = setup.layout.token_values * setup.block_tokens
        self._raw = SizedTensors(setup.value_nbytes + 2 * TENSOR_OVERHEAD_NBYTES, "raw")
        self._nf4 = _nf4(values)

    def raw(self, key: Key) -> Entry:
        """A block as put."""
        return cast("Entry", SizedEntry(key, self._raw, lossy=False))

    def encode(self, entry: Entry, *, prefix_start: bool | None = None, namespace: str = "") -> Entry:
        """The size in NF4."""
        del prefix_start, namespace
        self._r.counters.encodes += 1
        return self.below(entry.key)

    def below(self, key: Key) -> Entry:
        """A block in NF4."""
        return cast("Entry", SizedEntry(key, self._nf4, lossy=True))

    def coarser(self, entry: Entry, *, namespace: str) -> Entry:
        """The entry itself: one form below hot."""
        del namespace
        return entry

    def exact(self, entry: Entry) -> Entry:
        """The entry itself."""
        return entry

    def restore(self, entry: Entry) -> Entry:
        """The size when decoded."""
        self._r.counters.decodes += 1
        return cast("Entry", SizedEntry(entry.key, self._raw, lossy=entry.lossy))


class SizedCold:
    """A `tiers.LastTier` with order and sizes, without records. A `MemoryTier` keeps its entries and their order."""

    name: TierName = "cold"

    def __init__(
        self, capacity_nbytes: int, order: Order, admission: Admission, on_drop: Callable[[Key, str], None]
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.admission = admission
        self._tier = tier = MemoryTier("cold", capacity_nbytes, order=order)
        self._on_drop = on_drop
        self.keys, self.touch = tier.keys, tier.touch
        self.pin, self.unpin, self.close = tier.pin, tier.unpin, tier.close
        self.let_go, self.take_back, self.tenants = tier.let_go, tier.take_back, tier.tenants
        self._owner_of = order.owner_of

    @property
    def used_nbytes(self) -> int:
        """Bytes counted now."""
        return self._tier.used_nbytes

    def __len__(self) -> int:
        return len(self._tier)

    def __contains__(self, key: object) -> bool:
        return key in self._tier

    def get(self, key: Key, *, seen: bool = False) -> Entry | None:
        """The entry."""
        del seen
        return self._tier.get(key)

    def put(self, entry: Entry) -> None:
        """Hold an entry."""
        self._tier.put(entry)
        self.admission.wrote(entry.nbytes)

    def displace(self, entry: Entry) -> None:
        """Evict until an entry fits."""
        owner = self._owner_of(entry.key)
        while (victim := self._tier.displace(entry.nbytes, entry.key, owner)) is not None:
            self.admission.left(victim.key)
            self._on_drop(victim.key, "evicted")

    def resize(self, nbytes: int, pin_max_nbytes: int) -> int:
        """Another budget."""
        self.capacity_nbytes, before = nbytes, len(self._tier)
        self._tier.resize(nbytes, pin_max_nbytes)
        while (victim := self._tier.displace(0, NO_KEY)) is not None:
            self._on_drop(victim.key, "evicted")
        return before - len(self._tier)

    def queue_removal(self, key: Key) -> None:
        """Forget at once."""
        self._tier.remove(key)

    def wait(self, ticket: int | None) -> None:
        """Return at once: no work is pending."""

    def flush(self) -> None:
        """Do nothing: no work is pending."""

    def flush_meta(self) -> None:
        """Do nothing: there is no disk."""

    def maintain(self) -> None:
        """Do nothing: there is no periodic work."""

    def verify(self) -> Iterator[Verified]:
        """Yield nothing: there are no records."""
        return iter(())

    def gauges(self) -> dict[str, float]:
        """No numbers."""
        return {}

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key."""
        entry = self._tier.get(key)
        return 0 if entry is None else entry.nbytes

    def specs_of(self, key: Key) -> None:
        """None: there are no tensors."""


def block_nbytes(setup: Setup) -> int:
    """Bytes that a tier counts for one block in NF4."""
    values = setup.layout.token_values * setup.block_tokens
    return SizedEntry(Key(b""), _nf4(values), lossy=True).nbytes


@dataclass(frozen=True, slots=True)
class Report:
    """A simulation's result. by_tier, by_encoding: hits. seconds: of the trace. hot_fraction: of RAM, at the end."""

    requests: int
    blocks: int
    hits: int
    puts: int
    by_tier: Mapping[str, int]
    by_encoding: Mapping[str, int]
    encodes: int
    promotions: int
    evictions: int
    disk_writes: int
    disk_nbytes_written: int
    seconds: float
    hot_fraction: float

    @property
    def hit_ratio(self) -> float:
        """Share of the block references that the longest resident prefixes cover."""
        return self.hits / self.blocks if self.blocks else 0.0

    @property
    def writes_per_put(self) -> float:
        """Records written for each block put."""
        return self.disk_writes / self.puts if self.puts else 0.0

    @property
    def nbytes_written_a_day(self) -> float:
        """Bytes written to disk per day, at the rate of this trace."""
        return self.disk_nbytes_written * DAY_S / self.seconds if self.seconds else 0.0


class Simulation:
    """A store without tensors. `request` feeds it; `report` may be asked for at any time."""

    def __init__(self, setup: Setup, clock: ManualClock | None = None) -> None:
        """clock: one that the hosts of a fleet have in common; the trace begins at its present time."""
        self._setup = setup
        self._clock = clock or ManualClock()
        self._start_s = self._clock.now()
        config = setup.config
        self._r = r = residency_of(config, self._clock)
        if setup.disk_nbytes:
            admission = Admission(config.cold.admission, config.cold.write_nbytes_per_day, self._clock)
            order = Order(chains=r.chains, owner_of=r.owner_of, tier="cold")
            r.cold = SizedCold(setup.disk_nbytes, order, admission, r.dropped_from_cold)
        self._transcoder = SizedTranscoder(setup, r)
        self._mover = mover = Mover(r, self._transcoder)
        self._write_path = WritePath(r, mover, config)
        self._maintainer = Maintainer(r, mover, config)
        self._read_path = ReadPath(r, config, self._maintainer.request_promotions)
        self._ttl_s = config.ttl_s
        self._value_nbytes = setup.value_nbytes
        self._now = self._start_s
        self._keys: dict[int, Key] = {}
        self._requests = self._blocks = self._hits = self._puts = 0
        self._at_s = 0.0

    def request(self, request: Request) -> int:
        """One prompt: the longest resident prefix is used, the rest is put. Returns the blocks hit."""
        return self._request(request, [self._key(block) for block in request.blocks])

    def _request(self, request: Request, keys: Sequence[Key]) -> int:
        self._at_s = max(self._at_s, request.at_s)
        self._clock.advance(max(0.0, self._start_s + self._at_s - self._clock.now()))
        self._now = self._clock.now()
        self._maintainer.run_once()
        self._bring(keys)
        plan = self._read_path.plan(keys, leading=True)
        for tier, meta in zip(plan.tiers, plan.metas, strict=True):
            if tier == "cold" and meta is not None:  # never read, so counted here
                self._r.counters.hits_in["cold", meta.encoding] += 1
        found = len(plan)
        rest = keys[found:]
        if rest:
            parent = keys[found - 1] if found else None
            self._puts += self._write_path.take_chain(rest, map(self._made, reversed(rest)), parent)
        self._requests += 1
        self._blocks += len(keys)
        self._hits += found
        return found

    def _bring(self, keys: Sequence[Key]) -> None:
        """Hold what others have of a chain: nothing, for a store by itself."""

    def _key(self, block: int) -> Key:
        key = self._keys.get(block)
        if key is None:
            key = self._keys[block] = Key(block_key(block))
        return key

    def _made(self, key: Key) -> tuple[Entry, Meta]:
        now, ttl_s = self._now, self._ttl_s
        return self._transcoder.raw(key), Meta(now, now + ttl_s, ttl_s, self._value_nbytes)

    def report(self) -> Report:
        """The result so far."""
        c = self._r.counters
        below = self._transcoder.encode(self._transcoder.raw(Key(b""))).nbytes - ENTRY_OVERHEAD_NBYTES
        writes = c.tiers["cold"].puts
        by_encoding: Counter[str] = Counter()
        for (_, encoding), hits in c.hits_in.items():
            by_encoding[encoding] += hits
        return Report(
            requests=self._requests,
            blocks=self._blocks,
            hits=self._hits,
            puts=self._puts,
            by_tier={name: tier.hits for name, tier in c.tiers.items()},
            by_encoding=dict(by_encoding),
            encodes=c.encodes - 1,
            promotions=c.tiers["hot"].promotions,
            evictions=sum(tier.evictions for tier in c.tiers.values()),
            disk_writes=writes,
            disk_nbytes_written=writes * (below + RECORD_NBYTES),
            seconds=self._at_s,
            hot_fraction=self._r.hot.capacity_nbytes / self._setup.ram_nbytes,
        )


def simulate(requests: Iterable[Request], setup: Setup) -> Report:
    """Simulate a whole trace against one setup, from a cold start."""
    simulation = Simulation(setup)
    for request in requests:
        simulation.request(request)
    return simulation.report()


def optimum(requests: Sequence[Request], capacity_blocks: int) -> int:
    """Hits of the offline optimum with room for `capacity_blocks`: it keeps the blocks whose next use is nearest.

    A block is used next no later than the blocks that continue it, and at equal times the deeper one leaves first, so
    the kept blocks are always whole prefixes. Source: Belady, "A study of replacement algorithms", 1966, with bypass.
    """
    next_use = _next_uses(requests)
    due: dict[int, float] = {}
    heap: list[tuple[float, int, int]] = []
    hits = 0
    for request, uses in zip(requests, next_use, strict=True):
        leading = True
        for depth, (block, use) in enumerate(zip(request.blocks, uses, strict=True)):
            leading = leading and block in due
            hits += leading
            if use == inf:
                due.pop(block, None)
                continue
            due[block] = use
            heapq.heappush(heap, (-use, -depth, block))
        while len(due) > capacity_blocks:
            use, _, block = heapq.heappop(heap)
            if due.get(block) == -use:
                del due[block]
    return hits


def _next_uses(requests: Sequence[Request]) -> list[list[float]]:
    seen: dict[int, int] = {}
    uses: list[list[float]] = []
    for at in range(len(requests) - 1, -1, -1):
        uses.append([seen.get(block, inf) for block in requests[at].blocks])
        for block in requests[at].blocks:
            seen[block] = at
    uses.reverse()
    return uses
