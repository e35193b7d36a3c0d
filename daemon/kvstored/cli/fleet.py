"""What `kvstored simulate` says of a fleet: its options, a run for each number of hosts, and the plot against it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.config import parse_nbytes
from kvstore.errors import ConfigError
from kvstore.printable import size
from kvstore.simulation.trace import Request
from kvstored.cli.plot import Line, chart, stacked
from kvstored.cli.remote import print_json
from kvstored.cli.text import table

if TYPE_CHECKING:
    from kvstore.simulation.fleet import Fleet, FleetReport, FleetSimulation
    from kvstore.simulation.simulator import Report, Setup, Simulation

_ROUTINGS = ("random", "prefix", "conversation")
_PUBLISH = ("put", "evict", "reused")


@dataclass(frozen=True)
class Amount:
    """A size as it was written: bytes, "1000blocks" or "5%" of the trace's different blocks."""

    text: str

    def blocks(self, of: int) -> float | None:
        """Blocks, as written or as a share of `of`; None: bytes. Raises ConfigError."""
        for unit, each in (("blocks", 1.0), ("%", of / 100)):
            if self.text.endswith(unit):
                number = _number(self.text.removesuffix(unit).strip(), self.text)
                return number * each
        return None

    def nbytes(self, block_nbytes: int, of: int) -> int:
        """Bytes, where a block has so many. Raises ConfigError."""
        blocks = self.blocks(of)
        return parse_nbytes(self.text) if blocks is None else int(blocks) * block_nbytes


def _number(text: str, shown: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (isfinite(value) and value >= 0):
        raise ConfigError(f'not a size: {shown!r:.40}; write "64GiB", "1000blocks" or "5%" of the trace\'s blocks')
    return value


class AmountType(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    """Bytes, blocks or a share of the trace's blocks."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Amount:
        """The amount, or a usage error."""
        if isinstance(value, Amount):
            return value
        try:
            Amount(value).nbytes(1, 1)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return Amount(value)


class _SharedType(AmountType):
    """An `Amount`, or "all"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Amount:
        return Amount(value) if value == "all" else super().convert(value, param, ctx)


class _HostsType(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"numbers of hosts are such as 16, or 1,4,16, got {value!r:.40}", param, ctx)
        if not all(1 <= hosts <= _HOSTS_MAX for hosts in found):
            self.fail(f"a fleet has 1 to {_HOSTS_MAX} hosts, got {value!r:.40}", param, ctx)
        return tuple(sorted(set(found)))


_HOSTS_MAX = 4096


class _ChurnType(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "once":
            return "once"
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not (isfinite(seconds) and seconds > 0):
            self.fail(f'seconds over 0, or "once", got {value!r:.40}', param, ctx)
        return seconds


@dataclass(frozen=True)
class Asked:
    """The options of a fleet."""

    hosts: tuple[int, ...]
    routing: str
    cells: int
    shared: Amount | None
    publish: str
    publish_delay: float
    churn: float | str | None
    seed: int

    def fleet(self, setup: "Setup", hosts: int, requests: Sequence[Request], unique: int) -> "Fleet":
        """One fleet. Raises ConfigError."""
        from kvstore.simulation.fleet import Fleet, object_nbytes

        blocks = self._shared_blocks(object_nbytes(setup), unique)
        churn_s = requests[-1].at_s - requests[0].at_s if self.churn == "once" else float(self.churn or 0)
        return Fleet(
            setup, hosts, self.routing, self.cells, blocks, self.publish, self.publish_delay,  # type: ignore[arg-type]  # click has checked the words
            churn_s=churn_s, seed=self.seed,
        )  # fmt: skip

    def _shared_blocks(self, block_nbytes: int, unique: int) -> int | None:
        """Blocks that the shared store holds; None: all; 0: there is none."""
        if self.shared is None:
            return 0
        if self.shared.text == "all":
            return None
        asked = self.shared.blocks(unique)
        blocks = int(parse_nbytes(self.shared.text) / block_nbytes if asked is None else asked)
        if not blocks:
            raise ConfigError(f"--shared {self.shared.text} is less than a block of {block_nbytes} bytes")
        return blocks


def fleet_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a fleet; it gets them as `fleet`, None where --hosts is not given."""

    @click.option("--hosts", type=_HostsType(), help="A fleet of so many such hosts; 1,4,16: one run each.")
    @click.option("--routing", type=click.Choice(_ROUTINGS), help="Which host a request goes to.  [default: random]")
    @click.option("--cells", type=click.IntRange(1, _HOSTS_MAX), help="Groups of hosts with a shared store each.")
    @click.option(
        "--shared", type=_SharedType(), help='The shared store: bytes, "20%" of the blocks, "all". None: none.'
    )
    @click.option("--publish", type=click.Choice(_PUBLISH), help="When a block is published.  [default: put]")
    @click.option(
        "--publish-delay", type=click.FloatRange(0, 86_400), help="Seconds until others read it.  [default: 1]"
    )
    @click.option("--churn", type=_ChurnType(), is_flag=False, flag_value="once",
                  help="Replace each host by an empty one: within the trace, or every so many seconds.")  # fmt: skip
    @click.option("--seed", type=int, help="Of the random routing.  [default: 1]")
    @functools.wraps(function)
    def command(*arguments: Any, hosts: tuple[int, ...] | None, **others: Any) -> None:
        given = {name: others.pop(name) for name in _DEFAULTS}
        if hosts is None:
            told = next((name for name, value in given.items() if value is not None), None)
            if told is not None:
                raise click.UsageError(f"--{told.replace('_', '-')} is about a fleet: give --hosts, too")
            function(*arguments, fleet=None, **others)
            return
        if given["shared"] is None and (given["publish"] or given["publish_delay"] is not None):
            raise click.UsageError(
                "--publish and --publish-delay say how the shared store is filled: give --shared, too"
            )
        chosen = {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}
        function(*arguments, fleet=Asked(hosts, **chosen), **others)

    return command


_DEFAULTS: dict[str, Any] = {
    "routing": "random", "cells": 1, "shared": None, "publish": "put", "publish_delay": 1.0, "churn": None, "seed": 1,
}  # fmt: skip


def simulate_fleets(
    asked: Asked, requests: Sequence[Request], setup: "Setup", plot: Path | None, *, as_json: bool
) -> None:
    """Run each fleet, print its result, and draw the plot."""
    unique = different_blocks(requests)
    fleets = [asked.fleet(setup, hosts, requests, unique) for hosts in asked.hosts]  # all checked before any runs
    reports = []
    for fleet in fleets:
        report = _run(requests, fleet, f"{fleet.hosts} hosts", quiet=as_json)
        reports.append(report)
        if as_json:
            print_json(_row(fleet, report))
    if not as_json:
        head = ("HOSTS", "HITS", "FROM SHARED", "READ A REQUEST", "WRITTEN A REQUEST", "FUTILE LOOKUPS")
        click.echo("\n".join(table(head, [_shown(report) for report in reports], left=0)))
    if plot is not None:
        plot.write_text(_plot(fleets, reports, requests, quiet=as_json), encoding="utf-8")


def _run(requests: Sequence[Request], fleet: "Fleet", label: str, *, quiet: bool) -> "FleetReport":
    from kvstore.simulation.fleet import FleetSimulation

    simulation = FleetSimulation(fleet)
    feed(simulation, requests, label, quiet=quiet)
    return simulation.report()


def feed(simulation: "Simulation | FleetSimulation", requests: Sequence[Request], label: str, *, quiet: bool) -> None:
    """Give a simulation its requests, with a progress bar."""
    with click.progressbar(requests, label=label, hidden=quiet) as bar:
        for request in bar:
            simulation.request(request)


def result(report: "Report") -> dict[str, Any]:
    """What one store did, for JSON."""
    return {
        **asdict(report), "hit_ratio": report.hit_ratio, "writes_per_put": report.writes_per_put,
        "nbytes_written_a_day": report.nbytes_written_a_day,
    }  # fmt: skip


def different_blocks(requests: Sequence[Request]) -> int:
    """How many blocks a trace has, each counted once."""
    return len({block for request in requests for block in request.blocks})


def _row(fleet: "Fleet", report: "FleetReport") -> dict[str, Any]:
    rest = {name: value for name, value in asdict(report).items() if name != "total"}
    return {
        **result(report.total), **rest, "routing": fleet.routing, "cells": fleet.cells,
        "shared_blocks": fleet.shared_blocks, "publish": fleet.publish,
        "publish_delay_s": fleet.publish_delay_s, "churn_s": fleet.churn_s, "seed": fleet.seed,
    }  # fmt: skip


def _shown(report: "FleetReport") -> tuple[str, ...]:
    blocks = max(1, report.total.blocks)
    return (
        str(report.hosts), f"{report.hit_ratio:.2%}", f"{report.shared_hits / blocks:.2%}",
        size(report.shared_bytes_per_request), size(report.shared_written_bytes_per_request),
        f"{report.shared_futile / report.shared_lookups:.0%}" if report.shared_lookups else "-",
    )  # fmt: skip


def _plot(
    fleets: "Sequence[Fleet]", reports: "Sequence[FleetReport]", requests: Sequence[Request], *, quiet: bool
) -> str:
    """Hit ratio above, bytes a request below. Beside a shared store also the same hosts without one."""
    hits = [Line(fleets[0].routing if fleets[0].shared_blocks == 0 else f"{fleets[0].routing}, shared",
                 [(one.hosts, one.hit_ratio) for one in reports])]  # fmt: skip
    hits += _alone(fleets, requests, quiet=quiet)
    moved = [
        Line("read", [(one.hosts, one.shared_bytes_per_request) for one in reports]),
        Line("written", [(one.hosts, one.shared_written_bytes_per_request) for one in reports]),
    ]
    above = chart(hits, "hosts", "block hits")
    return stacked([above, chart(moved, "hosts", "shared store, bytes a request", y_text=size)])


def _alone(fleets: "Sequence[Fleet]", requests: Sequence[Request], *, quiet: bool) -> Iterator[Line]:
    if fleets[0].shared_blocks == 0:
        return
    alone = [replace(fleet, shared_blocks=0) for fleet in fleets]
    points = [(one.hosts, _run(requests, one, f"{one.hosts} alone", quiet=quiet).hit_ratio) for one in alone]
    yield Line(f"{fleets[0].routing}, alone", points)
