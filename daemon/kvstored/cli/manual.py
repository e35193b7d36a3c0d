"""The command line's pages, made from the commands: docs/cli.md, and docs/kvstored.1 for man.

`python -m kvstored.cli.manual > docs/cli.md`, `python -m kvstored.cli.manual man > docs/kvstored.1`. Tests compare.
"""

import sys
from collections.abc import Iterator

import click

from kvstored.cli import cli

_HEAD = """# The command line

Made by `make cli-docs` from the commands; change their words, not this file. Exit codes: docs/operations.md.
"""
_FILES = (
    ("/etc/kvstored/kvstored.toml", "The service's settings. All of them with their defaults: kvstored config show."),
    ("/run/kvstored/kvstored.sock", "Where the service listens."),
    ("/var/lib/kvstored", "The service's data directory."),
)
_VARIABLES = (
    ("KVSTORED_ADDRESS", "The daemon's address: unix:PATH, tcp:HOST:PORT or tls:HOST:PORT."),
    ("KVSTORED_TOKEN_FILE", "A file with the caller's token."),
    ("KVSTORED_TLS_CA, KVSTORED_TLS_CERTIFICATE, KVSTORED_TLS_KEY", "PEM files for tls: addresses."),
    ("KVSTORED_SERVER__..., KVSTORED_STORE__...", "Any setting of the daemon; two underscores stand for a dot."),
)


def manual() -> str:
    """docs/cli.md."""
    return "\n".join([_HEAD, *map(_section, _contexts(cli, "kvstored", None))])


def man_page() -> str:
    """docs/kvstored.1: the same commands in man's language."""
    first, *others = _contexts(cli, "kvstored", None)
    lines = ['.TH KVSTORED 1 "" kvstored "User Commands"', ".SH NAME", "kvstored \\- a cache of KV tensors"]
    lines += [".SH SYNOPSIS", ".B kvstored", "COMMAND [OPTIONS] [ARGUMENTS]", ".SH DESCRIPTION"]
    lines += _paragraphs(first.command.help or "")
    lines += _paragraphs(first.command.epilog or "")
    lines.append(".SH COMMANDS")
    for context in others:
        lines += _command(context)
    for heading, pairs in (("ENVIRONMENT", _VARIABLES), ("FILES", _FILES)):
        lines.append(f".SH {heading}")
        for name, text in pairs:
            lines += [".TP", f".B {_roff(name)}", _roff(text)]
    return "\n".join(lines) + "\n"


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


def _command(context: click.Context) -> list[str]:
    usage = " ".join(context.command.collect_usage_pieces(context))
    lines = [f".SS {_roff(f'{context.command_path} {usage}')}", *_paragraphs(context.command.help or "")]
    for option in context.command.get_params(context):
        record = option.get_help_record(context)
        if option.param_type_name == "option" and record is not None and "--help" not in option.opts:
            lines += [".TP", f".B {_roff(record[0])}", _roff(record[1])]
    return lines


def _paragraphs(text: str) -> list[str]:
    blocks = [block.replace("\b", "").split() for block in text.split("\n\n")]
    return [line for words in blocks if words for line in (".PP", _roff(" ".join(words)))]


def _roff(text: str) -> str:
    """Text that roff prints as it stands: backslashes, hyphens, and a dot or a quote at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    sys.stdout.write(man_page() if sys.argv[1:] == ["man"] else manual())
