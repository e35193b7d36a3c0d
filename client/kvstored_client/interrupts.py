"""Interrupts: exceptions that a signal handler, another thread or a debugger raises between any two instructions.

What must be whole after one is changed by a single step of C code: a move between two lists, an item put into a queue,
a reference stored. A plain lock is not safe: an interrupt between taking it and entering its `with` leaves it locked
for ever. So there are none here, and what may be lost frees itself when its last reference is gone. No state.
"""

import os
from collections import deque
from contextlib import suppress
from operator import methodcaller
from struct import error as StructError  # noqa: N812 - a class, by its lower-case name
from typing import Any

from google.protobuf.message import DecodeError

from kvstore.errors import KvstoreError, RecordCorrupt

last_of = methodcaller("pop")
"""target.extend(map(last_of, (source,))) moves the last item of a list or deque in one step. Raises IndexError."""
_PACKAGES = frozenset(
    {
        *("kvstore", "kvstored_client", "kvstored_kernel", "google", "grpc", "numpy", "ml_dtypes", "torch"),
        *("json", "encodings", "contextlib", "functools", "ctypes", "socket", "importlib"),
    }
)
"""Whose code asks and reads an answer. What any other raised came from a signal handler that ran meanwhile."""
_DAMAGE = (
    DecodeError,
    StructError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    OSError,
    RuntimeError,  # torch's word for all that it refuses
    AssertionError,
)
"""What reading a damaged or false answer may raise."""


def moved(source: "deque[Any] | list[Any]", target: "list[Any] | deque[Any]") -> bool:
    """Move the last item of one to the other in one step; False where there is none."""
    if not source:
        return False
    try:
        target.extend(map(last_of, (source,)))
    except IndexError as error:
        if is_foreign(error):
            raise
        return False  # another thread took it
    return True


def close_all(descriptors: deque[int]) -> None:
    """Close each descriptor once, however often this is interrupted and called again."""
    while descriptors:
        close_first(descriptors)


def close_first(descriptors: deque[int]) -> None:
    """Close the first descriptor: taking it off and closing it is one step."""
    with suppress(IndexError, OSError):
        next(map(os.close, iter(descriptors.popleft, None)))


def is_foreign(error: BaseException) -> bool:
    """Whether an exception of a kind that is expected was not raised by what raises it: an interrupt, to be passed on.

    An exception of PyThreadState_SetAsyncExc, which no code raises, is told from an OSError of a system call by its
    missing number.
    """
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return module.partition(".")[0] not in _PACKAGES or (isinstance(error, OSError) and error.errno is None)


def damage(error: Exception, what: str) -> Exception:
    """The exception to raise for one that was met while an answer was read: RecordCorrupt, or an interrupt itself.

    what: names the answer. A KvstoreError stays what it is.
    """
    if isinstance(error, KvstoreError) or not isinstance(error, _DAMAGE) or is_foreign(error):
        return error
    return RecordCorrupt(f"{what} cannot be read: {type(error).__name__}: {error}"[:400])
