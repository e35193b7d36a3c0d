"""Verbs that only read: stats, ls, inspect."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from heapq import nsmallest
from itertools import islice
from math import inf
from typing import TYPE_CHECKING

import click

from kvstore.hit import EntryInfo
from kvstore.printable import printable, size
from kvstore.stats import ERRORS, errors_of
from kvstored.cli.exits import NotHeld
from kvstored.cli.filters import Filters, filtered
from kvstored.cli.keytext import KEY, key_text, short_key, show_key
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import accuracy, duration, form_text, quantity, receipt_dict, table
from kvstored.cli.top import SCHEMA, repeat

if TYPE_CHECKING:
    from kvstored_client import Client

_LS_HEAD = ("KEY", "NAMESPACE", "TENANT", "TIERS", "ENCODING", "VALUE", "HELD", "AGE", "TTL", "HITS")
_ORDERS: dict[str, Callable[[EntryInfo], float]] = {
    "hits": lambda info: -info.hits,
    "age": lambda info: -info.age_s,
    "size": lambda info: -info.value_nbytes,
    "ttl": lambda info: inf if info.ttl_left_s is None else info.ttl_left_s,
}
_PAGE = 500
"""Rows aligned at a time, so that a listing of a million keys begins at once."""


@click.command()
@click.option("--watch", "watch_s", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Repeat until Ctrl-C.")
@remote
def stats(client: "Client", as_json: bool, watch_s: float | None) -> None:  # noqa: FBT001 - `remote` calls it
    """Tiers, their fill, and all counters."""
    repeat(lambda: _print_stats(client, as_json=as_json), watch_s or 0, None if watch_s else 1)


def _print_stats(client: "Client", *, as_json: bool) -> None:
    found = client.stats()
    if as_json:
        print_json({"schema": SCHEMA, **found.as_dict()})
        return
    head = ("TIER", "ENTRIES", "USED", "CAPACITY", "FULL", "HITS", "PUTS", "EVICTED", "DEMOTED", "PROMOTED")
    rows = [
        (
            name,
            f"{t.entries:,}",
            size(t.used_nbytes),
            size(t.capacity_nbytes),
            f"{t.used_nbytes / t.capacity_nbytes:.0%}" if t.capacity_nbytes else "-",
            *(f"{n:,}" for n in (t.hits, t.puts, t.evictions, t.demotions, t.promotions)),
        )
        for name, t in found.tiers.items()
    ]
    click.echo("\n".join(table(head, rows)))
    click.echo()
    errors = errors_of(found.values)
    if errors:
        means = [(name, f"{e.count:,}", f"{e.total / e.count:.3g}") for name, e in errors.items() if e.count]
        click.echo("\n".join(table(("ENCODED AS", "TENSORS", "MEAN RELATIVE ERROR"), means)))
        click.echo()
    counted = sorted((name, v) for name, v in found.values.items() if not name.startswith(ERRORS))
    click.echo("\n".join(table(("COUNTER", "VALUE"), [(name, quantity(name, v)) for name, v in counted])))


@click.command()
@click.option("--limit", type=click.IntRange(min=1), help="The number of entries at most.")
@click.option("--sort", type=click.Choice(list(_ORDERS)),
              help="Most hits, oldest, largest decoded or soonest to expire first.")  # fmt: skip
@click.option("--by", type=click.Choice(["namespace", "tenant"]),
              help="Sums by this instead of entries, the one that holds most first.")  # fmt: skip
@click.option("--full", is_flag=True, help="Keys in full, not the first 12 digits of those in hexadecimal.")
@filtered
@remote
def ls(
    client: "Client",
    as_json: bool,  # noqa: FBT001 - `remote` calls it
    limit: int | None,
    sort: str | None,
    full: bool,  # noqa: FBT001
    by: str | None,
    filters: Filters,
) -> None:
    """Entries, in order of key. An entry must match all filters. The last line has the totals of those shown."""
    if by is not None:
        _summed(filters, filters.entries(client, limit), by, as_json=as_json)
        return
    entries = _sorted(filters.entries(client), sort, limit) if sort else filters.entries(client, limit)
    if as_json:
        for info in entries:
            print_json(info_dict(info))
        return
    shown, totals = show_key if full else short_key, Totals()
    first = True
    for page in _pages(totals.of(entries)):
        lines = table(_LS_HEAD, [_row(info, shown) for info in page], left=5)
        click.echo("\n".join(lines if first else lines[1:]))
        first = False
    click.echo(totals.line())


def _summed(filters: Filters, entries: Iterator[EntryInfo], by: str, *, as_json: bool) -> None:
    """What each namespace or tenant holds: with --tier in that tier alone."""
    sums: dict[str, Totals] = {}
    for info in entries:
        sums.setdefault(getattr(info, by), Totals()).add(info, filters.tier)
    rows = sorted(sums.items(), key=lambda row: -row[1].tier_nbytes.total())
    if as_json:
        for name, found in rows:
            print_json({by: name, "entries": found.entries, "value_nbytes": found.value_nbytes, "hits": found.hits,
                        "tier_nbytes": dict(found.tier_nbytes)})  # fmt: skip
        return
    held = sum(found.tier_nbytes.total() for _, found in rows)
    cells = [
        (printable(name) or "-", f"{found.entries:,}", size(found.tier_nbytes.total()),
         f"{found.tier_nbytes.total() / max(1, held):.1%}", f"{found.hits:,}",
         " ".join(f"{tier} {size(nbytes)}" for tier, nbytes in found.tier_nbytes.items()))
        for name, found in rows
    ]  # fmt: skip
    click.echo("\n".join(table((by.upper(), "ENTRIES", "HELD", "SHARE", "HITS", "IN"), cells, left=1)))


def _sorted(entries: Iterator[EntryInfo], sort: str, limit: int | None) -> list[EntryInfo]:
    # Of a million entries --limit keeps only as many in memory.
    order = _ORDERS[sort]
    return sorted(entries, key=order) if limit is None else nsmallest(limit, entries, key=order)


@dataclass
class Totals:
    """What has passed `of`."""

    entries: int = 0
    value_nbytes: int = 0
    tier_nbytes: Counter[str] = field(default_factory=Counter)
    hits: int = 0

    def add(self, info: EntryInfo, only: str | None = None) -> None:
        """Count an entry; its bytes in all tiers that hold it, or in one."""
        self.entries += 1
        self.value_nbytes += info.value_nbytes
        self.hits += info.hits
        held = dict(zip(info.tiers, info.tier_nbytes, strict=True))
        self.tier_nbytes.update(held if only is None else {only: held.get(only, 0)})

    def of(self, entries: Iterable[EntryInfo]) -> Iterator[EntryInfo]:
        """The entries, counted."""
        for info in entries:
            self.add(info)
            yield info

    def line(self) -> str:
        """All of them in a line."""
        held = "".join(f"; {tier} {size(nbytes)}" for tier, nbytes in self.tier_nbytes.items())
        count = f"{self.entries:,} {'entry' if self.entries == 1 else 'entries'}"
        return printable(f"{count}, {size(self.value_nbytes)} decoded, {size(self.tier_nbytes.total())} held{held}")


@click.command()
@click.argument("key", type=KEY)
@remote
def inspect(client: "Client", as_json: bool, key: bytes) -> None:  # noqa: FBT001
    """All facts about one entry. Does not count as use. Exit code 1: not held."""
    info = client.inspect(key)
    if info is None:
        raise NotHeld(f"not held: {show_key(key)}")
    if as_json:
        print_json(info_dict(info))
        return
    held = ", ".join(f"{tier} ({size(n)})" for tier, n in zip(info.tiers, info.tier_nbytes, strict=True))
    facts = {
        "key": key_text(info.key),
        "held in": held,
        "encoding": info.encoding + (", lossy" if info.lossy else ", bit for bit as put"),
        "fidelity": info.fidelity,
        "value": size(info.value_nbytes),
        "pinned": "yes" if info.pinned else "no",
        "age": duration(info.age_s),
        "expires in": _ttl(info),
        "hits": str(info.hits),
    }
    facts |= {name: of for name, of in (("tenant", info.tenant), ("namespace", info.namespace)) if of}
    for tier, form in zip(info.tiers, info.forms, strict=False):  # an older daemon sends none
        facts[f"form in {tier}"] = form_text(form)
    for name, tensor in info.tensors.items():
        facts[f"tensor {name}"] = f"{tensor.dtype} {list(tensor.shape)}, {accuracy(info.receipt.get(name, inf))}"
    click.echo("\n".join(printable(f"{name + ':':14} {value}") for name, value in facts.items()))


def info_dict(info: EntryInfo) -> dict[str, object]:
    """An entry for JSON: the key in its text form, and in hexadecimal."""
    return {
        **asdict(info),
        "key": key_text(info.key),
        "key_hex": info.key.hex(),
        "receipt": receipt_dict(info.receipt),
    }


def _pages(entries: Iterator[EntryInfo]) -> Iterator[list[EntryInfo]]:
    page = list(islice(entries, _PAGE))
    yield page
    while page:
        page = list(islice(entries, _PAGE))
        if page:
            yield page


def _row(info: EntryInfo, shown: Callable[[bytes], str]) -> tuple[str, ...]:
    encoding = info.encoding + (" exact" if info.fidelity == "exact" else "")
    return (
        shown(info.key),
        info.namespace or "-",
        info.tenant or "-",
        "+".join(info.tiers),
        encoding,
        size(info.value_nbytes),
        size(sum(info.tier_nbytes)),
        duration(info.age_s),
        _ttl(info),
        str(info.hits),
    )


def _ttl(info: EntryInfo) -> str:
    return "pinned" if info.ttl_left_s is None else duration(info.ttl_left_s)


COMMANDS = (stats, ls, inspect)
