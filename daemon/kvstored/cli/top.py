"""`kvstored top` and `kvstored stats --watch`: the numbers, refreshed."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from kvstore.errors import TierUnavailable
from kvstore.printable import printable, size
from kvstore.shared.breaker import OPEN
from kvstore.stats import Stats
from kvstored.cli.remote import print_json, remote
from kvstored.cli.text import duration, table

if TYPE_CHECKING:
    from kvstored_client import Client

_BAR = 24
_CLEAR = "\033[H\033[J"


@click.command()
@click.option("--interval-s", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Between two views.")
@click.option("--count", type=click.IntRange(min=1), help="The number of views.")
@remote
def top(client: "Client", as_json: bool, interval_s: float, count: int | None) -> None:  # noqa: FBT001
    """A live view: tiers, hit ratio, rates, bytes, the hottest namespaces, tenants, the slowest calls. Ctrl-C ends it.

    Rates are of the last interval. If standard output is not a terminal, each view is printed below the last one.
    """
    before: Stats | None = None
    looked_at = time.monotonic()

    def look() -> None:
        nonlocal before, looked_at
        now, at = client.stats(), time.monotonic()
        if as_json:
            span_s = at - looked_at
            found = {kind: [asdict(one) for one in accounts(kind, before, now, span_s)] for kind in KINDS}
            print_json({
                "schema": SCHEMA, "tiers": now.as_dict()["tiers"], "rates": rates(before, now, span_s), **found,
            })  # fmt: skip
        else:
            lines = screen(before, now, at - looked_at)
            height: int = shutil.get_terminal_size().lines - 1
            terminal = sys.stdout.isatty()
            click.echo((_CLEAR if terminal else "") + "\n".join(lines[:height] if terminal else lines))
        before, looked_at = now, at

    repeat(look, interval_s, count)


def repeat(look: Callable[[], None], interval_s: float, count: int | None) -> None:
    """Repeat `look` until Ctrl-C or `count`. Waits for a daemon that restarts meanwhile."""
    done = 0
    try:
        while True:
            try:
                look()
            except TierUnavailable as error:
                if count is not None:
                    raise
                click.echo(f"kvstored: no answer: {printable(error)}", err=True)
            done += 1
            if count is not None and done >= count:
                return
            time.sleep(interval_s)
    except KeyboardInterrupt:
        click.echo()


SCHEMA = 1
"""Of `stats --json` and `top --json`, which docs/operations.md describes."""
_COUNTED = (
    "gets", "hits", "puts", "hit_nbytes", "put_nbytes", "evictions", "expirations", "deletes", "lookup_keys",
    "lookup_hit_keys", "lookup_tokens", "lookup_hit_tokens", "prefill_saved_s",
)  # fmt: skip


def rates(before: Stats | None, now: Stats, span_s: float, counted: Sequence[str] = _COUNTED) -> dict[str, float]:
    """Rates per second by counter; since start if there is no view before, or the daemon has restarted since."""
    if before is None or before.values.get("uptime_s", 0) > now.values.get("uptime_s", 0):
        span_s = now.values.get("uptime_s", 0.0)
        old: dict[str, float] = {}
    else:
        old = dict(before.values)
    span_s = max(span_s, 1e-6)
    return {name: (now.values.get(name, 0.0) - old.get(name, 0.0)) / span_s for name in counted}


def screen(before: Stats | None, now: Stats, span_s: float) -> list[str]:
    """The view, line by line."""
    v = now.values
    rate = rates(before, now, span_s)
    lines = [
        f"kvstored  up {duration(v.get('uptime_s', 0))}  entries {v.get('entries', 0):,.0f}  "
        f"in flight {size(v.get('in_flight_nbytes', 0))}  refused {v.get('in_flight_refused', 0):,.0f}"
        + ("" if v.get("cold_healthy", 1) else "  DISK FAILING"),
        "",
    ]
    rows = [
        (
            name,
            bar(t.used_nbytes / t.capacity_nbytes if t.capacity_nbytes else 0.0),
            size(t.used_nbytes),
            size(t.capacity_nbytes),
            *(f"{n:,}" for n in (t.entries, t.hits, t.demotions, t.promotions, t.evictions)),
        )
        for name, t in now.tiers.items()
    ]
    lines += table(("TIER", "FULL", "USED", "OF", "ENTRIES", "HITS", "DEMOTED", "PROMOTED", "EVICTED"), rows, left=2)
    lines += ["", *_lookups(v, rate)]
    lines.append(
        f"per second: {rate['gets']:,.1f} gets, {rate['puts']:,.1f} puts, {size(rate['hit_nbytes'])} out, "
        f"{size(rate['put_nbytes'])} in, {rate['evictions']:,.1f} evicted, {rate['expirations']:,.1f} expired"
    )
    shared = shared_line(v)
    lines += [shared] if shared else []
    if "block_events_published" in v:
        sent, lost = v["block_events_published"], v["block_events_dropped"]
        lines.append(f"events for routers: {sent:,.0f} published, {lost:,.0f} dropped")
    missed = "lookup_misses_"
    causes = [(name.removeprefix(missed), n) for name, n in sorted(v.items()) if name.startswith(missed) and n]
    if causes:
        lines.append("lookups missed: " + ", ".join(f"{n:,.0f} {printable(cause)}" for cause, n in causes))
    for kind, head in KINDS.items():
        found = accounts(kind, before, now, span_s)[:_ROWS]
        rows = [(a.name, f"{a.hits_per_s:,.1f}", f"{a.hits:,}", f"{a.entries:,}", size(a.nbytes)) for a in found]
        if rows:
            lines += ["", *table((head, "HITS/S", "HITS", "ENTRIES", "BYTES"), rows)]
    return lines + _calls(v)


def _lookups(values: Mapping[str, float], rate: Mapping[str, float]) -> list[str]:
    """What the cache is worth: prefill saved, and the share found of what was looked up."""
    lines = [f"prefill saved {duration(values.get('prefill_saved_s', 0))}, {rate['prefill_saved_s']:,.2f} s a second"]
    for kind, name in (("tokens", "token_hit_ratio"), ("keys", "hit_ratio")):
        asked, total = rate[f"lookup_{kind}"], values.get(f"lookup_{kind}", 0)
        if total or kind == "keys":
            recent = f"{min(1.0, rate[f'lookup_hit_{kind}'] / asked):.1%}" if asked else "-"
            lines.append(
                f"hit ratio of {kind} {recent} now, {values.get(name, 0):.1%} since start; "
                f"{asked:,.1f} looked up a second, {total:,.0f} since start"
            )
    return lines


def shared_line(values: Mapping[str, float]) -> str:
    """What the shared store did, in a line; empty where there is none."""
    if "shared_lookups" not in values:
        return ""
    v = {name.removeprefix("shared_"): value for name, value in values.items() if name.startswith("shared_")}
    state = f"{v.get('nodes_up', 0):,.0f} of {v.get('nodes', 0):,.0f} nodes up"
    reasons = sorted((name.removeprefix("dropped_"), n) for name, n in v.items() if name.startswith("dropped_") and n)
    dropped = ", ".join(f"{n:,.0f} {printable(reason)}" for reason, n in reasons)
    return (
        f"shared store: {v.get('hits', 0):,.0f} chunks, {size(v.get('hit_nbytes', 0))} from it, "
        f"{v.get('published', 0):,.0f} published, {size(v.get('queue_nbytes', 0))} waiting, "
        f"{duration(v.get('lag_s', 0))} from put to publication; {state}"
        + (f"; not published: {dropped}" if dropped else "")
        + ("; BREAKER OPEN" if v.get("breaker", 0) >= OPEN else "")
    )


KINDS = {"namespace": "HOTTEST NAMESPACES", "tenant": "TENANTS"}
_ROWS = 6


@dataclass(frozen=True)
class Account:
    """The bytes and entries of a namespace or a tenant now, its hits since start, and its recent hits per second."""

    name: str
    hits_per_s: float
    hits: int
    entries: int
    nbytes: int


def accounts(kind: str, before: Stats | None, now: Stats, span_s: float) -> list[Account]:
    """All namespaces or tenants that the daemon reports, those with the most recent hits first."""
    v = now.values
    names = [name.removeprefix(f"{kind}_hits_") for name in v if name.startswith(f"{kind}_hits_")]
    per_s = rates(before, now, span_s, tuple(f"{kind}_hits_{name}" for name in names))
    found = [
        Account(
            name, per_s[f"{kind}_hits_{name}"], int(v[f"{kind}_hits_{name}"]),
            int(v.get(f"{kind}_entries_{name}", 0)), int(v.get(f"{kind}_nbytes_{name}", 0)),
        )
        for name in names
    ]  # fmt: skip
    return sorted(found, key=lambda one: (-one.hits_per_s, -one.hits, one.name))


def _calls(values: Mapping[str, float]) -> list[str]:
    means = {name.removeprefix("call_mean_s_"): n for name, n in values.items() if name.startswith("call_mean_s_")}
    if not means:
        return []
    slowest = sorted(means.items(), key=lambda item: -item[1])[:6]
    late = [values.get(f"call_p99_s_{name}") for name, _ in slowest]
    rows = [
        (name, duration_ms(mean), "-" if p99 is None else duration_ms(p99))
        for (name, mean), p99 in zip(slowest, late, strict=True)
    ]
    return ["", *table(("SLOWEST CALLS", "MEAN", "99 % WITHIN"), rows)]


def duration_ms(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else duration(seconds)


def bar(share: float) -> str:
    """[#####...] 42%."""
    full = round(_BAR * min(max(share, 0.0), 1.0))
    return f"[{'#' * full}{'.' * (_BAR - full)}] {share:.0%}"


COMMANDS = (top,)
