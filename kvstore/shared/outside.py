"""One host's side of the shared store: the engine, and everything that turns keys into names and bytes into heads.

Shared by `publisher`, `fetcher` and `source`. Any thread.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.clock import Clock
from kvstore.config import SharedConfig
from kvstore.entries.sealing import NO_SEALS, Seals
from kvstore.errors import RecordCorrupt
from kvstore.keys import Key
from kvstore.shared import AsksAndClaims, Engine
from kvstore.shared.bars import Bars
from kvstore.shared.epochs import Epochs
from kvstore.shared.names import Names, name_of
from kvstore.shared.numbers import Numbers
from kvstore.shared.objects import Head, parse_head

CLAIM_S = 10.0
"""How long a host has to upload what it claimed. With 2 s three of eight hosts on two cores sent the same 16 chunks:
encoding and sealing them took longer."""
CLAIMED_MAX = 65_536
INCOMPLETE_MAX = 4096
PUBLISHED_MAX = 65_536
"""Objects known to be there: their children need not look for them."""


class Looked(NamedTuple):
    """What a lookup found under a name. head: of an object that may be read. there: there is something.

    claimed: there is nothing, and this host is the one to upload it. answered: else its server was not reached.
    """

    head: Head | None
    there: bool
    claimed: bool = False
    answered: bool = True


@dataclass
class Outside:
    """The shared store as this host knows it."""

    engine: Engine
    names: Names
    epochs: Epochs
    bars: Bars
    clock: Clock
    config: SharedConfig
    entry_max_nbytes: int
    seals: Seals = NO_SEALS
    numbers: Numbers = field(default_factory=Numbers)
    incomplete: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Objects whose heads came and whose bodies did not, though there was time: a piece is lost, or a replica lags. No
    reason to delete them; who computes the chunk again replaces them."""
    published: OrderedDict[Key, int] = field(default_factory=OrderedDict)
    """Objects that were there, with their namespaces' epochs: who computes them again need not look for them. Forgotten
    when a lookup does not find them: the shared store evicts."""

    claimed: OrderedDict[Key, float] = field(default_factory=OrderedDict)
    """Until when objects are surely this host's to upload: what it claimed itself it need not wait for."""

    def alias(self, key: Key) -> Key:
        """The key of an object, under the present epoch."""
        return self.names.alias(key, self.epochs.all)

    def be_fresh(self, timeout_s: float) -> None:
        """Have a table of epochs that can be relied on. A round trip only where the background is late.

        Raises SharedUnavailable.
        """
        if not self.epochs.fresh:
            self.epochs.refresh(timeout_s, unless_fresh=True)

    def readable(self, head: Head) -> bool:
        """Whether an object was published after the last flush of its namespace, and is not too large for this host."""
        return head.namespace_epoch >= self.epochs.of(head.tag) and head.value_nbytes <= self.entry_max_nbytes

    def heads(self, aliases: Sequence[Key], timeout_s: float) -> list[Looked]:
        """What is there. One round trip. Raises SharedUnavailable."""
        found = self.engine.heads([name_of(alias) for alias in aliases], timeout_s)
        return [self._looked(alias, data) for alias, data in zip(aliases, found, strict=True)]

    def heads_or_claims(self, aliases: Sequence[Key], timeout_s: float) -> list[Looked]:
        """What is there, and which of the others this host is to upload. Raises SharedUnavailable."""
        now = self.clock.now()
        looked = self._heads_or_claims(aliases, timeout_s)
        return [self._or_claimed_before(alias, found, now) for alias, found in zip(aliases, looked, strict=True)]

    def _heads_or_claims(self, aliases: Sequence[Key], timeout_s: float) -> list[Looked]:
        names = [name_of(alias) for alias in aliases]
        if isinstance(self.engine, AsksAndClaims):
            both = self.engine.heads_or_claims(names, CLAIM_S, timeout_s)
            return [
                self._looked(alias, found)
                if isinstance(found, bytes)
                else Looked(None, there=False, claimed=bool(found), answered=found is not None)
                for alias, found in zip(aliases, both, strict=True)
            ]
        looked = self.heads(aliases, timeout_s)
        absent = [name for name, found in zip(names, looked, strict=True) if not found.there]
        claims = iter(self.engine.claim(absent, CLAIM_S, timeout_s) if absent else ())
        return [found if found.there else Looked(None, there=False, claimed=next(claims)) for found in looked]

    def _or_claimed_before(self, alias: Key, found: Looked, now: float) -> Looked:
        if found.claimed:
            self.claimed.pop(alias, None)
            self.claimed[alias] = now + CLAIM_S  # from before the server was asked: it ends no earlier there
            if len(self.claimed) > CLAIMED_MAX:
                self.claimed.popitem(last=False)
        elif not found.there and found.answered and self.claimed.get(alias, 0.0) > now:
            return found._replace(claimed=True)
        return found

    def is_there(self, alias: Key, namespace_epoch: int) -> None:
        """Remember a whole object that is there."""
        self.incomplete.pop(alias, None)
        self.published[alias] = namespace_epoch
        if len(self.published) > PUBLISHED_MAX:
            with suppress(KeyError):  # two threads
                self.published.popitem(last=False)

    def did_not_come(self, alias: Key) -> None:
        """Remember an incomplete object."""
        self.incomplete[alias] = None
        if len(self.incomplete) > INCOMPLETE_MAX:
            with suppress(KeyError):  # two threads
                self.incomplete.popitem(last=False)

    def _looked(self, alias: Key, data: bytes | None) -> Looked:
        if data is None:
            self.published.pop(alias, None)
            return Looked(None, there=False)
        try:
            head = parse_head(self.names, alias, data)
        except RecordCorrupt:
            self.numbers.count(corrupt=1)
            return Looked(None, there=True)
        return Looked(head if self.readable(head) else None, there=True)

    def worth_keeping(self, alias: Key, found: Looked) -> bool:
        """Whether what is under a name need not be published again."""
        return found.head is not None and alias not in self.incomplete
