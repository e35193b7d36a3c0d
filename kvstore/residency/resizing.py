"""A tier's budget changed while it runs: what no longer fits sinks, least recently used first.

Any thread may call. Pinned entries stay, so a tier may remain over a budget smaller than its pins; puts then find no
room there and go below.
"""

from kvstore.config import StoreConfig
from kvstore.residency.mover import Mover
from kvstore.residency.state import Residency


def rebalance(r: Residency, mover: Mover) -> int:
    """Move the border between hot and warm to where it is worth most. Returns how many entries sank for it.

    While memory pressure holds hot below its budget the border stays.
    """
    with r.lock:
        balance = r.balance
        if balance is None or r.hot.capacity_nbytes < balance.hot_nbytes:
            return 0
        now = r.clock.now()
        for tier in (r.hot, r.warm):
            oldest = next(iter(tier.keys()), None)
            meta = None if oldest is None else r.index.get(oldest)
            balance.observe("hot" if tier is r.hot else "warm", 0.0 if meta is None else now - meta.used_at)
        wanted = balance.decide()
        if wanted == r.hot.capacity_nbytes:
            return 0
        shrunk = r.hot if wanted < r.hot.capacity_nbytes else r.warm
        r.hot.capacity_nbytes, r.warm.capacity_nbytes = wanted, balance.total_nbytes - wanted
    return mover.trim(shrunk)


def set_budgets(r: Residency, mover: Mover, config: StoreConfig) -> int:
    """Give each tier the budget, and the limit of pins, of a configuration. Returns how many entries sank or left.

    With `split = "auto"` the border between hot and warm goes where the configuration puts it.
    """
    limits = {
        tier: (budget.capacity_nbytes, int(budget.capacity_nbytes * config.pin_max_fraction))
        for tier, budget in (("hot", config.hot), ("warm", config.warm), ("cold", config.cold))
    }
    with r.lock:
        r.hot.resize(*limits["hot"])
        r.warm.resize(*limits["warm"])
        if r.balance is not None:
            r.balance.resize(r.hot.capacity_nbytes, r.warm.capacity_nbytes)
    # A larger disk before what sinks to it, a smaller one after that: then who leaves is chosen among all.
    moved = 0
    grows = r.cold is not None and limits["cold"][0] >= r.cold.capacity_nbytes
    if r.cold is not None and grows:
        r.cold.resize(*limits["cold"])
    moved += mover.trim(r.hot) + mover.trim(r.warm)
    if r.cold is not None and not grows:
        moved += r.cold.resize(*limits["cold"])
    return moved
