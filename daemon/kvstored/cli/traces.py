"""Verbs about prefixes and traces: explain where keys are, replay a trace on a daemon, simulate a store's size."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from kvstore.config import ADMISSIONS, POLICIES, ColdConfig, StoreConfig
from kvstore.errors import ConfigError, InvalidEntry
from kvstore.extensions import imported
from kvstore.hit import Explanation
from kvstore.keys import CHUNK_TOKENS, CHUNK_TOKENS_MAX, chunk_keys
from kvstore.simulation.trace import Request, read_trace, replay
from kvstored.cli.exits import BadUsage
from kvstored.cli.fleet import (
    Amount,
    AmountType,
    Asked,
    different_blocks,
    feed,
    fleet_options,
    result,
    simulate_fleets,
)
from kvstored.cli.keytext import KEY, key_text, show_key
from kvstored.cli.plot import Line, chart
from kvstored.cli.prompt import read_identity, read_token_ids
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import duration, table
from kvstored.cli.views import info_dict

if TYPE_CHECKING:
    from kvstore.simulation.simulator import Report, Setup
    from kvstored_client import Client

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_RAM_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
"""The plot's points, as multiples of --ram."""


@click.command()
@click.argument("keys", type=KEY, nargs=-1)
@click.option("--tokens", type=_FILE, help="A file of token ids, JSON or between blanks: explain each chunk.")
@click.option("--identity", help="With --tokens: the namespace's identity, as JSON or a file of JSON.")
@click.option("--chunk-tokens", default=CHUNK_TOKENS, type=click.IntRange(1, CHUNK_TOKENS_MAX), show_default=True)
@click.option("--tenant", default="", help="The keys as this tenant names them.")
@remote
def explain(client: "Client", as_json: bool, keys: tuple[bytes, ...], tenant: str, **prompt: Any) -> None:  # noqa: FBT001
    """Where each key is held, or why it is gone: expired, evicted, corrupt, deleted, never put.

    KEYS, or the chunks of a prompt: --tokens FILE and the --identity that it was put under.
    """
    chunks = _chunks(keys, **prompt)
    found = [
        of
        for start in range(0, len(chunks), _EXPLAINED)
        for of in client.explain(*(key for key, _ in chunks[start : start + _EXPLAINED]), tenant=tenant)
    ]
    if as_json:
        for of, (_, tokens) in zip(found, chunks, strict=True):
            entry = None if of.entry is None else info_dict(of.entry)
            count, first = (None, None) if tokens is None else (len(tokens), tokens.start)
            print_json({"key": key_text(of.key), "tokens": count, "first_token": first, "state": of.state,
                        "tier": of.tier, "gone_s": of.gone_s, "hits": of.hits, "entry": entry,
                        "shared": of.shared})  # fmt: skip
        return
    rows = [_explained(of, tokens) for of, (_, tokens) in zip(found, chunks, strict=True)]
    head: tuple[str, ...] = (
        "TOKENS",
        "KEY",
        "STATE",
        "TIER",
        "ENCODING",
        "BITS",
        "KL",
        "ERROR",
        "AGE",
        "TTL",
        "PINNED BY",
        "HITS",
    )
    if any(of.shared for of in found):
        head, rows = (*head, "SHARED"), [(*row, of.shared) for row, of in zip(rows, found, strict=True)]
    click.echo("\n".join(table(head, rows, left=5)))


_EXPLAINED = 1000
"""Keys per call: the reply stays far below gRPC's 4 MiB."""


def _chunks(
    keys: tuple[bytes, ...], tokens: Path | None, identity: str | None, chunk_tokens: int
) -> list[tuple[bytes, range | None]]:
    """Keys to explain, each with its range of tokens; None for a key given by name."""
    if (tokens is None) == (not keys) or (tokens is None) != (identity is None):
        raise BadUsage("give KEYS, or --tokens FILE together with --identity")
    if tokens is None or identity is None:
        return [(key, None) for key in keys]
    try:  # before the daemon is called: the mistake is in the file
        ids = read_token_ids(tokens)
        of = chunk_keys(read_identity(identity).digest(), ids, chunk_tokens)
    except InvalidEntry as error:
        raise BadUsage(str(error)) from None
    starts = range(0, len(ids), chunk_tokens)
    return [(key, range(at, min(at + chunk_tokens, len(ids)))) for key, at in zip(of, starts, strict=True)]


def _explained(of: Explanation, tokens: range | None) -> tuple[str, ...]:
    info = of.entry
    key = show_key(of.key)
    left = "-" if info is None or info.ttl_left_s is None else duration(info.ttl_left_s)
    age = duration(info.age_s) if info is not None else f"{duration(of.gone_s)} ago" if of.tier else "-"
    who = "-"
    if info is not None and info.pinned:
        who = "/".join(part for part in (info.tenant, info.namespace) if part) or "yes"
    encoding = "-" if info is None else info.encoding
    error = "-" if info is None else f"{max(info.receipt.values(), default=0.0):.3g}"
    form = info.forms[0] if info is not None and info.forms else None
    bits = "-" if form is None else f"{form.bits:.2f}"
    kl = "-" if form is None or form.kl is None else f"{form.kl:.2g}"
    shown = "-" if tokens is None else f"{tokens.start}-{tokens.stop}"
    return (
        shown, key if len(key) <= _KEY_SHOWN else key[: _KEY_SHOWN - 2] + "..", of.state, of.tier or "-", encoding,
        bits, kl, error, age, left, who, str(of.hits),
    )  # fmt: skip


_KEY_SHOWN = 72
"""A chunk's key in hexadecimal has 68 characters."""


@click.command(name="replay")
@click.argument("trace", type=_FILE)
@click.option("--requests", type=click.IntRange(min=1), help="Only the first N requests of the trace.")
@click.option("--block-nbytes", default=32768, type=click.IntRange(min=4), help="Bytes of float32 a block.")
@click.option("--speed", default=0.0, type=click.FloatRange(min=0), help="Times the trace's speed; 0: no waiting.")
@click.option(
    "--embedded", metavar="WHERE", help='No daemon but a store in this process: a .toml, a directory or "memory".'
)
@remote
def replay_command(
    client: "Client",
    as_json: bool,  # noqa: FBT001
    trace: Path,
    requests: int | None,
    block_nbytes: int,
    speed: float,
    embedded: str | None,
) -> None:
    """Use a daemon as a serving engine with this TRACE (Mooncake JSONL, or .xz) would.

    With --embedded and without --speed the store uses the trace's clock, so that entries expire as in the trace.
    """
    asked = _read(trace, requests)
    value = {"kv": np.random.default_rng(0).standard_normal(max(1, block_nbytes // 4), dtype=np.float32)}
    began = time.monotonic()
    with ExitStack() as stack:
        cache, advance = (client, _no_clock) if embedded is None else stack.enter_context(_embedded(embedded, speed))

        def before(request: Request) -> None:
            advance(request.at_s)
            if speed:
                time.sleep(max(0.0, began + request.at_s / speed - time.monotonic()))

        done = None
        with click.progressbar(length=len(asked), label="replaying", hidden=as_json) as bar:
            for done in replay(cache, asked, lambda _: value, before=before):  # noqa: B007 - the last is the result
                bar.update(1)
    assert done is not None, "a trace has a request"
    result = {**asdict(done), "hit_ratio": done.hits / max(1, done.blocks), "seconds": time.monotonic() - began}
    if as_json:
        print_json(result)
    else:
        click.echo(f"{done.hits:,} of {done.blocks:,} blocks hit ({result['hit_ratio']:.2%}), {done.puts:,} put")


def _read(trace: Path, limit: int | None) -> list[Request]:
    """The requests of a trace. Raises BadUsage: no daemon refuses it."""
    try:
        found = read_trace(trace, limit)
    except InvalidEntry as error:
        raise BadUsage(str(error)) from None  # it names the line
    except (UnicodeDecodeError, EOFError, LZMAError) as error:
        raise BadUsage(f"{trace} is no trace of JSON lines: {error}") from None
    if not found:
        raise BadUsage(f"{trace} holds no request")
    return found


def _no_clock(_at_s: float) -> None:
    pass


@contextmanager
def _embedded(where: str, speed: float) -> Iterator[tuple[Any, Callable[[float], None]]]:
    """A store in this process, and a function that moves its clock to a time of the trace."""
    from kvstore.clock import ManualClock
    from kvstore.store import Store

    clock = None if speed else ManualClock()
    start_s = clock.now() if clock is not None else 0.0
    source = None if where == "memory" else where
    with Store.open(source, clock=clock, framework="numpy", background=clock is None) as store:

        def advance(at_s: float) -> None:
            if clock is not None:
                clock.advance(max(0.0, start_s + at_s - clock.now()))
                store.maintain()

        yield store, advance


@click.command(name="simulate")
@click.argument("trace", type=_FILE)
@click.option(
    "--ram",
    required=True,
    type=AmountType(),
    help='Memory for hot and warm together: "64GiB"; NF4 blocks: "1000blocks", or "1%" of the trace\'s.',
)
@click.option("--more", type=AmountType(), help="Also with so much more RAM: what it would bring.")
@click.option("--disk", default="0", type=AmountType(), help="The cold tier. 0: none.")
@click.option("--hot", default="0.1", help='Share of RAM for tensors as put, the rest NF4; "auto": learned.')
@click.option("--layout", default="llama3-8b", help="A model by name, or LAYERSxKV_HEADSxHEAD_DIM.")
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--policy", default="lru", help=f"{', '.join(POLICIES)}, one that a package offers, or module:Class.")
@click.option("--admission", default="all", type=click.Choice(ADMISSIONS), help="The rule for writing to disk.")
@click.option("--requests", type=click.IntRange(min=1), help="Only the first N requests of the trace.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write an SVG of hit ratio against RAM; of a fleet, against its hosts.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; of several fleets, one a line.")
@fleet_options
def simulate_command(
    trace: Path,
    plot: Path | None,
    as_json: bool,  # noqa: FBT001 - a flag
    requests: int | None,
    fleet: Asked | None,
    more: Amount | None,
    **how: Any,
) -> None:
    """What a store of this size would do with TRACE: the daemon's own policies and tiers, without tensors.

    With --hosts: what a fleet of such hosts would do, each by itself or, with --shared, over a store that they share.
    """
    from kvstore.simulation.simulator import optimum

    if ":" in how["policy"]:
        from kvstore.policies import register_policy

        register_policy(how["policy"], imported(how["policy"], "policy"))
    if plot is not None and not plot.parent.is_dir():  # before minutes of work
        raise BadUsage(f"{plot}: there is no directory {plot.parent}")
    asked = _read(trace, requests)
    setup = _setup(asked, **how)
    if fleet is not None:
        if more is not None:
            raise BadUsage("--more is about one host: leave out --hosts")
        simulate_fleets(fleet, asked, setup, plot, as_json=as_json)
        return
    report = _run(asked, setup, "simulating", quiet=as_json)
    best = optimum(asked, setup.ram_nbytes // setup.value_nbytes) / max(1, report.blocks)
    if plot is not None:
        plot.write_text(chart(_lines(asked, setup, quiet=as_json), "RAM, GiB", "block hits"), encoding="utf-8")
    larger = None if more is None else _run(asked, _enlarged(asked, setup, more), "with more", quiet=as_json)
    if as_json:
        told = {} if larger is None else {"more": result(larger)}
        print_json({**result(report), "optimum_as_put": best, **told})
        return
    _print(report, best)
    if larger is not None and more is not None:
        points = 100 * (larger.hit_ratio - report.hit_ratio)
        click.echo(f"{more.text} more RAM: {larger.hit_ratio:.2%} hit, {points:+.2f} points")


def _enlarged(asked: Sequence[Request], setup: "Setup", more: Amount) -> "Setup":
    from kvstore.simulation.simulator import block_nbytes

    unique = different_blocks(asked) if "%" in more.text else 0
    return replace(setup, ram_nbytes=setup.ram_nbytes + more.nbytes(block_nbytes(setup), unique))


def _setup(
    asked: Sequence[Request], *, ram: Amount, disk: Amount, hot: str, layout: str, dtype: str, policy: str,
    admission: str,
) -> "Setup":  # fmt: skip
    from kvstore.simulation.simulator import Setup, block_nbytes, layout_of

    split, share = ("auto", 0.1) if hot == "auto" else ("fixed", _share(hot))
    store = StoreConfig(policy=policy, split=split, cold=ColdConfig(admission=admission))
    setup = Setup(1, 0, share, layout_of(layout), dtype, store=store)
    unique = different_blocks(asked) if "%" in ram.text + disk.text else 0
    block = block_nbytes(setup)
    return replace(setup, ram_nbytes=ram.nbytes(block, unique), disk_nbytes=disk.nbytes(block, unique))


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f'--hot is a share from 0 to 1, or "auto", got {text!r:.40}') from None


def _run(asked: Sequence[Request], setup: "Setup", label: str, *, quiet: bool) -> "Report":
    from kvstore.simulation.simulator import Simulation

    simulation = Simulation(setup)
    feed(simulation, asked, label, quiet=quiet)
    return simulation.report()


def _print(report: "Report", best: float) -> None:
    share = {name: f"{hits / max(1, report.blocks):.2%}" for name, hits in report.by_tier.items()}
    rows = [
        ("blocks hit", f"{report.hits:,} of {report.blocks:,} ({report.hit_ratio:.2%})"),
        *((f"  in {name}", text) for name, text in share.items()),
        *((f"  as {name}", f"{hits / max(1, report.blocks):.2%}") for name, hits in sorted(report.by_encoding.items())),
        ("RAM as put, at the end", f"{report.hot_fraction:.1%}"),
        ("optimum of RAM as put", f"{best:.2%}"),
        ("encodings per put", f"{report.encodes / max(1, report.puts):.2f}"),
        ("disk writes per put", f"{report.writes_per_put:.3f}"),
        ("disk bytes a day", f"{report.nbytes_written_a_day / 1e12:.2f} TB"),
        ("evictions", f"{report.evictions:,}"),
    ]
    click.echo("\n".join(table(("WHAT", "VALUE"), rows, left=1)))


def _lines(asked: Sequence[Request], setup: "Setup", *, quiet: bool) -> Iterator[Line]:
    """Hit ratio against RAM: all as put in float32 and bfloat16, mixes with NF4, and the offline optimum."""
    from kvstore.simulation.simulator import optimum

    steps = [max(1, int(setup.ram_nbytes * step)) for step in _RAM_STEPS]
    blocks = max(1, sum(len(request.blocks) for request in asked))
    for dtype, hot, name in (
        ("float32", 1.0, "float32"), ("bfloat16", 1.0, "bfloat16"), ("float32", 0.5, "hot 50 : NF4 50"),
        ("float32", 0.1, "hot 10 : NF4 90"),
    ):  # fmt: skip
        fixed = replace(setup, disk_nbytes=0, dtype=dtype, hot_fraction=hot, store=replace(setup.store, split="fixed"))
        setups = [replace(fixed, ram_nbytes=ram) for ram in steps]
        points = [(one.ram_nbytes / 2**30, _run(asked, one, name, quiet=quiet).hit_ratio) for one in setups]
        yield Line(name, points)
    float32 = replace(setup, dtype="float32").value_nbytes
    yield Line("optimum, float32", [(ram / 2**30, optimum(asked, ram // float32) / blocks) for ram in steps])


COMMANDS = (explain, replay_command, simulate_command)
