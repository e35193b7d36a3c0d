"""Long work in slices: the store's lock is let go between two of them, so that nobody waits for the whole.

Thread rule: no lock is held here. Who goes by slices looks again, under the lock, at what it means to change.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

SLICE = 128
"""Keys of a call dealt with in one hold of the lock: about a millisecond."""
STEPS = 64
"""Links followed, or keys taken out, in one hold of the lock while chains leave: one or two milliseconds."""
PAUSE_S = 0.0001
"""Between two slices. Without it the thread that let go of the lock has it again before the one that waits is awake."""

T = TypeVar("T")


def slices(items: Sequence[T], most: int = SLICE) -> Iterable[Sequence[T]]:
    """The items, so many at a time, with a pause between. Ask for the next one without the lock."""
    return (items,) if len(items) <= most else _cut(items, most)


def _cut(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), most):
        if start:
            pause()
        yield items[start : start + most]


def pause() -> None:
    """Let those who wait for the lock have it."""
    time.sleep(PAUSE_S)
