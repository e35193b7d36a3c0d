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
