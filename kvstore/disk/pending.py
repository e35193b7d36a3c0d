"""Changes that wait for the writer, and the bytes that the tier will hold once they are made.

At most one operation waits per key: a newer one replaces it. The batch that is being committed (`inflight`) stays
readable meanwhile. Operations have rising tickets; by `oldest` a waiter knows whether its own is done.
Invariant: `used_nbytes` is the cost of everything that will be on disk when all operations are done.
Not thread-safe: the tier's lock covers it. Knows no disk and no time.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.owner import NOBODY, Owner


@dataclass(slots=True)
class Put:
    """An entry to write. cost: estimated until it is packed. frees: cost of the record it replaces; None: not known."""

    entry: Entry
    seq: int
    cost: int
    frees: int | None = 0
    ticket: int = 0
    durable: bool = False
    owner: Owner = NOBODY


@dataclass(slots=True)
class Delete:
    """A record to remove. frees: its cost; None: not known."""

    frees: int | None = 0
    ticket: int = 0
    durable: bool = False
    cost: int = 0
    owner: Owner = NOBODY


Operation = Put | Delete


class Pending:
    """Operations by key, oldest first."""

    def __init__(self, count: Callable[[Owner, int], None] = lambda _owner, _nbytes: None) -> None:
        """count: called with every change of `used_nbytes` and its owner."""
        self._count = count
        self.queued: OrderedDict[Key, Operation] = OrderedDict()
        self.inflight: dict[Key, Operation] = {}
        self.used_nbytes = 0
        self.buffered_nbytes = 0
        self._ticket = 0

    def find(self, key: Key) -> Operation | None:
        """The operation that waits for a key; None: there is none."""
        return self.queued.get(key) or self.inflight.get(key)

    def add(self, key: Key, operation: Operation, committed_cost: int | None) -> int:
        """Queue an operation. Returns its ticket. committed_cost: of the record now on disk, 0 if there is none.

        None: nobody can tell now. It counts as 0 until `price`.
        """
        self._ticket += 1
        operation.ticket = self._ticket
        replaced = self.queued.pop(key, None)
        if replaced is not None:
            operation.frees = replaced.frees
            operation.durable |= replaced.durable
            self._use(replaced.owner, -replaced.cost)
            self._use(operation.owner, operation.cost)
            self._uncount(replaced)
        else:
            running = self.inflight.get(key)
            operation.frees = committed_cost if running is None else running.cost
            self._use(operation.owner, operation.cost - (operation.frees or 0))
        if isinstance(operation, Put):
            self.buffered_nbytes += operation.entry.nbytes
        self.queued[key] = operation
        return operation.ticket

    def cancel(self, key: Key) -> bool:
        """Drop a queued put that replaces nothing. False: the disk has, or may soon have, a record to delete."""
        operation = self.queued.get(key)
        if not isinstance(operation, Put) or operation.frees != 0 or key in self.inflight:
            return False
        del self.queued[key]
        self._use(operation.owner, -operation.cost)
        self._uncount(operation)
        return True

    def take(self, batch_nbytes: int, batch_max: int, *, deletes_only: bool) -> dict[Key, Operation]:
        """Move the oldest operations into flight: at least one, at most `batch_nbytes` and `batch_max`."""
        nbytes = 0
        for key, operation in self.queued.items():
            if deletes_only and isinstance(operation, Put):
                continue
            if self.inflight and (nbytes + operation.cost > batch_nbytes or len(self.inflight) >= batch_max):
                break
            self.inflight[key] = operation
            nbytes += operation.cost
        for key in self.inflight:
            del self.queued[key]
        return self.inflight

    def price(self, key: Key, committed_cost: int) -> None:
        """Of an operation in flight of which nobody could tell: what its record on disk costs."""
        operation = self.inflight[key]
        operation.frees = committed_cost
        self._use(operation.owner, -committed_cost)

    def settle(self, costs: dict[Key, int]) -> None:
        """The batch is committed. costs: the real costs of the records; 0 for a put that wrote none."""
        for key, operation in self.inflight.items():
            error = costs.get(key, 0) - operation.cost
            newer = self.queued.get(key)
            if newer is not None:
                newer.frees = (newer.frees or 0) + error
            else:
                self._use(operation.owner, error)
            self._uncount(operation)
        self.inflight = {}

    def put_back(self) -> None:
        """The batch failed: queue it again, in front. An operation is dropped if a newer one of its key waits."""
        for key, operation in self.inflight.items():
            newer = self.queued.get(key)
            if newer is not None:
                newer.frees = operation.frees
                newer.durable |= operation.durable
                self._uncount(operation)
        kept = {key: operation for key, operation in self.inflight.items() if key not in self.queued}
        self.queued = OrderedDict({**kept, **self.queued})
        self.inflight = {}

    def oldest(self) -> int | None:
        """The lowest ticket that is not done."""
        tickets = [next(iter(ops.values())).ticket for ops in (self.inflight, self.queued) if ops]
        return min(tickets, default=None)

    @property
    def last_ticket(self) -> int:
        """The newest ticket."""
        return self._ticket

    def has_deletes(self) -> bool:
        """Whether a queued operation is a delete."""
        return any(isinstance(operation, Delete) for operation in self.queued.values())

    def recovered(self, owner: Owner, nbytes: int) -> None:
        """Count a record that was on the disk before this process started."""
        self._use(owner, nbytes)

    def let_go(self, owner: Owner, nbytes: int) -> None:
        """Stop counting a record that leaves the disk without an operation."""
        self._use(owner, -nbytes)

    def _use(self, owner: Owner, nbytes: int) -> None:
        self.used_nbytes += nbytes
        self._count(owner, nbytes)

    def _uncount(self, operation: Operation) -> None:
        if isinstance(operation, Put):
            self.buffered_nbytes -= operation.entry.nbytes
