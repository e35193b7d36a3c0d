"""What a fleet of hosts would do with a trace, each by itself or over a shared store: N times `simulator.Simulation`.

Every host has the daemon's read path, write path, mover and tiers, so a chunk is published through `Mover.copy_below`
and one that arrives is installed by `WritePath.take_from_outside`, as in `residency.sharing`. Simulated beside them are
the router, the shared store (names in order of use, a capacity, a lifetime), and the time between a put and the moment
when other hosts can read it. Time is the trace's. Not simulated: bandwidth, deadlines, a store that is down.
"""

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, TypeAlias, cast, get_args
from zlib import crc32

from kvstore.checks import check_choice, check_range
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.tombstones import Tombstone, Tombstones
from kvstore.simulation.simulator import NF4_VALUE_NBYTES, RECORD_NBYTES, Report, Setup, Simulation
from kvstore.simulation.trace import Request, block_key
from kvstore.tiers.admission import Admission

Routing: TypeAlias = Literal["random", "prefix", "conversation"]
Publish: TypeAlias = Literal["put", "evict", "reused"]
ROUTINGS = get_args(Routing)
PUBLISH = get_args(Publish)
HOSTS_MAX = 4096
LOAD_WINDOW_S = 60.0
LOAD_SLACK = 1.25
LOAD_SLACK_BLOCKS = 80
"""A prefix-aware router sends a prompt elsewhere when its host had this much more than the mean in the last minute."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Hosts, how requests get to them, and what they share.

    routing: "random"; "prefix": to the host that last used the longest part of the prompt, unless it is overloaded;
    "conversation": to a cell by a hash of the prompt's second block, to a random host of it. cells: groups of hosts, of
    one size, with a shared store each. shared_blocks: blocks that the stores hold together; None: all; 0: nothing is
    shared. publish: what is published: at "put", on eviction from a host ("evict"), or chunks hit at least once on a
    host ("reused"). publish_delay_s: from then until other hosts can read it. ttl_s: seconds that an object lives.
    churn_s: within so many seconds each host is replaced by an empty one, one after another; 0: none is.
    """

    setup: Setup
    hosts: int = 1
    routing: Routing = "random"
    cells: int = 1
    shared_blocks: int | None = 0
    publish: Publish = "put"
    publish_delay_s: float = 1.0
    ttl_s: float = 3600.0
    churn_s: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        check_range("hosts", self.hosts, 1, HOSTS_MAX)
        check_range("cells", self.cells, 1, self.hosts)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("publish", self.publish, PUBLISH)
        check_range("publish_delay_s", self.publish_delay_s, 0, 86_400)
        check_range("ttl_s", self.ttl_s, 1, 365 * 86_400)
        check_range("churn_s", self.churn_s, 0, 365 * 86_400)
        if self.hosts % self.cells:
            raise ConfigError(f"cells must be of one size: {self.hosts} hosts do not part into {self.cells}")
        if self.shared_blocks is not None:
            check_range("shared_blocks", self.shared_blocks, 0, 1 << 40)
            if 0 < self.shared_blocks < self.cells:
                raise ConfigError(
                    f"shared: {self.shared_blocks} blocks are less than one for each of {self.cells} cells"
                )

    @property
    def hosts_per_cell(self) -> int:
        """Hosts that have a store in common."""
        return self.hosts // self.cells


class SizedShared:
    """A shared store without objects: names in the order of their last use, as a server that evicts by use keeps them.

    A name counts from its put on, and can be read after the delay.
    """

    def __init__(self, capacity: int | None, ttl_s: float, delay_s: float) -> None:
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._delay_s = delay_s
        self._names: OrderedDict[Key, tuple[float, float]] = OrderedDict()
        self.puts = 0
        self.peak = 0

    def leading(self, keys: Sequence[Key], now: float) -> int:
        """How many of the leading keys can be read. Counts as use of them."""
        for i, key in enumerate(keys):
            readable_at, expires_at = self._names.get(key, (inf, 0.0))
            if now < readable_at or now >= expires_at:
                return i
            self._names.move_to_end(key)
        return len(keys)

    def put(self, key: Key, at_s: float) -> bool:
        """Store a name. False: it was there."""
        found = self._names.get(key)
        if found is not None and at_s < found[1]:
            return False
        self._names.pop(key, None)
        self._names[key] = at_s + self._delay_s, at_s + self._delay_s + self._ttl_s
        self.puts += 1
        if self._capacity is not None and len(self._names) > self._capacity:
            self._names.popitem(last=False)
        self.peak = max(self.peak, len(self._names))
        return True


class _Evictions(Tombstones):
    """Tombstones that tell of each eviction."""

    def __init__(self, evicted: Callable[[Key], None]) -> None:
        super().__init__()
        self._evicted = evicted

    def add(self, key: Key, stone: Tombstone) -> None:
        """See `Tombstones.add`."""
        super().add(key, stone)
        if stone.cause == "evicted":
            self._evicted(key)


@dataclass(slots=True)
class SharedCounts:
    """What went between the hosts and the shared store."""

    lookups: int = 0
    lookup_keys: int = 0
    futile: int = 0
    hits: int = 0
    published: int = 0
    dropped: int = 0


class Host(Simulation):
    """One host: a simulated store that reads from, and publishes to, a shared one."""

    def __init__(
        self, fleet: Fleet, clock: ManualClock, start_s: float, store: SizedShared | None, counts: SharedCounts
    ) -> None:
        """start_s: the clock's time when the trace began."""
        super().__init__(fleet.setup, clock)
        self._start_s = start_s
        self._store = store
        self._publish = fleet.publish
        self._counts = counts
        self._rule = Admission("reused" if fleet.publish == "reused" else "all", 0, clock)
        if store is not None and fleet.publish == "evict":
            self._r.tombstones = _Evictions(self._evicted)
        elif store is not None:
            self._write_path.offer = self._offered

    def serve(self, request: Request, keys: Sequence[Key]) -> int:
        """As `request`, of keys that all hosts have in common."""
        found = self._request(request, keys)
        if self._store is not None and self._publish == "reused":
            self._offered(keys[:found], 0)
        return found

    def _bring(self, keys: Sequence[Key]) -> None:
        if self._store is None:
            return
        held = self._r.first_missing(keys)
        if held == len(keys):
            return
        rest = keys[held:]
        there = self._store.leading(rest, self._now)
        self._counts.lookups += 1
        self._counts.lookup_keys += len(rest)
        self._counts.futile += not there
        if there:
            parent = keys[held - 1] if held else None
            arrived = ((self._transcoder.below(key), self._meta()) for key in reversed(rest[:there]))
            self._counts.hits += self._write_path.take_from_outside(rest[:there], arrived, parent, "", _wanted)

    def _meta(self) -> Meta:
        return Meta(self._now, self._now + self._ttl_s, self._ttl_s, self._value_nbytes)

    def _offered(self, keys: Sequence[Key], nbytes: int) -> None:
        """Publish a chain, root first. The store has the delay: what leaves this host meanwhile is published, too."""
        del nbytes
        store = cast("SizedShared", self._store)
        for key in keys:
            meta = self._r.live(key)
            if meta is None:
                self._counts.dropped += 1
            elif self._rule.deserves(key, meta) and store.put(key, self._now):
                self._counts.published += 1
                self._mover.copy_below(key)

    def _evicted(self, key: Key) -> None:
        self._counts.published += cast("SizedShared", self._store).put(key, self._now)


def _wanted(_key: Key) -> bool:
    return True


class Router:
    """Which host a request goes to. Knows what it has sent where, not what hosts hold."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._random = random.Random(fleet.seed)  # noqa: S311 - a simulation
        self._last: dict[int, int] = {}
        self._load = [0] * fleet.hosts
        self._recent: deque[tuple[float, int, int]] = deque()

    def host(self, request: Request) -> int:
        """The number of a host."""
        fleet = self._fleet
        if fleet.routing == "prefix":
            return self._by_prefix(request)
        if fleet.routing == "conversation":
            blocks = request.blocks or (0,)
            # The first block is often a system prompt that all conversations begin with.
            of = crc32(blocks[min(1, len(blocks) - 1)].to_bytes(8, "big"))
            return of % fleet.cells * fleet.hosts_per_cell + self._random.randrange(fleet.hosts_per_cell)
        return self._random.randrange(fleet.hosts)

    def _by_prefix(self, request: Request) -> int:
        load, recent = self._load, self._recent
        while recent and recent[0][0] < request.at_s - LOAD_WINDOW_S:
            _, host, blocks = recent.popleft()
            load[host] -= blocks
        mean = sum(load) / len(load)
        most = max(LOAD_SLACK * mean, mean + LOAD_SLACK_BLOCKS)
        last = self._last
        depth, chosen = next(
            ((i, last[block]) for i, block in reversed(list(enumerate(request.blocks))) if block in last), (0, -1)
        )
        if not depth or load[chosen] > most:  # a common first block says nothing
            chosen = min(range(len(load)), key=lambda host: (load[host], self._random.random()))
        load[chosen] += len(request.blocks)
        recent.append((request.at_s, chosen, len(request.blocks)))
        last.update(dict.fromkeys(request.blocks, chosen))
        return chosen


@dataclass(frozen=True, slots=True)
class FleetReport:
    """A fleet's result. total: of all hosts, those replaced included. shared_*_bytes_per_request: read, written.

    by_tier in `total` counts what came from the shared store as a hit in the tier where it was installed, as a daemon
    does. seconds: of the trace. load_max: the busiest host's requests, as a multiple of the mean.
    """

    hosts: int
    total: Report
    shared_hits: int
    shared_lookups: int
    shared_lookup_keys: int
    shared_futile: int
    shared_published: int
    shared_peak_blocks: int
    shared_bytes_per_request: float
    shared_written_bytes_per_request: float
    replaced: int
    load_max: float

    @property
    def hit_ratio(self) -> float:
        """Share of the block references that were hits, on the host or from the shared store."""
        return self.total.hit_ratio


class FleetSimulation:
    """Hosts, a router, and a shared store for each cell. `request` feeds it; `report` may be asked for at any time."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._clock = ManualClock()
        self._router = Router(fleet)
        self._counts = SharedCounts()
        capacity = None if fleet.shared_blocks is None else fleet.shared_blocks // fleet.cells
        self._stores = [SizedShared(capacity, fleet.ttl_s, fleet.publish_delay_s) for _ in range(fleet.cells)]
        self._start_s = self._clock.now()
        self._hosts = [self._new(i) for i in range(fleet.hosts)]
        self._gone: list[Report] = []
        self._served = [0] * fleet.hosts
        self._step_s = fleet.churn_s / fleet.hosts
        self._next_s = self._step_s
        self._keys: dict[int, Key] = {}

    def _new(self, number: int) -> Host:
        store = None if self._fleet.shared_blocks == 0 else self._stores[number // self._fleet.hosts_per_cell]
        return Host(self._fleet, self._clock, self._start_s, store, self._counts)

    def request(self, request: Request) -> int:
        """One prompt, on the host that the router chooses. Returns the blocks hit."""
        while self._step_s and request.at_s >= self._next_s:
            number = len(self._gone) % self._fleet.hosts
            self._gone.append(self._hosts[number].report())
            self._hosts[number] = self._new(number)
            self._next_s += self._step_s
        number = self._router.host(request)
        self._served[number] += 1
        return self._hosts[number].serve(request, [self._key(block) for block in request.blocks])

    def _key(self, block: int) -> Key:
        key = self._keys.get(block)
        if key is None:  # one object for all hosts: a fleet of 64 would hold 64 of each
            key = self._keys[block] = Key(block_key(block))
        return key

    def report(self) -> FleetReport:
        """The result so far."""
        c = self._counts
        total = _sum([*self._gone, *(host.report() for host in self._hosts)])
        nbytes, requests = object_nbytes(self._fleet.setup), max(1, total.requests)
        return FleetReport(
            hosts=self._fleet.hosts, total=total, shared_hits=c.hits, shared_lookups=c.lookups,
            shared_lookup_keys=c.lookup_keys, shared_futile=c.futile, shared_published=c.published,
            shared_peak_blocks=sum(store.peak for store in self._stores),
            shared_bytes_per_request=c.hits * nbytes / requests,
            shared_written_bytes_per_request=c.published * nbytes / requests, replaced=len(self._gone),
            load_max=max(self._served) * self._fleet.hosts / requests,
        )  # fmt: skip


def _sum(reports: Sequence[Report]) -> Report:
    def added(name: str) -> Counter[str]:
        return sum((Counter(getattr(one, name)) for one in reports), Counter[str]())

    first = reports[-1]
    by_tier = dict.fromkeys(first.by_tier, 0) | added("by_tier")
    counts = {
        name: sum(getattr(one, name) for one in reports)
        for name in ("requests", "blocks", "hits", "puts", "encodes", "promotions", "evictions", "disk_writes",
                     "disk_nbytes_written")
    }  # fmt: skip
    seconds = max(one.seconds for one in reports)
    return replace(first, by_tier=by_tier, by_encoding=dict(added("by_encoding")), seconds=seconds, **counts)


def simulate_fleet(requests: Iterable[Request], fleet: Fleet) -> FleetReport:
    """Simulate a whole trace on a fleet, from a cold start."""
    simulation = FleetSimulation(fleet)
    for request in requests:
        simulation.request(request)
    return simulation.report()


def object_nbytes(setup: Setup) -> int:
    """Bytes of one block in the shared store."""
    return int(setup.layout.token_values * setup.block_tokens * NF4_VALUE_NBYTES) + RECORD_NBYTES
