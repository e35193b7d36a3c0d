"""`kvstored evict`, `demote`, `promote`, `flush`, `drain`, `verify`, `snapshot`: make room, check and copy the disk."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvstore.hit import Copied, EntryInfo, Verified
from kvstore.printable import printable, size
from kvstored.cli.exits import REFUSED, BadUsage, NotHeld
from kvstored.cli.filters import Filters, filtered
from kvstored.cli.keytext import KEY
from kvstored.cli.progress import waiting
from kvstored.cli.remote import namespaces, print_json, remote, report_count

if TYPE_CHECKING:
    from kvstored_client import Client

_BATCH = 1000
"""Keys per call: one transaction on disk, and the progress bar moves a few times a second."""


@dataclass(frozen=True)
class _Verb:
    """A verb over given keys, or over all entries that match filters."""

    name: str
    done: str
    help: str


_VERBS = (
    _Verb("evict", "evicted", "Forget keys in all tiers, as evictions."),
    _Verb("demote", "demoted", "Move keys one tier down; pinned ones stay. With --tier hot: out of hot alone."),
    _Verb("promote", "promoted", "Copy keys to the hot tier."),
)
_HELP = """{help} The keys are the given ones, or all that match the filters.

An entry must match all filters: --tier {tier} --older-than-s 86400. Without keys and filters nothing is {done}.
Exit code 1: not all of the given keys were.
"""


def _command(verb: _Verb) -> click.Command:
    tier = "hot" if verb.name == "demote" else "cold"

    @click.command(name=verb.name, help=_HELP.format(help=verb.help, tier=tier, done=verb.done))
    @click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
    @click.option("--dry-run", is_flag=True, help=f"Count the entries that would be {verb.done}, change none.")
    @filtered
    @remote
    def command(client: "Client", as_json: bool, keys: tuple[bytes, ...], dry_run: bool, filters: Filters) -> None:  # noqa: FBT001 - `remote` calls it
        if bool(keys) == filters.given:
            raise BadUsage(f"{verb.name} takes keys or filters (--prefix, --tier, --older-than-s, ...), one of the two")
        if keys:
            _named(client, verb, tuple(dict.fromkeys(keys)), as_json=as_json, dry_run=dry_run)
        else:
            over_fitting(client, verb, filters, as_json=as_json, dry_run=dry_run)

    return command


def _named(client: "Client", verb: _Verb, keys: tuple[bytes, ...], *, as_json: bool, dry_run: bool) -> None:
    if dry_run and verb.name == "evict":
        count = sum(held is not None for held in client.locate(keys))
    elif dry_run:
        count = sum(info is not None and _moves(verb, info) for info in map(client.inspect, keys))
    else:
        count = getattr(client, verb.name)(*keys)
    report_count(verb.name, f"would_{verb.name}" if dry_run else verb.done, count, len(keys), as_json=as_json)


def _moves(verb: _Verb, info: EntryInfo) -> bool:
    """Whether a verb would do anything to an entry, as far as its facts tell."""
    if verb.name == "promote":
        return "hot" not in info.tiers
    # A named key is evicted even if it is pinned; a filter leaves pinned keys alone.
    return not info.pinned and (verb.name == "evict" or info.tiers[:1] != ("cold",))


def over_fitting(client: "Client", verb: _Verb, filters: Filters, *, as_json: bool, dry_run: bool) -> None:
    """A verb over all entries that match the filters."""
    with waiting("looking", 0):
        found = [(info.key, sum(info.tier_nbytes), info.pinned, _moves(verb, info)) for info in filters.entries(client)]
    keys = [key for key, _, _, moves in found if moves]
    pinned = sum(pin for _, _, pin, moves in found if not moves)
    nbytes = sum(held for _, held, _, moves in found if moves)
    count = len(keys)
    if not dry_run:
        count = 0
        with click.progressbar(length=len(keys), label=verb.name, file=sys.stderr, hidden=len(keys) < _BATCH) as bar:
            for batch in _batches(keys):
                count += getattr(client, verb.name)(*batch)
                bar.update(len(batch))
    done = f"would_{verb.name}" if dry_run else verb.done
    if as_json:
        print_json({"verb": verb.name, "asked": len(keys), done: count, "held_nbytes": nbytes, "pinned_kept": pinned})
    else:
        kept = f"; {pinned} pinned ones stay" if pinned else ""
        click.echo(f"{done.replace('_', ' ')} {count} entries, {size(nbytes)}{kept}")


@click.command()
@click.option(
    "--namespace",
    default="",
    shell_complete=namespaces,
    help="Only entries put under this name, its versions NAME@... included.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote
def flush(client: "Client", as_json: bool, namespace: str, yes: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Forget all entries in all tiers, or all of a namespace, after a question. Pinned ones stay.

    They count as evictions. Exit code 1: the answer was no.
    """
    filters = Filters(namespace=namespace)
    if not yes:
        count = sum(1 for _ in filters.entries(client))
        of = f"in namespace {printable(namespace)} " if namespace else ""
        if not click.confirm(f"Forget {count:,} entries {of}at {client.address}?", err=True):
            raise NotHeld("nothing was forgotten")
    over_fitting(client, _VERBS[0], filters, as_json=as_json, dry_run=False)


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


@click.command()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@remote
def snapshot(client: "Client", as_json: bool, target: Path) -> None:  # noqa: FBT001 - `remote` calls it
    """Copy all entries to DIR while the daemon serves: a backup. Exit code 4: some could not be read, and are left out.

    DIR is made by the daemon, on its host and as its user, with mode 0700; one that is there must be empty. To restore
    it, start a daemon with DIR, or a copy of it, as its server.data_dir, or put its entries into another directory:
    kvstored import. Interrupted, it leaves nothing.
    """
    where, found = target.absolute(), Copied(0, 0, 0, 0, 0)
    with click.progressbar(length=1, label="copying", file=sys.stderr) as bar:
        for found in client.snapshot(str(where)):
            bar.length = max(found.total, 1)
            bar.update(found.done - bar.pos)
        bar.update(max(found.total, 1) - bar.pos)
    if as_json:
        print_json({"verb": "snapshot", "directory": str(where), "entries": found.copied, "nbytes": found.nbytes,
                    "lost": found.lost})  # fmt: skip
    else:
        lost = f", {found.lost} could not be read" if found.lost else ""
        click.echo(f"{printable(where)}: {found.copied} entries, {size(found.nbytes)}{lost}")
    if client.address.startswith("unix:") and where.parent.is_dir() and not where.exists():
        click.echo(f"kvstored: {printable(where)} is not there for this shell: the service has a /tmp of its own, so "
                   "name a directory elsewhere, such as /var/lib/kvstored/snapshot", err=True)  # fmt: skip
    if found.lost:
        sys.exit(REFUSED)


COMMANDS = (*map(_command, _VERBS), flush, drain, verify, snapshot)
