"""docs/cli.md, made from the commands themselves: `python -m kvstored.cli.manual > docs/cli.md`. A test compares."""

import sys
from collections.abc import Iterator

import click

from kvstored.cli import cli

_HEAD = """# The command line

Made by `make cli-docs` from the commands; change their words, not this file. Exit codes: docs/operations.md.
"""


def manual() -> str:
    """The page."""
    return "\n".join([_HEAD, *map(_section, _contexts(cli, "kvstored", None))])


def _contexts(command: click.Command, name: str, parent: click.Context | None) -> Iterator[click.Context]:
    # A fixed width: a page must not depend on the terminal it was made in.
    context = click.Context(command, parent, name, **{**command.context_settings, "terminal_width": 100})
    yield context
    if isinstance(command, click.Group):
        for each in sorted(command.commands):
            yield from _contexts(command.commands[each], each, context)


def _section(context: click.Context) -> str:
    path, text = context.command_path, context.command.get_help(context).strip()
    lines = [line.rstrip() for line in text.splitlines() if line.strip() != "\b"]
    return f"## {path}\n\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    sys.stdout.write(manual())
