"""What is held and how it goes, without reading values: entry by entry, and in numbers.

Takes the residency lock for one entry at a time, so a listing of a million keys holds nobody up; it shows each entry as
it was at some moment of the call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod

from kvstore.codecs.basis import predicted_kl
from kvstore.entries.entry import Described, Entry
from kvstore.hit import EntryInfo, Explanation, Form
from kvstore.keys import Key
from kvstore.metadata.accounts import accounts_of
from kvstore.metadata.owner import Owner
from kvstore.residency.state import Residency
from kvstore.stats import Stats, TierStats, values_of
from kvstore.tiers import TierName


def entries(
    r: Residency,
    *,
    tier: str | None = None,
    key_prefix: bytes = b"",
    tenant: str = "",
    namespace: str = "",
    limit: int | None = None,
) -> Iterator[EntryInfo]:
    """Entries in order of key; tensors are described only where they are in memory."""

    def fits(owner: Owner) -> bool:
        return (not tenant or owner.tenant == tenant) and (
            not namespace or owner.namespace == namespace or owner.namespace.startswith(f"{namespace}@")
        )

    # A copy in one step of the interpreter, not under the lock: there may be a million. Each is looked up again below.
    keys = [key for key in r.keys_now() if key.startswith(key_prefix)]
    if tenant or namespace:
        keys = [key for key in keys if fits(r.owner_of(key))]
    keys.sort()
    found = 0
    for key in keys:
        if limit is not None and found >= limit:
            return
        info = entry_info(r, key, with_tensors=False)
        if info is not None and (tier is None or tier in info.tiers):
            found += 1
            yield info


def entry_info(r: Residency, key: Key, *, with_tensors: bool) -> EntryInfo | None:
    """One live entry. with_tensors: read their types and shapes from disk where they are only there."""
    with r.lock:
        meta = r.live(key)
        if meta is None:
            return None
        now = r.clock.now()
        place = r.lookup(key)
        tiers = r.tiers_of(key)
        sizes = tuple(_nbytes_in(r, name, key) for name in tiers)
    entry = place[1] if place is not None else None
    specs: Mapping[str, Described]
    if entry is not None:
        specs = {name: t.described for name, t in entry.tensors.items()}
    else:
        specs = (r.cold.specs_of(key) if with_tensors and r.cold is not None else None) or {}
    forms = (
        tuple(_form(r, name, key, nbytes) for name, nbytes in zip(tiers, sizes, strict=True)) if with_tensors else ()
    )
    return EntryInfo(
        key=key,
        tiers=tuple(tiers),
        tier_nbytes=sizes,
        tensors={name: of.spec for name, of in specs.items()},
        encoding=entry.encoding if entry is not None else meta.encoding,
        lossy=entry.lossy if entry is not None else meta.lossy,
        fidelity="exact" if meta.exact else "auto",
        pinned=meta.pinned,
        value_nbytes=meta.value_nbytes,
        age_s=now - meta.created_at,
        ttl_left_s=None if meta.pinned else meta.expires_at - now,
        hits=meta.hits,
        receipt={name: of.relative_error for name, of in specs.items()},
        tenant=meta.owner.tenant,
        namespace=meta.owner.namespace,
        forms=forms,
    )


def explain(r: Residency, keys: Sequence[Key]) -> list[Explanation]:
    """For each key where it is held, or why it is gone. Does not count as use."""
    found: list[Explanation] = []
    for key in keys:
        info = entry_info(r, key, with_tensors=True)
        with r.lock:
            stone = r.why_gone(key)
            now = r.clock.now()
        if info is not None:
            found.append(Explanation(key, "held", info.tiers[0] if info.tiers else "", hits=info.hits, entry=info))
        elif stone is not None:
            found.append(Explanation(key, stone.cause, stone.tier, now - stone.at, stone.hits))
        else:
            found.append(Explanation(key, "never put"))
    return found


def snapshot(r: Residency, others: Mapping[str, float]) -> Stats:
    """Counters since start and gauges of now; others: gauges that the residency does not know."""
    disk = {} if r.cold is None else r.cold.gauges()  # asks the file system: not under the lock
    with r.lock:
        owners, names = list(r.tenants), r.tenants.names()
    accounts = accounts_of(owners, names)  # of up to 4,096 owners
    with r.lock:
        tiers: dict[str, TierStats] = {}
        for tier in (r.hot, r.warm, r.cold):
            if tier is None:
                continue
            tiers[tier.name] = TierStats(
                entries=len(tier),
                used_nbytes=tier.used_nbytes,
                capacity_nbytes=tier.capacity_nbytes,
                **asdict(r.counters.tiers[tier.name]),
            )
        gauges: dict[str, float] = {"entries": len(r.index), "in_transit": len(r.transit), **others}
        gauges |= {**disk, **accounts}
        return Stats(values_of(r.counters, gauges), tiers)


def _form(r: Residency, name: TierName, key: Key, nbytes: int) -> Form:
    """What a tier holds of a key, or held a moment ago. nbytes: as its budget counts it."""
    described: Mapping[str, Described] | None
    if name == "cold":
        described = r.cold.specs_of(key) if r.cold is not None else None
    else:
        with r.lock:
            entry = _entry_in(r, name, key)
        described = None if entry is None else {tensor: of.described for tensor, of in entry.tensors.items()}
    tensors = list((described or {}).values())
    values = sum(prod(of.spec.shape) for of in tensors)
    encoding = next((of.encoding for of in tensors if of.encoding != "raw"), "raw")
    basis = next((of.basis for of in tensors if of.basis), "")
    exact = not any(of.relative_error for of in tensors)
    return Form(encoding, 8 * nbytes / values if values else 0.0, 0.0 if exact else predicted_kl(basis), basis)


def _entry_in(r: Residency, name: TierName, key: Key) -> Entry | None:
    entry = (r.hot if name == "hot" else r.warm).get(key)
    return r.transit[key][1] if entry is None and key in r.transit else entry


def _nbytes_in(r: Residency, name: TierName, key: Key) -> int:
    if name == "cold":
        return r.cold.nbytes_of(key) if r.cold is not None else 0
    entry = _entry_in(r, name, key)
    return entry.nbytes if entry is not None else 0
