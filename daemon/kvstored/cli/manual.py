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
    parts = [_HEAD]
    for path, command in _commands(cli, "kvstored"):
        parts.append(_section(path, command))
    return "\n".join(parts)


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], f"{path} {name}")


def _section(path: str, command: click.Command) -> str:
    # A fixed width: a page must not depend on the terminal it was made in.
    context = click.Context(command, info_name=path, terminal_width=100, max_content_width=100)
    text = command.get_help(context).strip()
    lines = [line.rstrip() for line in text.splitlines() if line.strip() != "\b"]
    return f"## {path}\n\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    sys.stdout.write(manual())
