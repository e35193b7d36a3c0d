"""`kvstored completion`: the script with which a shell completes verbs and options."""

import click
from click.shell_completion import get_completion_class

from kvstored.cli.exits import BadUsage


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    bash: kvstored completion bash > /etc/bash_completion.d/kvstored. zsh: into a directory of $fpath, as _kvstored.
    fish: into ~/.config/fish/completions/kvstored.fish.
    """
    found = get_completion_class(shell)
    if found is None:
        raise BadUsage(f"this click knows no completion for {shell}")
    try:
        # Not found(...).source(): for bash it runs bash to read its version, and a build host may have no bash.
        made = found(context.find_root().command, {}, "kvstored", "_KVSTORED_COMPLETE")
        click.echo(made.source_template % made.source_vars())
    except RuntimeError as error:
        raise BadUsage(str(error)) from None


COMMANDS = (completion,)
