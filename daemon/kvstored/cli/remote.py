"""Shared by all client verbs: a `Client` for the duration of the command, and JSON lines."""

import functools
import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from kvstored.cli.everywhere import CREDENTIALS, everywhere, shown
from kvstored.cli.exits import NOT_HELD, BadUsage, errors_as_exit_codes

if TYPE_CHECKING:
    from kvstored_client import Client


def remote(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command on a daemon from `function(client, as_json, ...)`."""

    @functools.wraps(function)
    def command(address: str | None, timeout_s: float, as_json: bool, **arguments: Any) -> None:  # noqa: FBT001 - a flag
        from kvstored_client.wire.address import default_address

        where = address or default_address()
        given = {name: arguments.pop(name) for name in CREDENTIALS}
        with shown(given), errors_as_exit_codes(where), _client(where, timeout_s) as client:
            function(client, as_json, **arguments)

    return everywhere(command)


def _client(address: str, timeout_s: float) -> "Client":
    from kvstored_client import Client

    try:
        # numpy: the base install has no torch, and a command only copies bytes.
        return Client(address, timeout_s=timeout_s, framework="numpy", on_error="raise")
    except ValueError as error:
        raise BadUsage(str(error)) from None


COMPLETION_S = 0.5
"""How long a shell waits for names after the key is pressed: then it has none."""


def namespaces(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """For a shell's completion: the running daemon's namespaces that begin so. Silent where it does not answer."""
    from kvstored_client import Client
    from kvstored_client.wire.address import default_address

    try:
        given = {name: context.params.get(name) for name in CREDENTIALS}
        with shown(given), Client(context.params.get("address") or default_address(), timeout_s=COMPLETION_S) as client:
            values = client.stats().values
    except Exception:  # noqa: BLE001 - whatever it is, there is nowhere to say it: the shell shows a line being typed
        return []
    names = {name.removeprefix(_NAMESPACE) for name in values if name.startswith(_NAMESPACE)}
    # A tenant's are TENANT/NAMESPACE there, and the option takes the latter. A model's name may have "/", too.
    tenants = {name.removeprefix(_TENANT) for name in values if name.startswith(_TENANT)}
    own = {name.partition("/")[2] if name.partition("/")[0] in tenants else name for name in names}
    return sorted(name for name in own if name.startswith(incomplete))


_NAMESPACE, _TENANT = "namespace_nbytes_", "tenant_nbytes_"


def print_json(value: object) -> None:
    """Print one line of JSON, in ASCII. NaN and infinity, which JSON cannot express, are null."""
    click.echo(json.dumps(_known(value), separators=(", ", ": "), allow_nan=False))


def report_count(verb: str, done: str, count: int, asked: int, *, as_json: bool) -> None:
    """Print how many of the keys named a verb has dealt with; all of them, or exit code 1."""
    if as_json:
        print_json({"verb": verb, "asked": asked, done: count})
    else:
        click.echo(f"{done.replace('_', ' ')} {count} of {asked}")
    if count < asked:
        click.get_current_context().exit(NOT_HELD)


def _known(value: object) -> object:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _known(inner) for name, inner in value.items()}
    return [_known(inner) for inner in value] if isinstance(value, list | tuple) else value
