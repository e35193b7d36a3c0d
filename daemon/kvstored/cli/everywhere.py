"""Options that hold for every verb: before the verb, as with redis-cli and etcdctl, or after it. And the one boundary
at which a mistake becomes exit code 2 and a sentence.

An option before the verb is the default of the same option after it. One that the verb does not have is refused.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import click

from kvstored.cli.exits import BROKEN_PIPE, BadUsage, errors_as_exit_codes

TIMEOUT_S = 5.0
CREDENTIALS = {
    "token_file": ("--token-file", "KVSTORED_TOKEN_FILE", "A file with the token to show."),
    "tls_ca": ("--tls-ca", "KVSTORED_TLS_CA", "PEM: who may sign the daemon's certificate."),
    "tls_certificate": ("--tls-certificate", "KVSTORED_TLS_CERTIFICATE", "PEM: this client's own certificate."),
    "tls_key": ("--tls-key", "KVSTORED_TLS_KEY", "PEM: the key of this client's certificate."),
    "tls_name": (
        "--tls-name",
        "KVSTORED_TLS_NAME",
        "The name in the daemon's certificate, if not the address's.",
    ),
}
"""Each stands for a variable of the environment, which the client reads (`stream.credentials`)."""

_ADDRESS = "unix:PATH, tcp:HOST:PORT or tls:HOST:PORT  [default: $KVSTORED_ADDRESS, else the runtime directory, else the service]"  # fmt: skip  # noqa: E501


def everywhere(function: Callable[..., None], *, group: bool = False) -> Callable[..., None]:
    """Give a command, or the group of all commands, the options of every verb."""
    for name, (option, variable, text) in reversed(CREDENTIALS.items()):
        # Shown once, at the group: five more lines in the help of each verb would hide the verb's own.
        function = click.option(option, name, metavar="FILE" if name != "tls_name" else "NAME", hidden=not group,
                                help=f"{text}  [default: ${variable}]")(function)  # fmt: skip
    function = click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")(function)
    function = click.option("--timeout-s", type=click.FloatRange(0.001, 86400), default=None if group else TIMEOUT_S,
                            show_default=not group, help="Seconds the daemon may be silent.")(function)  # fmt: skip
    return click.option("--address", metavar="ADDRESS", help=_ADDRESS)(function)


@contextmanager
def shown(given: Mapping[str, str | None]) -> Iterator[None]:
    """The environment with the credentials that options name, for the duration of a command."""
    changed = {CREDENTIALS[name][1]: value for name, value in given.items() if value is not None}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Kvstored(click.Group):
    """All verbs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. Mistakes become exit code 2; a reader of the output that has gone is no mistake."""
        try:
            try:
                with errors_as_exit_codes(""):
                    return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # here, and not while the interpreter ends, where it could only complain
        except BrokenPipeError:
            _forget_the_output()
            raise click.exceptions.Exit(BROKEN_PIPE) from None


def _forget_the_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes at its end, too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def before_the_verb(context: click.Context, given: dict[str, Any]) -> None:
    """Make what stands before the verb the default of what stands after it. Raises BadUsage."""
    chosen = {name: value for name, value in given.items() if value not in (None, False)}
    verb = context.invoked_subcommand
    command = context.command.get_command(context, verb) if verb and isinstance(context.command, click.Group) else None
    if command is None or not chosen:
        return
    known = _options_of(command)
    for name in chosen:
        if name not in known:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            raise BadUsage(f"`kvstored {verb}` has no option {option}")
    context.default_map = {str(verb): _defaults(command, chosen)}


def _options_of(command: click.Command) -> set[str]:
    found = {param.name for param in command.params if param.name}
    if isinstance(command, click.Group):
        found = found.union(*map(_options_of, command.commands.values()))
    return found


def _defaults(command: click.Command, chosen: dict[str, Any]) -> MutableMapping[str, Any]:
    inner = command.commands if isinstance(command, click.Group) else {}
    return {**chosen, **{name: _defaults(each, chosen) for name, each in inner.items()}}
