"""The store's counters: per tier, per cause of a miss, and in total.

Counters only grow; gauges are read for the snapshot. All of them under the store's lock.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import accumulate, pairwise
from math import inf
from typing import Any, Literal, NamedTuple

from kvstore.printable import printable, size

MissCause = Literal["absent", "expired", "evicted", "deleted", "orphaned", "corrupt", "lost"]
"""absent: never put, or gone so long ago that nobody remembers. expired. evicted: for capacity or a quota. deleted: by
a caller. orphaned: the chunk before it left. corrupt: failed its checksum. lost: left its tier during the read, was
never written, or cannot be read here: its key file or its codec is missing."""
MISS_CAUSES: tuple[MissCause, ...] = ("absent", "expired", "evicted", "deleted", "orphaned", "corrupt", "lost")


ERROR_BOUNDS = (0.0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Upper bounds of the relative errors counted: int8 makes 0.003 to 0.01, nf4-kv and nf4 0.02 to 0.15."""


ERRORS = "relative_error_"
_LE, _SUM = "_le_", "_sum"


@dataclass(slots=True)
class Errors:
    """A histogram of the relative errors of the tensors of one encoding, measured when they were encoded.

    counts: for each bound the errors up to it and above the bound before, and the errors above all bounds. Among a
    store's numbers it is `relative_error_ENCODING_le_BOUND` (cumulative), `..._le_inf` and `..._sum`.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(ERROR_BOUNDS) + 1))
    total: float = 0.0

    @property
    def count(self) -> int:
        """Tensors counted."""
        return sum(self.counts)

    def observe(self, error: float) -> None:
        """Count one tensor."""
        self.counts[bisect_left(ERROR_BOUNDS, error)] += 1
        self.total += error

    def values(self, encoding: str) -> Iterator[tuple[str, float]]:
        """Names and numbers."""
        for bound, seen in self.buckets():
            yield f"{ERRORS}{encoding}{_LE}{bound}", seen
        yield f"{ERRORS}{encoding}{_SUM}", self.total

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Each bound as text, "inf" last, with the number of tensors up to it."""
        return zip((*map(str, ERROR_BOUNDS), "inf"), accumulate(self.counts), strict=True)


def errors_of(values: Mapping[str, float]) -> dict[str, Errors]:
    """The histograms among a store's numbers, by encoding. Bounds of another version are left out."""
    found: dict[str, Errors] = {}
    for name in values:
        if name.startswith(ERRORS) and name.endswith(_SUM):
            encoding = name.removeprefix(ERRORS).removesuffix(_SUM)
            seen = [int(values.get(f"{ERRORS}{encoding}{_LE}{bound}", 0)) for bound in (*ERROR_BOUNDS, inf)]
            counts = [b - a for a, b in pairwise([0, *seen])]
            found[encoding] = Errors(counts, values[name])
    return found


@dataclass(slots=True)
class TierCounters:
    """Counts of one tier since start. evictions: entries that left the store from this tier."""

    hits: int = 0
    puts: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0


@dataclass(slots=True)
class LookupCounters:
    """Questions for the cached part of a prompt, each counted once (`residency.lookups`).

    keys, tokens: asked for; tokens only where the caller says how many. hit_keys, hit_tokens: of these, found.
    misses: by why the first key missing of a lookup was missing, and each key missing of a plain get.
    """

    keys: int = 0
    tokens: int = 0
    hit_keys: int = 0
    hit_tokens: int = 0
    misses: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Counters:
    """Counts of the store since start; sizes in bytes of decoded tensors, times in seconds.

    errors: by encoding, for each tensor encoded on demotion ("raw": a tensor that had to stay as it is).
    coarsened: entries that went to cold in a coarser form than they had above; coarsened_nbytes: by how much smaller.
    """

    gets: int = 0
    puts: int = 0
    put_nbytes: int = 0
    hit_nbytes: int = 0
    deletes: int = 0
    expirations: int = 0
    encodes: int = 0
    encode_s: float = 0.0
    decodes: int = 0
    decode_s: float = 0.0
    coarsened: int = 0
    coarsened_nbytes: int = 0
    coarsen_s: float = 0.0
    promotions_dropped: int = 0
    orphaned: int = 0
    refused_chunks: int = 0
    maintainer_errors: int = 0
    prefill_saved_s: float = 0.0
    lookups: LookupCounters = field(default_factory=LookupCounters)
    misses: Counter[str] = field(default_factory=Counter)
    hits_in: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By the tier that answered and the encoding there."""
    errors: defaultdict[str, Errors] = field(default_factory=lambda: defaultdict(Errors))
    tiers: dict[str, TierCounters] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier now (entries, used and capacity bytes) and since start (the counters)."""

    entries: int
    used_nbytes: int
    capacity_nbytes: int
    hits: int = 0
    puts: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """A snapshot. values: by name, counters since start and gauges; tiers: by name, uppermost first."""

    values: Mapping[str, float]
    tiers: Mapping[str, TierStats]

    def as_dict(self) -> dict[str, object]:
        """Plain dictionaries, for JSON."""
        return {"values": dict(self.values), "tiers": {name: asdict(tier) for name, tier in self.tiers.items()}}

    def __repr__(self) -> str:
        entries = f"{self.values.get('entries', 0):,.0f} entries"
        return f"Stats({'; '.join([entries, *fills_text(self._fills()), ratio_text(self.values)])})"

    def _repr_html_(self) -> str:
        """For notebooks: a bar for each tier, and the hit ratio."""
        return fills_html(self._fills(), f"{self.values.get('entries', 0):,.0f} entries, {ratio_text(self.values)}")

    def _fills(self) -> list[tuple[str, float, float]]:
        return [(name, tier.used_nbytes, tier.capacity_nbytes) for name, tier in self.tiers.items()]


Fill = tuple[str, float, float]
"""A tier's name, bytes used, and its budget in bytes."""


def fills_text(fills: Iterable[Fill]) -> list[str]:
    """For each tier how full it is."""
    return [f"{printable(name)} {size(used)} of {size(capacity)}" for name, used, capacity in fills]


def ratio_text(values: Mapping[str, float]) -> str:
    """The hit ratio in words: of tokens where callers say how many they look up, else of keys."""
    for kind in ("tokens", "keys"):
        asked = values.get(f"lookup_{kind}", 0)
        if asked:
            return f"hit ratio {values.get(f'lookup_hit_{kind}', 0) / asked:.1%} of {kind}"
    return "no lookup yet"


def fills_html(fills: Iterable[Fill], caption: str) -> str:
    """A bar for each tier and a line below, as HTML for a notebook. Nothing is loaded, all text is escaped."""
    rows = []
    for name, used, capacity in fills:
        share = used / capacity if capacity > 0 else 0.0
        width = f"{100 * share:.1f}" if 0 <= share <= 1 else "100"
        rows.append(
            f"<tr><th style='text-align:left'>{escape(printable(name))}</th>"
            "<td><div style='width:16em;border:1px solid #888'>"
            f"<div style='width:{width}%;height:0.9em;background:#3a7bd5'></div></div></td>"
            f"<td>{escape(size(used))} of {escape(size(capacity))}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table><p>{escape(caption)}</p>"


class Setting(NamedTuple):
    """One setting in force. origin: where its value is from. live: it can change without a restart."""

    name: str
    value: Any
    origin: str
    live: bool


def values_of(counters: Counters, gauges: Mapping[str, float]) -> dict[str, float]:
    """All numbers by name.

    `hit_ratio` is lookup_hit_keys over lookup_keys and `token_hit_ratio` lookup_hit_tokens over lookup_tokens; 0 before
    the first lookup.
    """
    hits = sum(tier.hits for tier in counters.tiers.values())
    lookups = counters.lookups
    values: dict[str, float] = {
        "gets": counters.gets,
        "hits": hits,
        "misses": sum(counters.misses.values()),
        "lookup_keys": lookups.keys,
        "lookup_hit_keys": lookups.hit_keys,
        "hit_ratio": _ratio(lookups.hit_keys, lookups.keys),
        "lookup_tokens": lookups.tokens,
        "lookup_hit_tokens": lookups.hit_tokens,
        "token_hit_ratio": _ratio(lookups.hit_tokens, lookups.tokens),
        "prefill_saved_s": counters.prefill_saved_s,
        "puts": counters.puts,
        "put_nbytes": counters.put_nbytes,
        "hit_nbytes": counters.hit_nbytes,
        "deletes": counters.deletes,
        "expirations": counters.expirations,
        "encodes": counters.encodes,
        "encode_s": counters.encode_s,
        "decodes": counters.decodes,
        "decode_s": counters.decode_s,
        "coarsened": counters.coarsened,
        "coarsened_nbytes": counters.coarsened_nbytes,
        "coarsen_s": counters.coarsen_s,
        "promotions_dropped": counters.promotions_dropped,
        "orphaned": counters.orphaned,
        "refused_chunks": counters.refused_chunks,
        "maintainer_errors": counters.maintainer_errors,
        "evictions": sum(tier.evictions for tier in counters.tiers.values()),
    }
    values.update({f"misses_{cause}": counters.misses[cause] for cause in MISS_CAUSES})
    values.update({f"lookup_misses_{cause}": lookups.misses[cause] for cause in MISS_CAUSES})
    values.update({f"hits_{tier}_{encoding}": count for (tier, encoding), count in sorted(counters.hits_in.items())})
    for encoding, errors in sorted(counters.errors.items()):
        values.update(errors.values(encoding))
    values.update(gauges)
    return values


def _ratio(part: int, whole: int) -> float:
    # A caller that says less than it asks for cannot make more than all of it a hit.
    return min(1.0, part / whole) if whole else 0.0
