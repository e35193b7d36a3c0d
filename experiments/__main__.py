"""`python -m experiments --experiments all`: the same as `kvstored experiments run all`."""

from typing import Any

import click

from kvstored.cli.experiments import options, start


@click.command()
@click.option("--experiments", "what", multiple=True, default=("all",), metavar="NAME|CATEGORY|all", help="Which.")
@options
def main(what: tuple[str, ...], **given: Any) -> None:
    """Put strategies through a daemon and a restart, and print what each costs and harms."""
    start(what, **given)


if __name__ == "__main__":
    main()
