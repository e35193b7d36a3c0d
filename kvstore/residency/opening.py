"""How a store's state comes about: empty from a configuration, or with what a restart finds on the disk."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Clock
from kvstore.config import ColdConfig, StoreConfig
from kvstore.keys import Key
from kvstore.metadata.chains import Chains
from kvstore.metadata.owner import NOBODY, Owner
from kvstore.metadata.tenants import Tenants
from kvstore.policies import policy_named
from kvstore.residency.state import Residency
from kvstore.tiers import TierName
from kvstore.tiers.balance import Balance
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.order import Order

if TYPE_CHECKING:
    from kvstore.disk.recovery import Recovered


def residency_of(config: StoreConfig, clock: Clock) -> Residency:
    """The memory tiers of a configuration, empty."""
    chains = Chains()
    index = chains.index

    def owner_of(key: Key) -> Owner:
        meta = index.get(key)
        return NOBODY if meta is None else meta.owner

    tenants = Tenants(config.quotas, config.namespaces, config.warm.namespaces)

    def tier(name: TierName, capacity_nbytes: int) -> MemoryTier:
        order = Order(
            policy_named(config.policy), chains=chains, owner_of=owner_of, tier=name, tenants=tenants.names,
            pin_max_nbytes=int(capacity_nbytes * config.pin_max_fraction),
        )  # fmt: skip
        return MemoryTier(name, capacity_nbytes, order=order)

    hot, warm = tier("hot", config.hot.capacity_nbytes), tier("warm", config.warm.capacity_nbytes)
    made = Residency(clock, chains, hot=hot, warm=warm, tenants=tenants)
    if config.split == "auto":
        made.balance = Balance(hot, warm)
    return made


def open_cold(r: Residency, path: Path, config: ColdConfig) -> None:
    """Take a directory into use as the cold tier, with what a restart finds in it. Raises as `Cold.open`."""
    from kvstore.tiers.cold import Cold  # lmdb is loaded only where there is a disk

    cold = Cold.open(
        path,
        config,
        r.clock,
        meta_of=r.index.get,
        on_drop=r.dropped_from_cold,
        order=Order(owner_of=r.owner_of, tier="cold", tenants=r.tenants.names),
        owners_of=r.tenants.owners,
    )
    r.cold = cold
    with r.lock:
        _recover(r, cold.recovered())


def _recover(r: Residency, found: "Recovered") -> None:
    """Take over the keys that a restart found on disk, with owners and links. Before anything else is held.

    Chunks whose parent did not come back with them are forgotten: a crash lost the parent, or its end came first.
    """
    table, owners = found.resting.table, found.resting.owners
    r.index.rest(found.keys, found.resting)
    r.deadlines.rest(found.keys, np.where(table["pinned"], table["pinned_until"], table["expires_at"]))
    for owner, entries in zip(owners, np.bincount(table["owner"], minlength=len(owners)).tolist(), strict=True):
        owner.entries += entries
    for row in np.flatnonzero(table["pinned"]).tolist():
        parent = r.index[found.keys[row]].parent
        if parent is not None:
            r.index[parent].pinned_children += 1
    for key in found.orphans:
        r.forget(key, "orphaned")
