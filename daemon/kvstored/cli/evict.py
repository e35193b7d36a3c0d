"""`kvstored evict`, `kvstored drain` and `kvstored verify`: make room, write to disk, check the disk, by hand."""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click

from kvstore.hit import Verified
from kvstored.cli.exits import NOT_HELD, REFUSED, BadUsage
from kvstored.cli.filters import Filters, filtered
from kvstored.cli.keytext import KEY
from kvstored.cli.progress import waiting
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import size

if TYPE_CHECKING:
    from kvstored_client import Client

_BATCH = 1000
"""Keys per call: one transaction on disk, and the progress bar moves a few times a second."""


@click.command()
@click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
@click.option("--dry-run", is_flag=True, help="Count the entries that would be evicted, evict none.")
@filtered
@remote
def evict(client: "Client", as_json: bool, keys: tuple[bytes, ...], dry_run: bool, filters: Filters) -> None:  # noqa: FBT001 - `remote` calls it
    """Forget keys in all tiers, as evictions. The keys are the given ones, or all that match the filters.

    An entry must match all filters: --tier cold --older-than-s 86400. Without keys and filters nothing is evicted.
    Exit code 1: not all of the given keys were held.
    """
    if bool(keys) == filters.given:
        raise BadUsage("evict takes keys or filters (--prefix, --tier, --older-than-s, ...), one of the two")
    if not keys:
        _evict_fitting(client, filters, as_json=as_json, dry_run=dry_run)
        return
    unique = tuple(dict.fromkeys(keys))
    count = sum(at is not None for at in client.locate(unique)) if dry_run else client.evict(*unique)
    done = "would_evict" if dry_run else "evicted"
    if as_json:
        print_json({"verb": "evict", "asked": len(unique), done: count})
    else:
        click.echo(f"{done.replace('_', ' ')} {count} of {len(unique)}")
    if count < len(unique):
        click.get_current_context().exit(NOT_HELD)


def _evict_fitting(client: "Client", filters: Filters, *, as_json: bool, dry_run: bool) -> None:
    with waiting("looking", 0):
        found = [(info.key, sum(info.tier_nbytes), info.pinned) for info in filters.entries(client)]
    pinned = sum(pin for *_, pin in found)
    # A named key is evicted even if it is pinned; a filter leaves pinned keys alone.
    keys = [key for key, _, pin in found if not pin]
    nbytes = sum(held for _, held, pin in found if not pin)
    count = len(keys)
    if not dry_run:
        count = 0
        with click.progressbar(length=len(keys), label="evicting", hidden=len(keys) < _BATCH) as bar:
            for batch in _batches(keys):
                count += client.evict(*batch)
                bar.update(len(batch))
    done = "would_evict" if dry_run else "evicted"
    if as_json:
        print_json({"verb": "evict", "asked": len(keys), done: count, "held_nbytes": nbytes, "pinned_kept": pinned})
    else:
        kept = f"; {pinned} pinned ones stay" if pinned else ""
        click.echo(f"{done.replace('_', ' ')} {count} entries, {size(nbytes)}{kept}")


def _batches(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while batch := list(islice(rest, _BATCH)):
        yield batch


@click.command()
@remote
def drain(client: "Client", as_json: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Write entries that are only in memory to disk. None is evicted, calls continue; a later stop is quick."""
    with waiting("draining", 0):
        written = client.drain()
    if as_json:
        print_json({"verb": "drain", "written": written})
    else:
        click.echo(f"wrote {written} entries to the cold tier")


@click.command()
@remote
def verify(client: "Client", as_json: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Let the daemon read and check every record on disk, while it serves. Exit code 4: some were damaged.

    Damaged records are dropped, so a get of them is a miss; the daemon's log names them. For a directory that no
    daemon has open use `kvstored fsck`.
    """
    found = Verified(0, 0, 0, 0)
    with click.progressbar(length=1, label="checking", file=sys.stderr) as bar:
        for found in client.verify():
            bar.length = max(found.total, 1)
            bar.update(found.checked - bar.pos)
        bar.update(max(found.total, 1) - bar.pos)
    if as_json:
        print_json({"verb": "verify", **found._asdict()})
    else:
        click.echo(f"{found.checked} records, {size(found.nbytes)}: {found.corrupt or 'none'} damaged"
                   + (" and dropped" if found.corrupt else ""))  # fmt: skip
    if found.corrupt:
        sys.exit(REFUSED)


COMMANDS = (evict, drain, verify)
