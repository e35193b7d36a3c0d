"""Lookups of prefixes: how a call counts among them, and what the latest ones missed.

A lookup is one question for the cached part of a prompt. It may take several calls: a match and then gets, or pieces of
a long chain. Whoever asks says how many keys and tokens it is about with the first call; each call then counts what it
finds, unless it says that another one does. Imports no torch: a light client imports this.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from kvstore.errors import InvalidEntry

REPORT_MAX_S = 86400
"""More than a day of prefill saved since the last report is a mistake, and would spoil the sum for good."""
TOKENS_MAX = 1 << 30
"""The same for the tokens of one lookup, and for its keys."""
MISSES_MAX = 1024
"""Lookups whose misses are remembered for the puts that follow: some 100 KiB."""


class Lookup(NamedTuple):
    """keys, tokens: what the whole lookup asks for, said by its first call. key_tokens: tokens that each key found
    stands for, 0 if unknown. counted: count what this call finds. prefetch: gets of what is found follow soon, so what
    only the disk holds of it is brought to memory meanwhile; a match or `locate` hears this.
    """

    keys: int = 0
    tokens: int = 0
    key_tokens: int = 0
    counted: bool = True
    prefetch: bool = False

    def continued(self) -> "Lookup":
        """The same lookup in a later call: what was asked for is counted, only what is found is not yet."""
        return self._replace(keys=0, tokens=0)


ELSEWHERE = Lookup(counted=False)
"""For a call that is no lookup by itself, or part of one that another call counts."""


def check_saved(seconds: float) -> float:
    """Seconds of prefill saved, as reported. Raises InvalidEntry."""
    if not 0 <= seconds <= REPORT_MAX_S:  # NaN included
        raise InvalidEntry(f"prefill_saved_s must be from 0 to {REPORT_MAX_S}, got {seconds}")
    return seconds


def check_lookup(lookup: Lookup | None) -> Lookup | None:
    """A lookup whose numbers can be, or none. Raises InvalidEntry."""
    if lookup is None:
        return None
    for name, value in zip(("keys", "tokens", "key_tokens"), lookup, strict=False):
        if not 0 <= value <= TOKENS_MAX:
            raise InvalidEntry(f"lookup: {name} must be from 0 to {TOKENS_MAX}, got {value}")
    return lookup


class Misses:
    """The first chunk that each of the latest lookups missed, by its key, which names all chunks before it, too.

    Any thread: each change is one step of C code. It may be out of date: a put that relies on it is right all the same.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def note(self, key: bytes) -> None:
        """A lookup found the chunks before this one, and not this one."""
        self._keys[key] = None
        if len(self._keys) > MISSES_MAX:
            with suppress(KeyError):  # other threads emptied it
                self._keys.popitem(last=False)

    def take(self, keys: Sequence[bytes]) -> int | None:
        """How many of a chain's chunks were held where a lookup of it missed the next; None: nothing is known.

        Told once: after the put it is true no more.
        """
        known = self._keys
        for held, key in enumerate(keys):
            if key in known:
                known.pop(key, None)
                return held
        return None
