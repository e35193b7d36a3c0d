"""Numbers for the statistics: what each tenant and each namespace holds. Pure."""

from collections.abc import Iterable

from kvstore.metadata.owner import Owner

NAMESPACES_SHOWN = 16
"""Each name is a time series in a metrics collector, so only the namespaces with the most hits are shown."""


def accounts_of(owners: Iterable[Owner], tenants: Iterable[str]) -> dict[str, float]:
    """Bytes in all tiers, entries and hits by tenant, and by namespace for those with the most hits."""
    sums = {tenant: [0, 0, 0] for tenant in sorted(tenants)}
    named: list[tuple[int, int, int, str]] = []
    for owner in owners:
        nbytes = sum(owner.nbytes)
        if owner.namespace and not owner.idle:
            named.append((owner.hits, nbytes, owner.entries, owner.name))
        if owner.tenant in sums:
            sums[owner.tenant] = [
                a + b for a, b in zip(sums[owner.tenant], (nbytes, owner.entries, owner.hits), strict=True)
            ]
    named.sort(reverse=True)
    values: dict[str, float] = {}
    for tenant, (nbytes, entries, hits) in sums.items():
        values |= {
            f"tenant_nbytes_{tenant}": nbytes,
            f"tenant_entries_{tenant}": entries,
            f"tenant_hits_{tenant}": hits,
        }
    for hits, nbytes, entries, name in named[:NAMESPACES_SHOWN]:
        values |= {
            f"namespace_nbytes_{name}": nbytes,
            f"namespace_entries_{name}": entries,
            f"namespace_hits_{name}": hits,
        }
    return values
