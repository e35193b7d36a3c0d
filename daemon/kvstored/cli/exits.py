"""Exit codes, and how errors become them. docs/operations.md lists them for the operator; they are frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from kvstore.errors import ConfigError, KvstoreError, TierUnavailable

OK = 0
NOT_HELD = 1
USAGE = 2
"""Bad usage, configuration or file: click's own code for bad usage."""
UNREACHABLE = 3
REFUSED = 4


class Failure(click.ClickException):
    """An end of the command: a sentence on standard error and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the sentence."""
        click.echo(f"kvstored: {self.format_message()}", file=file, err=file is None)


@contextmanager
def errors_as_exit_codes(address: str) -> Iterator[None]:
    """Turn the errors a daemon or the configuration causes into a `Failure`. Defects pass through."""
    try:
        yield
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    except TierUnavailable as error:
        raise Failure(
            f"no daemon answers at {address}; start one with `kvstored serve` or set KVSTORED_ADDRESS ({error})",
            UNREACHABLE,
        ) from None
    except KvstoreError as error:
        raise Failure(f"refused: {error}", REFUSED) from None
    except OSError as error:
        raise Failure(f"{error.filename or 'file'}: {error.strerror or error}", USAGE) from None
