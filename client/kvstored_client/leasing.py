"""What `Client.lease` returns: a context that begins the lease when it is entered."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

from kvstore.hit import Hit
from kvstore.lookup import Lookup

NOTHING_LEASED: AbstractContextManager[Sequence[Hit | None]] = nullcontext(())


class Wanted(NamedTuple):
    """How a lease is asked for: see `Client.lease_many`."""

    leading: bool = False
    lookup: Lookup | None = None
    packed: bool = False
    device: bytes = b""


class Leases:
    """A lease that begins with its block."""

    def __init__(
        self,
        begin: Callable[[Sequence[bytes], Wanted], AbstractContextManager[Sequence[Hit | None]]],
        keys: Sequence[bytes],
        wanted: Wanted,
    ) -> None:
        self._begin = begin
        self._keys = keys
        self._wanted = wanted

    def begin(self) -> AbstractContextManager[Sequence[Hit | None]]:
        """Ask for it. The block that is leased is to be entered and left; of an asyncio client, one to await."""
        return self._begin(self._keys, self._wanted)

    def enter(self, block: AbstractContextManager[Sequence[Hit | None]]) -> Any:
        """What the block of `begin` holds; it ends with this lease."""
        self._block = block
        return block.__enter__()

    def __enter__(self) -> Any:
        return self.enter(self.begin())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, traceback)


class OneLease(Leases):
    """The same of one key."""

    def enter(self, block: AbstractContextManager[Sequence[Hit | None]]) -> Hit | None:
        """The hit of the block."""
        hits = super().enter(block)
        return hits[0] if hits else None


def leading_hits(hits: list[Hit | None]) -> list[Hit | None]:
    """Of a chain, the hits before the first miss."""
    return hits[: next((i for i, hit in enumerate(hits) if hit is None), len(hits))]
