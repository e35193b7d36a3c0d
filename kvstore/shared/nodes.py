"""The servers of a Valkey or Redis store: which owns a slot, its idle connections, and whether it answers.

Thread-safe. What is known of the slots is replaced whole (`Topology`); the keeper learns it, calls only read it.
Leaves out: commands (`exchange`), probing and discovery (`keeper`).
"""

import binascii
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.clock import Clock
from kvstore.shared.addresses import Address, Place, resolve
from kvstore.shared.breaker import CLOSED, HALF_OPEN, OPEN, Breaker
from kvstore.shared.link import Link, Login

SLOTS = 16384
NOBODY = -1
IDLE_MAX = 16
"""Kept links of a server: as many as there are threads in `guarded`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The slots from first to last, and who has them."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """Shards, by their first slot. A slot may be in none. cluster: or a standalone server with its replicas."""

    shards: tuple[Shard, ...]
    cluster: bool
    owners: "array[int]" = field(init=False, repr=False, compare=False)
    """For each slot the number of its shard, or NOBODY."""

    def __post_init__(self) -> None:
        owners = array("i", [NOBODY]) * SLOTS
        for at, shard in enumerate(self.shards):
            owners[shard.first : shard.last + 1] = array("i", [at]) * (shard.last + 1 - shard.first)
        object.__setattr__(self, "owners", owners)

    def shard(self, slot: int) -> Shard | None:
        """Who has a slot."""
        at = self.owners[slot]
        return None if at == NOBODY else self.shards[at]

    def addresses(self) -> list[Address]:
        """Every server, primaries first."""
        primaries = [shard.primary for shard in self.shards]
        return list(dict.fromkeys([*primaries, *(one for shard in self.shards for one in shard.replicas)]))

    def primaries(self) -> list[Address]:
        """Those that take writes."""
        return list(dict.fromkeys(shard.primary for shard in self.shards))


def slot_of(name: bytes) -> int:
    """The Cluster's slot of a name; of what stands in its first braces, if it has them."""
    if b"{" in name:
        open_at = name.find(b"{")
        close_at = name.find(b"}", open_at + 1)
        if close_at > open_at + 1:
            name = name[open_at + 1 : close_at]
    return binascii.crc_hqx(name, 0) % SLOTS


class Node:
    """One server."""

    def __init__(self, address: Address, login: Login, clock: Clock) -> None:
        self.address = address
        self.breaker = Breaker(clock)
        self.closed = False
        self._login = login
        self._idle: dict[bool, deque[Link]] = {False: deque(), True: deque()}
        self._place: Place | None = None

    def take(self, *, replica: bool) -> Link:
        """A link for one caller: an idle one, or a new one that is about to connect. Raises OSError."""
        idle = self._idle[replica]
        while True:
            try:
                link = idle.pop()
            except IndexError:
                return self.open(replica=replica)
            if link.is_usable():
                return link
            link.close()

    def open(self, *, replica: bool = False) -> Link:
        """A new link. Raises OSError, also for a name whose address is not known: nothing waits for a name server."""
        place = self._place or resolve(self.address, numeric=True)
        return Link(self.address, place, self._login, replica=replica)

    def find(self) -> None:
        """Learn the address of its name. Raises OSError. May wait."""
        self._place = self._place or resolve(self.address)

    def give(self, link: Link) -> None:
        """Take a link back after a whole exchange."""
        idle = self._idle[link.replica]
        if link.idle and len(idle) < IDLE_MAX:
            idle.append(link)
            if self.closed:  # by another thread, during the exchange
                self.drop_idle()
        else:
            link.close()

    def close(self) -> None:
        """Keep no link any more."""
        self.closed = True
        self.drop_idle()

    def drop_idle(self, *, forget_place: bool = False) -> None:
        """Close what is idle: the server failed. forget_place: and have its address found again."""
        if forget_place:
            self._place = None
        for idle in self._idle.values():
            while idle:
                try:
                    idle.pop().close()
                except IndexError:
                    break


class Nodes:
    """All servers that were ever heard of."""

    def __init__(self, seeds: Sequence[Address], login: Login, clock: Clock) -> None:
        self.seeds = tuple(seeds)
        self.login = login
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[Address, Node] = {}
        self._closed = False
        self.topology: Topology | None = None

    def node(self, address: Address) -> Node:
        """The one at an address."""
        found = self._nodes.get(address)
        if found is None:
            with self._lock:
                found = self._nodes.setdefault(address, Node(address, self.login, self._clock))
                if self._closed:
                    found.close()
        return found

    def adopt(self, topology: Topology) -> None:
        """Use what was learned. Servers that it does not name are let go."""
        kept = {*topology.addresses(), *self.seeds}
        self.topology = topology
        with self._lock:
            gone = [self._nodes.pop(address) for address in list(self._nodes) if address not in kept]
        for node in gone:
            node.close()

    def known(self) -> list[Node]:
        """All of the topology, or the seeds before there is one."""
        topology = self.topology
        return [self.node(address) for address in (topology.addresses() if topology else self.seeds)]

    def breaker(self) -> int:
        """The state of the store as one: CLOSED if any server may be asked."""
        states = {node.breaker.state for node in self.known()}
        return next(state for state in (CLOSED, HALF_OPEN, OPEN) if state in states or state == OPEN)

    def close(self) -> None:
        """Close what is idle, and what is given back from now on."""
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()
