"""Hits on their way out: taken from the store for one call, a bounded lot at a time.

`Reading` belongs to one call. It knows no gRPC, so both doors use it.
"""

from collections.abc import Callable, Iterator

from kvstore.hit import Hit
from kvstore.keys import CheckedKeys
from kvstore.lookup import Lookup
from kvstore.residency.read_path import Found, Plan
from kvstore.shm.arena import Room
from kvstore.view import StoreView
from kvstored.calls.budget import Budget
from kvstored.calls.replies import EncodedReply, encoded_reply
from kvstored_client.wire._pb import cache_pb2 as pb

AT_HAND_MAX = 2
AT_HAND_NBYTES = 4 << 20
"""Entries that stay encoded and are taken out on the event loop itself, and their bytes: 0.05 to 0.3 ms each."""


def on_device(store: StoreView) -> bool:
    """Whether hot entries lie in a device's memory: a caller gets copies, which somebody waits for."""
    return store.config.hot.device != "cpu"


class Reading:
    """Hits for a Get, in order of the keys, one bounded lot after the other. Belongs to one call.

    `plan` looks and counts, and takes microseconds; `read` blocks, for a worker thread, unless `at_hand`. room: where
    what is decoded is made. streamed: the caller makes frames of it, which are charged, too, and summed. maps: whose
    segments on a device the caller reads in place: what lies in them comes as it was found, without a copy.
    """

    def __init__(
        self,
        store: StoreView,
        budget: Budget,
        asked: pb.GetRequest,
        keys: CheckedKeys,
        *,
        lookup: Lookup | None = None,
        room: Room | None = None,
        streamed: bool = False,
        maps: object = None,
    ) -> None:
        """keys, lookup: those of the request, checked."""
        self._store = store
        self._budget = budget
        self._room = room
        self._streamed = streamed
        self._counts: Callable[[int], int] = budget.with_frames if streamed else int
        """What a lot of so many decoded bytes counts."""
        self._maps = maps
        self._keys = keys
        self._leading = asked.leading
        self._accept = frozenset(asked.accept)
        self._accept_from_nbytes = asked.accept_from_nbytes
        self._lookup = lookup
        self._device = on_device(store)
        self._at = 0
        self._lots = 0
        self._counted_nbytes = 0
        self._plan: Plan | None = None
        self._known: Iterator[Plan] = iter(())
        self.done = not self._keys

    def plan(self) -> None:
        """Look for the next lot, charge for it, and count it. The last lot's tensors end here. Raises Busy."""
        if self._plan is not None:
            self._close_lot()
        plan = next(self._known, None)
        if plan is not None:
            self.charge(plan)
        else:
            plan = self._store.plan(
                self._keys.part(self._at) if self._at else self._keys,
                leading=self._leading,
                accept=self._accept,
                from_nbytes=self._accept_from_nbytes,
                at_most_nbytes=self._budget.lot_nbytes,
                charge=self.charge,
                lookup=self._lookup,
            )
        self.begin(plan)

    def begin_whole(self, plan: Plan) -> None:
        """Read in lots what a plan found hot, however much that is: nobody looks for it again. Raises Busy."""
        self._known = plan.cut(self._budget.lot_nbytes)
        self.plan()

    def begin(self, plan: Plan) -> None:
        """Read this lot next; it is charged."""
        plan.maps = self._maps
        self._plan = plan
        self._lookup = plan.lookup
        self._lots += 1

    @property
    def at_hand(self) -> bool:
        """Whether the lot planned takes no longer than the way to another thread and back: hot, or few as held."""
        plan = self._plan
        if plan is None or self._device:
            return False  # who copies from a device waits for it
        if plan.hot:
            return True
        return len(plan.keys) <= AT_HAND_MAX and plan.at_hand and plan.held_nbytes <= AT_HAND_NBYTES

    def read(self) -> list[tuple[int, Hit | EncodedReply | Found | None]]:
        """The positions of the lot planned with their hits, None for a miss. As found: what the caller `maps`."""
        plan = self._plan
        assert plan is not None
        start = self._at
        hits: list[Hit | EncodedReply | Found | None] = []
        spare_nbytes = 0
        for found in self._store.read(plan, room=self._room):
            if not isinstance(found, Found) or plan.stays_in_place(found.entry):
                hits.append(found)
                continue
            reply = encoded_reply(found)
            hits.append(reply)
            spare_nbytes += reply.contents.value_nbytes - reply.contents.nbytes
            if self._streamed:
                _ = reply.contents.xxh3  # summed here: a large one would hold up the event loop
        self._at = start + len(hits)
        ended = plan.ended or len(hits) < len(plan.keys)  # a chain ends at its first miss
        self.done = ended or self._at == len(self._keys)
        if ended:
            hits.append(None)
        if spare_nbytes:  # charged as if all were decoded
            nbytes = self._counts(max(0, plan.nbytes - spare_nbytes))
            self._budget.give_back(self._counted_nbytes - nbytes)
            self._counted_nbytes = nbytes
        return list(enumerate(hits, start))

    def close(self) -> None:
        """Let go of what is charged. A chain read in several lots is touched once more, as one."""
        self._close_lot()
        if self._lots > 1 and self._at:
            self._store.touch(self._keys.part(0, self._at))

    def _close_lot(self) -> None:
        """The lot is sent."""
        self._plan = None
        if self._counted_nbytes:
            self._budget.give_back(self._counted_nbytes)
            self._counted_nbytes = 0

    def charge(self, plan: Plan) -> None:
        """Count a lot's decoded bytes before it is read: what is under way is in memory. Raises Busy."""
        nbytes = self._counts(plan.nbytes)
        self._budget.take(nbytes)
        self._counted_nbytes += nbytes
