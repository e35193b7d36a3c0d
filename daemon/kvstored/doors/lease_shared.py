"""What all connections of the lease socket work on."""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.shm.arena import Arena
from kvstore.store import Store
from kvstored.access.interceptor import Access
from kvstored.access.records import Records
from kvstored.access.segment_owners import SegmentOwners
from kvstored.access.shares import Shares
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.replies import SharedReplies
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

    def __post_init__(self) -> None:
        self.device = self.store.device_uuid
        """The UUID of the GPU in whose memory hot lies; b"": in RAM, or nobody can map it."""
        self.replies = SharedReplies(self.store, self.arena, self.encoded)

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
