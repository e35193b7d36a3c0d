"""The boundary where untrusted bytes are parsed or decoded: every exception there becomes one error.

A record, a file or a reply can make this code raise nearly any exception (KeyError, struct.error, RuntimeError from
torch). `with Blaming(CodecError, "tensor 'k'"):` around the parsing turns it into an error about the bytes, unless
memory or the disk of this host failed, or it is an error of kvstored. Thread-safe, no state, no torch: clients use it.
"""

from types import TracebackType

from kvstore.errors import KvstoreError, TierUnavailable
from kvstore.printable import printable

_TOLD_MAX = 200
_NO_MEMORY = ("can't allocate memory", "out of memory")
"""The text of torch's RuntimeError when malloc or the device's allocator failed."""


class Blaming:
    """A context: exceptions inside become a `kind` that names `what` was parsed and the original text."""

    __slots__ = ("_kind", "_what")

    def __init__(self, kind: type[KvstoreError], what: str) -> None:
        self._kind = kind
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, KvstoreError | OSError):
            raise blamed(error, self._kind, self._what) from None


def blamed(error: Exception, kind: type[KvstoreError], what: str) -> Exception:
    """The error that `Blaming` would raise, for an `except` clause: a context per tensor would cost too much."""
    if isinstance(error, KvstoreError | OSError):
        return error
    told = printable(error)[:_TOLD_MAX]
    if isinstance(error, MemoryError) or any(words in told for words in _NO_MEMORY):
        # A failure of this host, not of the bytes: they must not be dropped for it.
        return TierUnavailable(f"{what}: memory ran out: {told}")
    return kind(f"{what}: {type(error).__name__}: {told}")
