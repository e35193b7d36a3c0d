"""`kvstored remote status|check|flush`: what the daemon shares with other hosts through a store outside."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from kvstore.printable import printable, size
from kvstored.cli.exits import NOT_HELD, NotHeld
from kvstored.cli.progress import waiting
from kvstored.cli.remote import namespaces, print_json, remote
from kvstored.cli.text import duration, table

if TYPE_CHECKING:
    from kvstored_client import Client

_NOT_SET = "this daemon shares nothing with other hosts: store.shared.url is not set"
_BREAKER = ("closed: it is asked", "half-open: it is tried", "open: it is left alone for a while")
"""By `shared_breaker`."""


@click.group(name="remote")
def remote_store() -> None:
    """The store that hosts share (Valkey, Redis or S3): how it does, whether it is fit, and how to empty it."""


@remote_store.command()
@remote
def status(client: "Client", as_json: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """What the shared store brought this daemon and what it cost, since start. Exit code 1: nothing is shared.

    Asks the daemon alone; `check` asks the store.
    """
    values = {name: value for name, value in client.stats().values.items() if name.startswith("shared_")}
    if as_json:
        print_json({"shared": bool(values), "values": values})
    elif values:
        click.echo("\n".join(table(("WHAT", "VALUE"), _rows(values), left=1)))
    if not values:
        raise NotHeld(_NOT_SET)


def _rows(v: Mapping[str, float]) -> list[tuple[str, str]]:
    def n(name: str) -> float:
        return v.get(f"shared_{name}", 0.0)

    def by(prefix: str) -> str:
        found = [(name.removeprefix(prefix), count) for name, count in sorted(v.items()) if name.startswith(prefix)]
        return ", ".join(f"{count:,.0f} {word}" for word, count in found if count) or "none"

    lookups, fetched_s = n("lookups"), n("fetch_s")
    each = max(1.0, lookups)
    asked = f"{lookups:,.0f}, {n('futile') / each:.0%} in vain, {duration(n('lookup_s') / each)} each"
    came = f"{n('hits'):,.0f} chunks, {size(n('hit_nbytes'))}"
    breaker = int(n("breaker"))
    return [
        ("nodes that answer", f"{n('nodes_up'):,.0f} of {n('nodes'):,.0f}"),
        ("breaker", _BREAKER[breaker] if 0 <= breaker < len(_BREAKER) else str(breaker)),
        ("lookups", asked),
        ("came from it", came + (f", {size(n('hit_nbytes') / fetched_s)} a second" if fetched_s else "")),
        ("published", f"{n('published'):,.0f} chunks, {size(n('publish_nbytes'))}"),
        ("from put to publication", duration(n("lag_s"))),
        ("waits to be published", size(n("queue_nbytes"))),
        ("not published", by("shared_dropped_")),
        ("not sent twice", f"{n('duplicate_uploads'):,.0f}"),
        ("not believed", f"{n('corrupt'):,.0f}"),
        ("calls that failed", by("shared_errors_")),
        ("deletions not acknowledged", f"{n('barred'):,.0f}"),
    ]  # fmt: skip


@remote_store.command()
@remote
def check(client: "Client", as_json: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Put, look up, read and delete a probe in the shared store, and judge its servers' settings.

    Exit code 1: something is wrong, a sentence each.
    """
    with waiting("checking", 0):
        complaints = client.check_shared()
    if as_json:
        print_json({"good": not complaints, "complaints": complaints})
    else:
        for complaint in complaints:
            click.echo(printable(complaint))
        if not complaints:
            click.echo("the shared store is fit: a probe was put, looked up, read and deleted")
    if complaints:
        click.get_current_context().exit(NOT_HELD)


@remote_store.command()
@click.option("--namespace", shell_complete=namespaces, help="Only what was put under this name.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote
def flush(client: "Client", as_json: bool, namespace: str | None, yes: bool) -> None:  # noqa: FBT001
    """Make all hosts miss what the shared store has, or all of a namespace, within 2 s; after a question.

    What hosts hold in their own tiers stays: `kvstored flush`. Exit code 1: the answer was no.
    """
    what = "all of the shared store" if namespace is None else f"namespace {printable(namespace)} of the shared store"
    if not yes and not click.confirm(f"Make every host miss {what}, for good?", err=True):
        raise NotHeld("nothing was flushed")
    client.flush_shared(namespace)
    if as_json:
        print_json({"verb": "flush", "namespace": namespace, "flushed": True})
    else:
        click.echo(f"flushed {what}: every host misses it within 2 s")


COMMANDS = (remote_store,)
