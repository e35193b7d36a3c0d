"""A memory tier's budget changed while it runs: what no longer fits sinks, least recently used first.

Any thread may call. Pinned entries stay, so a tier may remain over a budget smaller than its pins; puts then find no
room there and go below.
"""

from kvstore.mover import Mover
from kvstore.residency import Residency


def set_hot_capacity(r: Residency, mover: Mover, nbytes: int) -> int:
    """Set the hot tier's budget in bytes. Returns how many entries sank."""
    with r.lock:
        r.hot.capacity_nbytes = nbytes
        keys = list(r.hot.keys()) if r.hot.used_nbytes > nbytes else []
    moved = 0
    for key in keys:
        with r.lock:
            if r.hot.used_nbytes <= nbytes:
                break
        moved += mover.demote(key)
    return moved
