"""What `Client.lease` returns: a context that begins the lease when it is entered."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from kvstore.hit import Hit
from kvstore.lookup import Lookup

NOTHING_LEASED: AbstractContextManager[Sequence[Hit | None]] = nullcontext(())


class Leases:
    """A lease that begins with its block."""

    def __init__(
        self,
        begin: Callable[..., AbstractContextManager[Sequence[Hit | None]]],
        keys: Sequence[bytes],
        *,
        leading: bool,
        lookup: Lookup | None = None,
    ) -> None:
        self._begin = begin
        self._keys = keys
        self._leading = leading
        self._lookup = lookup

    def __enter__(self) -> Sequence[Hit | None]:
        self._block = self._begin(self._keys, leading=self._leading, lookup=self._lookup)
        return self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, traceback)


class OneLease(Leases):
    """The same of one key."""

    def __enter__(self) -> Hit | None:  # type: ignore[override]  # one hit for many
        hits = super().__enter__()
        return hits[0] if hits else None


def leading_hits(hits: list[Hit | None], *, leading: bool) -> list[Hit | None]:
    """Of a chain, the hits before the first miss."""
    return hits[: next((i for i, hit in enumerate(hits) if hit is None), len(hits))] if leading else hits
