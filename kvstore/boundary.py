"""Where bytes that a stranger may have written are parsed or decoded: whatever is raised there becomes one error.

A record, a file or an answer can make our own code raise nearly anything (KeyError, struct.error, RuntimeError from
torch). `with Blaming(CodecError, "tensor 'k'"):` around the parsing says whose fault it is: the bytes', unless this
host's memory, its disk or an error of ours says otherwise. Thread-safe, no state. Imports no torch: clients have none.
"""

from types import TracebackType

from kvstore.errors import KvstoreError, TierUnavailable
from kvstore.printable import printable

_TOLD_MAX = 200
_NO_MEMORY = ("can't allocate memory", "out of memory")
"""What torch says, as a RuntimeError, where malloc or the device's allocator gave nothing."""


class Blaming:
    """A context: what is raised inside comes out as a `kind`, with `what` was parsed and the original's words."""

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
    """What `Blaming` would raise, for an `except` where a context for each tensor would cost more than its work."""
    if isinstance(error, KvstoreError | OSError):
        return error
    told = printable(error)[:_TOLD_MAX]
    if isinstance(error, MemoryError) or any(words in told for words in _NO_MEMORY):
        # It says nothing about the bytes: they must not be thrown away for it.
        return TierUnavailable(f"{what}: memory ran out: {told}")
    return kind(f"{what}: {type(error).__name__}: {told}")
