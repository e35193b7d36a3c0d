"""How many bytes may be under way at once. Thread-safe; never waits."""

import threading

from kvstore.errors import EntryTooLarge, OverQuota

RETRY_AFTER_MS = 100
"""About what 256 MiB take over the stream; a hint, not a promise."""


class Busy(OverQuota):
    """Too many bytes in flight just now."""

    retry_after_ms = RETRY_AFTER_MS


CALL_NBYTES = 4 << 20
"""What a streamed call has in frames: one of 2 MiB in gRPC's memory and once more in ours."""


LOT_NBYTES = 16 << 20
"""Decoded bytes taken out of the store at once: what a slow reader costs in memory, and few thread switches."""


class Budget:
    """Bytes in flight. Over the limit a call is refused at once rather than queued: the caller has a GPU waiting.

    call_nbytes: what a call over the stream counts for as long as nothing better is known of it. lot_nbytes: what is
    taken out of the store at once, where several entries are asked for.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        # A small budget must not be all frames: entries of its own size are to pass.
        self.call_nbytes = min(CALL_NBYTES, limit_nbytes // 64)
        self.lot_nbytes = min(LOT_NBYTES, limit_nbytes // 4)
        self.used_nbytes = 0
        self.refused = 0
        self._lock = threading.Lock()

    def with_frames(self, nbytes: int) -> int:
        """What an entry counts over the stream: its bytes and its frames, but never so much that it cannot pass."""
        return nbytes + max(0, min(nbytes, self.call_nbytes, self.limit_nbytes - nbytes))

    def take(self, nbytes: int, instead_of: int = 0) -> None:
        """Count bytes in. instead_of: bytes that are counted and no more under way.

        Raises EntryTooLarge for what could never pass, Busy for what cannot pass now.
        """
        if nbytes > self.limit_nbytes:
            raise EntryTooLarge(
                f"an entry of {nbytes} bytes is over the limit of {self.limit_nbytes} bytes in flight "
                "(server.in_flight_nbytes): put it in parts, or raise that"
            )
        with self._lock:
            total = self.used_nbytes + nbytes - instead_of
            if total <= self.limit_nbytes:
                self.used_nbytes = total
                return
            self.refused += 1
        raise Busy(
            f"{nbytes - instead_of} bytes more would make {total} in flight, the limit is {self.limit_nbytes}; "
            f"retry in {RETRY_AFTER_MS} ms"
        )

    def give_back(self, nbytes: int) -> None:
        """Count bytes out."""
        with self._lock:
            self.used_nbytes -= nbytes
