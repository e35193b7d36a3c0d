"""`kvstored ping`: whether a daemon serves. It needs no right, so that a probe needs no token."""

import time
from typing import TYPE_CHECKING

import click

from kvstored.cli.exits import Refused
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import duration

if TYPE_CHECKING:
    from kvstored_client import Client


@click.command()
@remote
def ping(client: "Client", as_json: bool) -> None:  # noqa: FBT001 - `remote` calls it
    """Ask the daemon whether it serves, and time the answer. Exit code 3: no answer; 4: it does not serve.

    Any caller may ask, without a token too; so this says nothing about the caller's rights. The time is that of a call
    over an open connection.
    """
    serves = client.ping()  # opens the connection
    began = time.perf_counter()
    serves = client.ping() and serves
    latency_s = time.perf_counter() - began
    if as_json:
        print_json({"address": client.address, "serving": serves, "latency_s": latency_s})
    elif serves:
        click.echo(f"serving at {client.address}, {_latency(latency_s)}")
    if not serves:
        raise Refused(f"the daemon at {client.address} answers and does not serve: it is about to stop")


def _latency(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else duration(seconds)


COMMANDS = (ping,)
