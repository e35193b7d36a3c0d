"""The daemon's segments that a client maps, in RAM and in a GPU's memory, once for all of its connections."""

from typing import Any

from kvstore.device import DriverError
from kvstore.shm.layout import CLOSED
from kvstored_client.device import Transfers
from kvstored_client.shm.mapped_device import MappedDevice
from kvstored_client.shm.mapping import MappedSegment
from kvstored_client.wire._pb import cache_pb2 as pb

Mapped = MappedSegment | MappedDevice
LET_GO_S = 1.0
"""How often to look for segments that the daemon has closed."""


class UseStream(Exception):
    """This call cannot be served through shared memory."""


class Segments:
    """The daemon's segments, mapped once for all connections of one daemon's life.

    blocks: what is known of blocks, by segment, start and generation, or by all that is said of one.
    look_at: when `look` is due.
    """

    def __init__(self, epoch: int, transfers: Transfers | None = None) -> None:
        """transfers: knows the GPUs; None: nothing on one is mapped."""
        self.epoch = epoch
        self.look_at = 0.0
        self._transfers = transfers
        self._mappings: dict[int, Mapped] = {}
        self.blocks: dict[tuple[int, int, int] | bytes, Any] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._mappings

    def add(self, number: int, mapping: MappedSegment) -> None:
        """Keep a mapping, unless another connection was handed the segment meanwhile. Lets go of closed ones.

        The daemon makes a segment in place of closed ones: so all that are mapped are at most twice what it may have.
        """
        if self._mappings.setdefault(number, mapping) is mapping:
            mapping.populate()
        self.let_go()

    def add_device(self, segment: pb.Segment, memory: int, table: int) -> None:
        """The same of one in a GPU's memory. Not kept where it cannot be mapped: what lies there comes another way."""
        transfers = self._transfers
        found = None if transfers is None else transfers.maps(segment.device)
        if segment.number not in self._mappings and transfers is not None and found is not None:
            try:
                mapping = MappedDevice(*found, memory, table, segment.nbytes)
            except (DriverError, OSError, ValueError, TypeError) as error:
                transfers.map_no_more(str(error))
            else:
                self._mappings.setdefault(segment.number, mapping)
        self.let_go()

    def look(self, now: float, *, at_once: bool = False) -> None:
        """Let go of what the daemon has closed, once in `LET_GO_S`, or at once."""
        if at_once or now > self.look_at:
            self.look_at = now + LET_GO_S
            self.let_go()

    def close(self) -> None:
        """Let go of all memory of GPUs, but for what is leased: a client that is closed may live on."""
        for number in [number for number, kept in list(self._mappings.items()) if isinstance(kept, MappedDevice)]:
            self._drop(number)

    def let_go(self) -> None:
        """Let go of the segments that the daemon has closed: whoever maps one keeps its pages from the system."""
        for number in [number for number, kept in list(self._mappings.items()) if kept.words[0] == CLOSED]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        kept = self._mappings.pop(number, None)
        for key, block in list(self.blocks.items()):
            if block.mapping is kept:
                self.blocks.pop(key, None)

    def at(self, address: int) -> Mapped | None:
        """The mapping in which an address lies."""
        for mapping in list(self._mappings.values()):
            if mapping.address <= address < mapping.address + mapping.nbytes:
                return mapping
        return None

    def get(self, number: int) -> Mapped:
        """The mapping of a segment. Raises UseStream for one that was never handed over, or could not be mapped."""
        mapping = self._mappings.get(number)
        if mapping is None:
            raise UseStream(f"segment {number} was not handed over, or cannot be mapped")
        return mapping
