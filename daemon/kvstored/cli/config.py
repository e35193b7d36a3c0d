"""`kvstored config check|show`: the settings that the daemon would use, and the origin of each."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstored.cli.exits import errors_as_exit_codes
from kvstored.cli.text import table

if TYPE_CHECKING:
    from kvstore.config import SharedConfig

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
        open_spans(server.traces_endpoint, "").close()
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


@config.command()
@_FILE
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option("--changed", is_flag=True, help="Only settings that are not the default.")
def show(*, file: Path | None, as_json: bool, changed: bool) -> None:
    """Every setting with its value and its origin: the default, FILE, or the environment's variable."""
    with errors_as_exit_codes("the configured address"):
        from kvstored.settings import load_settings

        settings = load_settings(file)
        found = [row for row in _rows(settings, file) if not (changed and row[2] == "default")]
    if as_json:
        click.echo(json.dumps({name: {"value": value, "origin": origin} for name, value, origin in found}))
        return
    click.echo("\n".join(table(("SETTING", "VALUE", "ORIGIN"), [(n, _text(v), o) for n, v, o in found], left=3)))


def _rows(settings: object, file: Path | None) -> Iterator[tuple[str, Any, str]]:
    from kvstore.config import read_toml
    from kvstored.settings import ENVIRONMENT_PREFIX

    table_of_file: Mapping[str, Any] = read_toml(file) if file is not None else {}
    variables = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): name
        for name in os.environ
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name
    }
    for name, value, default in _leaves(settings, type(settings)()):
        if name in variables:
            origin = variables[name]
        elif _in_file(table_of_file, name):
            origin = str(file)
        elif value != default:
            origin = "this host"  # directories depend on the user and on the service manager
        else:
            origin = "default"
        yield name, value, origin


def _leaves(value: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for each in fields(value):
        at, other = getattr(value, each.name), getattr(default, each.name)
        if is_dataclass(at):
            yield from _leaves(at, other, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, at, other


def _in_file(table_of_file: Mapping[str, Any], name: str) -> bool:
    at: Any = table_of_file
    for step in name.split("."):
        if not isinstance(at, Mapping) or step not in at:
            return False
        at = at[step]
    return True


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value in (None, "") else str(value)


COMMANDS = (config,)
