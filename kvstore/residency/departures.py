"""Keys that a caller takes out, with what continues them: in slices, and for good when it returns.

The deepest chunks leave first, so there are no orphans between two slices; the key itself is held until its turn comes.
"""

from collections.abc import Sequence

from kvstore.keys import Key
from kvstore.metadata.slices import pause
from kvstore.metadata.tombstones import GoneCause
from kvstore.residency.state import Departure, Residency


def take_out(r: Residency, keys: Sequence[Key], cause: GoneCause, *, keep_shared: bool) -> tuple[int, int | None]:
    """Take keys out. Returns how many were held, and the ticket to wait for until none of them can come back.

    keep_shared: a key that others continue stays. Without the lock.
    """
    gone = 0
    last: int | None = None
    asked = iter(dict.fromkeys(keys))
    departure: Departure | None = None
    while True:
        with r.lock:
            while r.lock.steps > 0:
                if departure is None:
                    key = next(asked, None)
                    if key is None:
                        return gone, last
                    meta = r.index.get(key)
                    if keep_shared and meta is not None and meta.first_child is not None:
                        continue
                    gone += r.live(key) is not None
                    departure = Departure(key, cause)
                r.lock.steps -= 1  # a key that is not held costs a look at the disk's index, too
                if r.depart(departure):
                    last = departure.ticket if last is None else max(last, departure.ticket or 0)
                    departure = None
        pause()
