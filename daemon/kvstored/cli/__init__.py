"""The command line: one command per verb, each of them a `Client` call with its arguments parsed and its result
printed.

Client verbs run with the base install; only `serve` and the offline verbs need the engine, and import it when called.
Exit codes are in `exits`, the text form of keys in `keytext`, tables in `text`, safetensors files in `tensorfile`.
"""

from typing import Any

import click

from kvstored.cli import (
    completion,
    config,
    directory,
    doctor,
    entries,
    evict,
    experiments,
    install,
    learn,
    ping,
    serve,
    shared,
    token,
    top,
    traces,
    views,
)
from kvstored.cli.everywhere import Kvstored, before_the_verb, everywhere

_EPILOG = """\b
Keys: text is taken as UTF-8; hex:00ff... stands for any bytes.
Exit codes: 0 done; 1 not held; 2 bad usage, configuration or file; 3 no daemon answers;
4 the daemon refused; 70 a defect in kvstored."""


def _cli(context: click.Context, /, **given: Any) -> None:
    """A cache store for the KV caches of language models: run the daemon, inspect it, move entries.

    The options below may stand before the verb or after it.
    """
    before_the_verb(context, given)


cli = click.group(
    "cli",
    cls=Kvstored,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)(click.version_option(package_name="kvstored")(click.pass_context(everywhere(_cli, group=True))))


_MODULES = (
    ping,
    views,
    top,
    traces,
    entries,
    evict,
    config,
    doctor,
    directory,
    shared,
    token,
    install,
    completion,
    experiments,
    learn,
)

for _command in (serve.serve, *(command for module in _MODULES for command in module.COMMANDS)):
    cli.add_command(_command)
