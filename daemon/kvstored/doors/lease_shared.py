"""What all connections of the lease socket work on."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kvstore import arrays
from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import PACK_MAX_NBYTES
from kvstore.hit import Hit
from kvstore.residency.read_path import Found
from kvstore.shm.arena import Arena, Handed, Owner, Place
from kvstore.shm.layout import layout
from kvstore.store import Store
from kvstored.access.interceptor import Access
from kvstored.access.records import Records
from kvstored.access.segment_owners import SegmentOwners
from kvstored.access.shares import Shares
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.replies import EncodedReply, hit_header, leased, raw_header
from kvstored.calls.verbs import Verbs
from kvstored.doors.busy_wait import Callers
from kvstored.doors.lease_packets import UseStream
from kvstored.doors.lending import Lending
from kvstored_client.wire._pb import cache_pb2 as pb

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

    def found(self, index: int, hit: Hit | EncodedReply | Found, owner: Owner) -> tuple[object, Handed, bytes]:
        """What is to be held of a hit, the segment it lies in for a user to map, and what is said. Raises UseStream."""
        if isinstance(hit, Found):  # on a device, in a segment that this client maps
            place: Place = hit.entry.tensors.place  # type: ignore[attr-defined]  # else it was not left there
            header = raw_header(hit.entry, pb.GetHeader(index=index, age_s=hit.age_s))
            return hit.entry, place.segment, leased(header, place)
        held, place = self._lying(hit, owner) or self._copied(hit, owner)
        return held, place.segment, leased(hit_header(index, hit), place)

    def _lying(self, hit: Hit | EncodedReply, owner: Owner) -> tuple[object, Place] | None:
        """As it is, where a user may read it: what was decoded into its room, or is held in its segments.

        What warm holds in ordinary memory moves when it is asked for again: room that was used before is copied to in
        a third of the time, but each time.
        """
        if isinstance(hit, Hit):
            held, place = hit.tensors, getattr(hit.tensors, "place", None)
        else:
            entry = hit.entry
            if hit.again and hit.tier == "warm" and entry.block is None and hit.contents.nbytes > PACK_MAX_NBYTES:
                entry = self.store.move_encoded(entry, self.encoded, owner) or entry
            held, place = entry.tensors, entry.block
        return (held, place) if isinstance(place, Place) and place.segment.owner == owner else None

    def _copied(self, hit: Hit | EncodedReply, owner: Owner) -> tuple[object, Place]:
        """Copied to a segment of the user's, unless the tensors lie in one, as a client finds an entry in it."""
        if isinstance(hit, Hit):
            sources: Mapping[str, torch.Tensor] = hit.tensors
            specs = {name: arrays.describe(name, x) for name, x in sources.items()}
        else:
            sources = {str(i): torch.from_numpy(part) for i, part in enumerate(hit.contents.payload)}
            specs = {name: TensorSpec("uint8", (x.numel(),)) for name, x in sources.items()}
        place = self.arena.place_in(sources, *layout(specs), owner)
        if place is not None:
            return sources, place
        room = self.arena.empty(specs, owner)
        if room is None or room.place is None:
            raise UseStream("no room in shared memory, or nothing to share")
        for name, x in sources.items():
            room[name].copy_(x)
        return room, room.place

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
