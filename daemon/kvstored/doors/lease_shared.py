"""What all connections of the lease socket work on."""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.entries.compact import PACK_MAX_NBYTES
from kvstore.entries.entry import Entry
from kvstore.shm.arena import Arena, Owner, Place
from kvstore.store import Store
from kvstored.access.interceptor import Access, Records
from kvstored.access.segment_owners import SegmentOwners
from kvstored.access.shares import Shares
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.encoded_reply import EncodedReply
from kvstored.calls.verbs import Verbs
from kvstored.doors.busy_wait import Callers
from kvstored.doors.lending import Lending

if TYPE_CHECKING:
    from kvstored.doors.lease_connection import Connection


@dataclass
class Shared:
    """What every connection works on. budget: entries on their way; lending: what connections hold.

    arena: of hot's entries and of what is leased; encoded: of warm's that a client has mapped.
    """

    store: Store
    arena: Arena
    encoded: Arena
    budget: Budget
    lending: Lending
    verbs: Verbs
    lease_max_s: float
    records: Records
    views: TenantViews
    access: Access
    owners: SegmentOwners
    reads: threading.Semaphore
    """For gets that are not answered out of hot: what reading and decoding take beside the bytes that are counted."""
    shares: Shares
    connections: set["Connection"] = field(default_factory=set)
    callers: Callers = field(default_factory=Callers)
    aged: int = 0
    accept_failures: int = 0
    refused: dict[str, int] = field(default_factory=lambda: {"full": 0, "no_entry": 0})

    def placed(self, hit: EncodedReply, owner: Owner) -> Entry | None:
        """An encoded entry in memory that a user may map, moved there if need be. None: it must be copied.

        What warm holds in ordinary memory moves when it is asked for again: room that was used before is copied to in
        a third of the time, but each time.
        """
        entry = hit.entry
        if hit.again and hit.tier == "warm" and entry.block is None and hit.contents.nbytes > PACK_MAX_NBYTES:
            entry = self.store.move_encoded(entry, self.encoded, owner) or entry
        return entry if isinstance(entry.block, Place) and entry.block.segment.owner == owner else None

    def gauges(self) -> dict[str, float]:
        """For the statistics."""
        connections = self.connections.copy()
        return {
            "leases": sum(connection.leases for connection in connections),
            "lease_connections": len(connections),
            "leases_aged": self.aged,
            "leased_entries": sum(connection.held for connection in connections),
            "ingest_nbytes": self.lending.ingest.used_nbytes,
            "ingest_hangups": self.lending.hangups,
            "lease_accept_failures": self.accept_failures,
            **{f"lease_connections_refused_{reason}": count for reason, count in self.refused.items()},
        }
