"""`kvstored experiments`: ways to hold a KV cache, run through a store and a restart, compared by figures."""

import re
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstored.cli.exits import BadUsage
from kvstored.cli.text import table

if TYPE_CHECKING:
    from experiments import Found

_EXTRA = ("torch", "transformers", "lmdb", "zstandard", "safetensors", "grpc_health", "experiments")
PREFIX_MAX = 32_768
"""Tokens of prefix and continuation together: more would take hours on a CPU."""


class Tokens(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    """PREFIX+CONTINUATION."""

    name = "PREFIX+CONTINUATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Two counts from "512+128"."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})\+(\d{1,6})", value)
        prefix, rest = (int(match[1]), int(match[2])) if match else (0, 0)
        if prefix < 32 or rest < 2 or prefix + rest > PREFIX_MAX:
            self.fail(f"{value!r} is not 32 or more + 2 or more tokens, at most {PREFIX_MAX} in all", param, ctx)
        return prefix, rest


_OPTIONS = (
    click.option("--model", type=click.Path(path_type=Path), help="A directory of transformers'.  [default: SmolLM2]"),
    click.option("--text", type=click.Path(path_type=Path), help="Plain text.  [default: GPL-3, else Python's topics]"),
    click.option("--tokens", type=Tokens(), default="512+128", show_default=True, help="Of prefix and continuation."),
    click.option("--no-times", "times", is_flag=True, flag_value=False, default=True, help="Leave out what is timed."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a row."),
    click.option("--markdown", is_flag=True, help="The table in Markdown."),
    click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="KL over bytes a token, as an SVG."),
    click.option("--bytes-per-token", type=click.FloatRange(min=0), help="Advise within this budget."),
    click.option("--kl", type=click.FloatRange(min=0), help="Advise within this much KL, nats."),
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a run, for the verb and for `python -m experiments`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.pass_context
def experiments(context: click.Context) -> None:
    """Compare strategies for holding a KV cache, by figures. Without a command: the list of them."""
    if context.invoked_subcommand is None:
        _check_the_extra()
        _list()


@experiments.command("run")
@click.argument("what", nargs=-1, metavar="[NAME|CATEGORY|all]...")
@options
def run(what: tuple[str, ...], **given: Any) -> None:
    """Put strategies through a daemon and a restart, and print what each costs and harms.

    Worker A puts every state, the daemon restarts, worker B restores them and continues the text. The baseline and "no
    context" always come first. Exit code 1: a row failed; the others are printed.
    """
    start(what, **given)


def start(what: tuple[str, ...], **given: Any) -> None:
    """The run, for both commands."""
    # Left at their defaults these signals would leave the daemon and a worker behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: sys.exit(128 + got))
    _check_the_extra()
    try:
        _run(what, **given)
    except KeyboardInterrupt:
        click.echo("kvstored: interrupted; its daemon and workers are gone", err=True)
        sys.exit(128 + signal.SIGINT)


def _check_the_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise BadUsage(
            f"experiments need the model's library and the engine, and {', '.join(missing)} cannot be imported: "
            "pip install 'kvstored[experiments]'"
        )


def _list() -> None:
    from experiments.catalogue import STRATEGIES

    rows = [(str(s.row), s.name, s.category, s.source, s.kept) for s in STRATEGIES]
    click.echo("\n".join(table(("ROW", "STRATEGY", "CATEGORY", "SOURCE", "KEPT"), rows, left=5)))


def _run(  # noqa: PLR0913 - one for each option
    what: tuple[str, ...], *, model: Path | None, text: Path | None, tokens: tuple[int, int], as_json: bool,
    markdown: bool, plot: Path | None, bytes_per_token: float | None, kl: float | None, times: bool,
) -> None:  # fmt: skip
    from experiments import ExperimentFailed, report
    from experiments.catalogue import chosen
    from experiments.run import Plan, checked_model, checked_text, lives
    from experiments.run import run as rows_of

    try:
        strategies = chosen(what)
        plan = Plan(checked_model(model), checked_text(text), *tokens, strategies, times)
        if plot is not None and not plot.parent.is_dir():
            raise ExperimentFailed(f"{plot.parent} is no directory to write {plot.name} to")
        turns = sum(map(len, lives(plan)))
        with click.progressbar(
            length=turns * sum(not hasattr(s, "recorded") for s in strategies),
            label="experiments",
            file=sys.stderr,
            item_show_func=lambda name: name or "",
        ) as bar:
            rows = list(rows_of(plan, lambda name: bar.update(1, name)))
    except ExperimentFailed as error:
        raise BadUsage(str(error)) from None
    _print(rows, as_json=as_json, markdown=markdown)
    told = report.advice(rows, nbytes=bytes_per_token, kl=kl)
    click.echo(told, err=as_json)
    if plot is not None:
        report.plot(rows, plot)
    for row in rows:
        if row.failed:
            click.echo(f"kvstored: {row.name} failed: {row.failed}", err=True)
    sys.exit(1 if any(row.failed for row in rows) else 0)


def _print(rows: "list[Found]", *, as_json: bool, markdown: bool) -> None:
    from experiments import report

    if as_json:
        click.echo("\n".join(map(report.json_line, rows)))
    elif markdown:
        click.echo("\n".join([report.markdown(rows), "", *(f"- {note}" for note in report.notes(rows)), ""]))
    else:
        lines = table(report.COLUMNS, report.cells(rows), left=2)
        click.echo("\n".join([*lines, "", *report.notes(rows), ""]))


COMMANDS = (experiments,)
