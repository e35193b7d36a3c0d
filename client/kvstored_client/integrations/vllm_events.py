"""What routers are told of the blocks in kvstored, in vLLM's own events (`vllm.distributed.kv_events`, vLLM 0.32).

A worker reports the blocks that were put; when every rank has put its shard, the scheduler announces a `BlockStored`.
A block that was announced and is found missing, by a lookup or a load, is a `BlockRemoved`: kvstored tells nobody when
it evicts, so a router's view may be late by a lookup, and a wrong entry costs one prefill. Only where the engine
publishes events (`--kv-events-config`); otherwise nothing is kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent, KVConnectorKVEvents, KVEventAggregator

from kvstored_client.integrations.dropped import PENDING_MAX, Dropped

MEDIUM = "STORAGE"
"""vLLM's word for what lies behind a connector, whatever tier it is in."""
ANNOUNCED_MAX = 262_144
"""Blocks announced and not yet found missing, 64 MiB of hashes; the oldest are removed for routers, too."""


class Stored(KVConnectorKVEvents):
    """The events of a step of all workers: those that every worker has are true of the block."""

    def __init__(self, workers: int = 1) -> None:
        self._aggregator = KVEventAggregator(workers)

    def add_events(self, events: list[KVCacheEvent]) -> None:
        """Of one worker."""
        self._aggregator.add_events(events)

    def aggregate(self) -> "Stored":
        """Keep what all workers have."""
        common = self._aggregator.get_common_events()
        self._aggregator.clear_events()
        self._aggregator.add_events(common)
        self._aggregator.reset_workers()
        return self

    def increment_workers(self, count: int = 1) -> None:
        """So many more workers report."""
        self._aggregator.increment_workers(count)

    def get_all_events(self) -> list[KVCacheEvent]:
        """Every event of every worker."""
        return list(self._aggregator.get_all_events())

    def get_number_of_workers(self) -> int:
        """Workers that report."""
        return int(self._aggregator.get_number_of_workers())

    def clear_events(self) -> None:
        """Begin anew."""
        self._aggregator.clear_events()
        self._aggregator.reset_workers()


@dataclass(frozen=True, slots=True)
class Block:
    """What a router wants to know of a block. parent: None for a prompt's first."""

    parent: bytes | None
    tokens: tuple[int, ...]
    lora: str | None


class Reported:
    """In a worker: what has been put since the last step. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: list[tuple[bytes, Block]] = []
        self.dropped = Dropped()

    def stored(self, block_hash: bytes, block: Block) -> None:
        """A block was put."""
        with self._lock:
            if len(self._stored) < PENDING_MAX:
                self._stored.append((block_hash, block))
            else:
                self.dropped.add()

    def take(self) -> Stored | None:
        """The events since the last call; None: there are none."""
        with self._lock:
            found, self._stored = self._stored, []
        if not found:
            return None
        events = Stored()
        events.add_events([_stored(block_hash, block) for block_hash, block in found])
        return events


class Announced:
    """In the scheduler: what routers believe to be held, and the events that they have not had. One thread.

    A shard may be put some steps after another rank's, so events of fewer than all ranks wait for the others.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._pending: OrderedDict[bytes, tuple[KVCacheEvent, int]] = OrderedDict()
        self._announced: OrderedDict[bytes, None] = OrderedDict()
        self._events: list[KVCacheEvent] = []
        self.dropped = Dropped()

    def reported(self, events: Iterable[KVCacheEvent]) -> None:
        """Workers have put these."""
        for event in events:
            (block_hash,) = event.block_hashes
            _, count = self._pending.pop(block_hash, (event, 0))
            if count + 1 < self._ranks:
                self._pending[block_hash] = event, count + 1
                if len(self._pending) > PENDING_MAX:
                    self._pending.popitem(last=False)
                    self.dropped.add()
            elif block_hash not in self._announced and len(self._events) >= PENDING_MAX:
                self.dropped.add()  # not announced, so no removal of it is due: those are never dropped
            elif block_hash not in self._announced:
                self._announced[block_hash] = None
                self._events.append(event)
                if len(self._announced) > ANNOUNCED_MAX:
                    oldest, _ = self._announced.popitem(last=False)
                    self._events.append(BlockRemoved(block_hashes=[oldest], medium=MEDIUM, group_idx=0))

    def missing(self, block_hashes: Sequence[bytes]) -> None:
        """These are not held any more; those that nobody was told of are nobody's concern."""
        gone = [each for each in block_hashes if each in self._announced]
        for each in gone:
            del self._announced[each]
        if gone:
            self._events.append(BlockRemoved(block_hashes=gone, medium=MEDIUM, group_idx=0))

    def reset(self) -> None:
        """Nothing of what was announced is held."""
        self.missing(list(self._announced))
        self._pending.clear()

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        found, self._events = self._events, []
        return found


def _stored(block_hash: bytes, block: Block) -> BlockStored:
    return BlockStored(
        block_hashes=[block_hash], parent_block_hash=block.parent, token_ids=list(block.tokens),
        block_size=len(block.tokens), lora_id=None, medium=MEDIUM, lora_name=block.lora, group_idx=0,
    )  # fmt: skip
