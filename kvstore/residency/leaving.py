"""What becomes of an entry that leaves a memory tier: it is forgotten, or a tier below could take it.

Looks and notes, never waits. Thread rule: hold the residency lock for every call but `could_sink` and `deserves_cold`.
"""

from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.state import Residency
from kvstore.tiers import TierName
from kvstore.tiers.balance import packed_nbytes


def left_at_once(r: Residency, left: TierName, entry: Entry) -> bool:
    """What became of an entry that left a tier; False: it must sink, which takes time."""
    key = entry.key
    meta = r.index[key]
    if meta.expired(r.clock.now()):
        r.expire(key)
    elif (left == "hot" and key in r.warm) or r.in_cold(key):
        r.counters.tiers[left].demotions += 1  # a clean copy is below: nothing to encode, nothing to write
    elif could_sink(r, left, key, meta):
        return False
    else:
        evicted(r, left, entry)
    return True


def evicted(r: Residency, left: TierName, entry: Entry) -> None:
    """An entry that left a tier has no place below it."""
    key = entry.key
    if r.balance is not None:
        r.balance.left(key, entry.nbytes if left == "warm" else packed_nbytes(entry.tensors))
    r.counters.tiers[left].evictions += 1
    if r.cold is not None:
        r.cold.admission.refused(key)
    r.lost_clean_copy(key)
    r.forget_if_gone(key, "evicted", left)


def arrived(r: Residency, left: TierName, below: Entry, to: TierName) -> None:
    """An entry left transit for the tier `to`, as `below`."""
    key = below.key
    del r.transit[key]
    r.counters.tiers[left].demotions += 1
    meta = r.index[key]
    meta.lossy, meta.encoding = below.lossy, below.encoding
    r.counters.tiers[to].puts += 1


def could_sink(r: Residency, left: TierName, key: Key, meta: Meta) -> bool:
    """Whether any tier below could take it: else nothing is encoded in vain."""
    if r.cold is not None and deserves_cold(r, key):
        return True
    return left == "hot" and not meta.exact and r.warm.capacity_nbytes > 0


def deserves_cold(r: Residency, key: Key) -> bool:
    """Whether the disk's admission rule and write budget let a key in."""
    meta = r.index.get(key)
    return meta is not None and r.cold is not None and r.cold.admission.deserves(key, meta)


def has_below(r: Residency, tier: TierName, key: Key, meta: Meta) -> bool:
    """Whether a key that is to leave a memory tier has a place below it."""
    if r.cold is not None or (tier == "hot" and key in r.warm):
        return True
    return tier == "hot" and not meta.exact and r.warm.capacity_nbytes > 0
