"""Exit codes, and the errors that cause them. docs/operations.md lists them for the operator; they are frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from kvstore.errors import ConfigError, InvalidEntry, KvstoreError, TierUnavailable
from kvstore.printable import printable

OK = 0
NOT_HELD = 1
USAGE = 2
"""Bad usage, configuration or file: click's own code for bad usage."""
UNREACHABLE = 3
REFUSED = 4
BROKEN_PIPE = 141
"""Whoever read the output has gone, as in `kvstored ls | head`: what a shell shows for a program ended by SIGPIPE.

The signal itself stays ignored: gRPC and the lease socket write to peers that may be gone, too.
"""
_ENGINE = frozenset({"torch", "lmdb", "zstandard", "safetensors", "grpc_health", "prometheus_client"})
"""What `pip install 'kvstored[daemon]'` adds."""


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
    """Turn errors of the daemon, of the configuration or of a file into a `Failure`. Others pass: they are defects.

    address: the daemon that the command speaks to; empty for a command that speaks to none, where what is invalid was
    given by the user and was not refused by a daemon.
    """
    try:
        yield
    except ConfigError as error:
        raise BadUsage(str(error)) from None
    except InvalidEntry as error:
        raise (Refused(f"refused: {error}") if address else BadUsage(str(error))) from None
    except TierUnavailable as error:
        raise Unreachable(_unreachable(address, str(error))) from None
    except KvstoreError as error:
        raise Refused(f"refused: {error}") from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _ENGINE:
            raise
        raise BadUsage(
            f"this needs the engine, and {error.name} is not installed: pip install 'kvstored[daemon]'"
        ) from None
    except BrokenPipeError:
        raise  # of the output: `everywhere.Kvstored` ends quietly
    except OSError as error:
        raise BadUsage(f"{error.filename or 'file'}: {error.strerror or error}") from None


_TLS_SIGNS = {
    "Hostname Verification": "its certificate has another name: use that in the address, or name it with --tls-name",
    "CERTIFICATE_VERIFY_FAILED": "its certificate cannot be verified: name the authority with --tls-ca",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS: write tcp: in place of tls:",
    "security handshaker": "--tls-ca, --tls-certificate or --tls-key is no usable PEM file",
    "Tls handshake failed": "the handshake failed",
}
"""By a piece of gRPC's message, the surest first."""


def _unreachable(address: str, why: str) -> str:
    if not address:
        return why  # another process has the directory, or a tier does not answer
    tls = next((text for sign, text in _TLS_SIGNS.items() if sign in why), None)
    if "Socket closed" in why and address.startswith("tls:"):
        tls = "it was closed; the daemon may ask for a certificate of yours: --tls-certificate and --tls-key"
    elif "Socket closed" in why and not address.startswith(("unix:", "/")):
        tls = "the connection was closed; if the daemon speaks TLS there, write tls: in place of tcp:"
    if tls is not None:
        return f"no {'TLS ' * address.startswith('tls:')}connection to {address}: {tls} ({why})"
    # gRPC's message about a missing socket has three lines and no more information.
    more = "" if "failed to connect" in why and address.startswith("unix:") else f" ({why})"
    return f"no daemon answers at {address}; start one with `kvstored serve` or set KVSTORED_ADDRESS{more}"
