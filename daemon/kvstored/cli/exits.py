"""Exit codes, and the errors that cause them. docs/operations.md lists them for the operator; they are frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from kvstore.errors import ConfigError, KvstoreError, TierUnavailable
from kvstore.printable import printable

OK = 0
NOT_HELD = 1
USAGE = 2
"""Bad usage, configuration or file: click's own code for bad usage."""
UNREACHABLE = 3
REFUSED = 4


class Failure(click.ClickException):
    """Ends the command with a sentence on standard error and an exit code."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the sentence."""
        click.echo(f"kvstored: {printable(self.format_message())}", file=file, err=file is None)


class NotHeld(Failure):
    """The store has no such entry."""

    exit_code = NOT_HELD


class BadUsage(Failure):
    """An option, a configuration or a file cannot be used."""

    exit_code = USAGE


class Unreachable(Failure):
    """No daemon answers."""

    exit_code = UNREACHABLE


class Refused(Failure):
    """The daemon refused."""

    exit_code = REFUSED


@contextmanager
def errors_as_exit_codes(address: str) -> Iterator[None]:
    """Turn errors of the daemon or the configuration into a `Failure`. Other exceptions pass: they are defects."""
    try:
        yield
    except ConfigError as error:
        raise BadUsage(str(error)) from None
    except TierUnavailable as error:
        # gRPC's message about a missing socket has three lines and no more information.
        why = "" if "failed to connect" in str(error) else f" ({error})"
        raise Unreachable(
            f"no daemon answers at {address}; start one with `kvstored serve` or set KVSTORED_ADDRESS{why}"
        ) from None
    except KvstoreError as error:
        raise Refused(f"refused: {error}") from None
    except OSError as error:
        raise BadUsage(f"{error.filename or 'file'}: {error.strerror or error}") from None
