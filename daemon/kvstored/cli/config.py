"""`kvstored config check|show|set`: the settings that the daemon uses or would use, and the origin of each."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvstored.cli.exits import BadUsage, errors_as_exit_codes
from kvstored.cli.progress import waiting
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import table

if TYPE_CHECKING:
    from kvstore.config import SharedConfig
    from kvstore.stats import Setting
    from kvstored_client import Client

_FILE = click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))


@click.group()
def config() -> None:
    """Check or show the daemon's settings before it uses them."""


@config.command()
@_FILE
def check(file: Path | None) -> None:
    """Read FILE and the environment as `serve` would, tokens and certificates too. Exit code 2: there is a mistake."""
    with errors_as_exit_codes("the configured address"):
        from kvstore.ownership import check_private, everybody_reads
        from kvstored.access.tokens import read_tokens
        from kvstored.settings import load_settings
        from kvstored.telemetry.router_events import check_libraries
        from kvstored.telemetry.spans import open_spans

        settings = load_settings(file)
        server, entries, notes = settings.server, 0, list[str]()
        if server.tokens:
            found = read_tokens(server.tokens)
            entries = len(found.by_digest) + len(found.by_common_name)
            if everybody_reads(server.tokens):
                notes.append(f"note: everybody on this host can read {server.tokens}: chmod o-r {server.tokens}")
        for path in filter(None, (server.tls_certificate, server.tls_key, server.tls_client_ca)):
            Path(path).read_bytes()  # an OSError names the file
        if server.tls_key:
            check_private(server.tls_key, "server.tls_key", secret=True)
        for path in settings.store.cold.key_files.values():
            check_private(path, "store.cold.key_files", secret=True)
        _check_shared(settings.store.shared)
        _check_bases(settings.store.warm.bases.values())
        open_spans(server.traces_endpoint, "").close()
        check_libraries(server)
    for note in notes:
        click.echo(note)
    click.echo(f"{file or 'defaults and environment'}: good" + (f", {entries} callers" if entries else ""))


def _check_shared(shared: "SharedConfig") -> None:
    """Read the files of [store.shared] as the daemon would. Raises ConfigError."""
    if not shared.url:
        return
    from kvstore.entries.sealing import Seals
    from kvstore.ownership import check_private
    from kvstore.shared.names import read_secret

    read_secret(shared.secret_file)
    Seals(shared.key_files, "store.shared.key_files")
    for name in ("credentials_file", "key_file"):
        path = getattr(shared, name)
        if path:
            check_private(path, f"store.shared.{name}", secret=True)


def _check_bases(paths: Iterable[str]) -> None:
    """Read the bases of kv-learned as the daemon would. Raises ConfigError."""
    for path in paths:
        from kvstore.codecs.basis import read_basis

        read_basis(path)


@config.command()
@_FILE
@click.option("--changed", is_flag=True, help="Only settings that are not the default.")
@click.option("--running", is_flag=True, help="Those in force in the running daemon, not those of a file.")
@remote
def show(client: "Client", as_json: bool, *, file: Path | None, changed: bool, running: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Every setting with its value and its origin: the default, FILE, or the environment's variable.

    --running asks the daemon, which needs the admin right; LIVE says what `config set` may change.
    """
    if running and file is not None:
        raise BadUsage("--running asks the daemon for its own settings: leave FILE out")
    found = client.settings() if running else _of_file(file)
    rows = [row for row in found if not (changed and row.origin == "default")]
    if as_json:
        print_json({row.name: {"value": row.value, "origin": row.origin, "live": row.live} for row in rows})
        return
    cells = [(row.name, _text(row.value), row.origin, "live" if row.live else "-") for row in rows]
    click.echo("\n".join(table(("SETTING", "VALUE", "ORIGIN", "LIVE"), cells, left=4)))


def _of_file(file: Path | None) -> "list[Setting]":
    from kvstore.config import leaves
    from kvstore.stats import Setting
    from kvstored.live import LIVE
    from kvstored.settings import Source

    settings, where = Source(file).read()
    return [Setting(name, value, where[name], name in LIVE) for name, value in leaves(settings)]


@config.command("set")
@click.argument("settings", nargs=-1, required=True, metavar="NAME=VALUE...")
@remote
def set_(client: "Client", as_json: bool, *, settings: tuple[str, ...]) -> None:  # noqa: FBT001 - `remote` calls it
    """Change settings of the running daemon: the tiers' budgets, the default TTL, the log level.

    They hold until it is restarted or reloaded, which take what its file says: write them there too. A smaller
    budget takes effect at once: what no longer fits sinks to the tier below. Sizes may be written as 8GiB.
    """
    asked: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadUsage(f"expected NAME=VALUE, such as store.hot.capacity_nbytes=8GiB, got {text!r:.80}")
        asked[name] = value
    with waiting("changing", 0):
        changed = client.configure(asked)
    if as_json:
        print_json({name: {"before": before, "now": now} for name, (before, now) in changed.items()})
        return
    for name in asked:
        before, now = changed.get(name, (None, None))
        click.echo(f"{name} is {_text(now)}, was {_text(before)}" if name in changed else f"{name} is so already")
    click.echo("until the next restart or reload: to keep it, write it into the daemon's file", err=True)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value in (None, "") else str(value)


COMMANDS = (config,)
