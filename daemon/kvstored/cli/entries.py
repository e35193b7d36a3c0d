"""Verbs for single entries: get, put, ttl, touch, delete, pin, unpin."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.arrays import describe
from kvstore.errors import InvalidEntry
from kvstore.hit import Fidelity
from kvstore.printable import printable, size
from kvstored.cli.exits import BadUsage, NotHeld, Refused
from kvstored.cli.keytext import KEY, key_text, show_key
from kvstored.cli.progress import waiting
from kvstored.cli.remote import print_json, remote, report_count
from kvstored.cli.tensorfile import read_tensors, write_tensors
from kvstored.cli.text import accuracy, duration, receipt_dict

if TYPE_CHECKING:
    from kvstored_client import Client

_BAR_FROM_NBYTES = 64 << 20
"""Smaller files are written too fast for a progress bar."""


@click.command()
@click.argument("key", type=KEY)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="The safetensors file to write.")  # fmt: skip
@remote
def get(client: "Client", as_json: bool, key: bytes, output: Path) -> None:  # noqa: FBT001 - `remote` calls it
    """Write an entry's tensors to a safetensors file. Exit code 1: not held."""
    with waiting("getting", 0):
        hit = client.get(key)
    if hit is None:
        raise NotHeld(f"not held: {show_key(key)}")
    facts = {
        "kvstored.key": key.hex(),
        "kvstored.encoding": printable(hit.encoding),
        "kvstored.lossy": str(hit.lossy).lower(),
    }
    nbytes = sum(x.nbytes for x in hit.tensors.values())
    with click.progressbar(length=nbytes, label="writing", file=sys.stderr,
                           hidden=nbytes < _BAR_FROM_NBYTES) as bar:  # fmt: skip
        write_tensors(output, hit.tensors, facts, bar.update)
    if as_json:
        print_json({
            "key": key_text(key), "output": str(output), "tier": hit.tier, "encoding": hit.encoding,
            "lossy": hit.lossy, "age_s": hit.age_s, "nbytes": nbytes, "tensors": _tensors(hit.tensors),
            "receipt": receipt_dict(hit.receipt),
        })  # fmt: skip
        return
    lossy = accuracy(hit.relative_error)
    click.echo(printable(f"{output}: {len(hit.tensors)} tensors, {size(nbytes)}, from {hit.tier} "
                         f"({hit.encoding}, {lossy}), {duration(hit.age_s)} old"))  # fmt: skip


@click.command()
@click.argument("key", type=KEY)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ttl-s", type=click.FloatRange(min=0, min_open=True), help="Seconds to live.  [default: the daemon's]")
@click.option("--pin", is_flag=True, help="Keep it from eviction and expiry.")
@click.option("--exact", is_flag=True, help="Bit for bit in every tier, never NF4.")
@remote
def put(client: "Client", as_json: bool, key: bytes, file: Path, ttl_s: float | None, pin: bool, exact: bool) -> None:  # noqa: FBT001
    """Put the tensors of a safetensors file under a key; they replace an entry of that key."""
    try:
        tensors = read_tensors(file)
    except InvalidEntry as error:  # before the daemon is called: the mistake is in the file
        raise BadUsage(str(error)) from None
    nbytes = sum(x.nbytes for x in tensors.values())
    fidelity: Fidelity = "exact" if exact else "auto"
    with waiting("putting", nbytes):
        stored = client.put(key, tensors, ttl_s=ttl_s, pin=pin, fidelity=fidelity)
    if not stored:
        raise Refused(f"the daemon did not store {show_key(key)}: `kvstored explain {show_key(key)}` may know why")
    if as_json:
        print_json({"key": key_text(key), "stored": True, "nbytes": nbytes, "tensors": _tensors(tensors)})
    else:
        click.echo(f"{show_key(key)}: {len(tensors)} tensors, {size(nbytes)}")


def _tensors(tensors: Any) -> dict[str, dict[str, object]]:
    specs = {name: describe(name, x) for name, x in tensors.items()}
    return {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in specs.items()}


@click.command()
@click.argument("key", type=KEY)
@remote
def ttl(client: "Client", as_json: bool, key: bytes) -> None:  # noqa: FBT001 - `remote` calls it
    """Seconds until an entry expires; "pinned" if it does not. Does not count as use. Exit code 1: not held."""
    info = client.inspect(key)
    if info is None:
        raise NotHeld(f"not held: {show_key(key)}")
    if as_json:
        print_json({"key": key_text(key), "ttl_left_s": info.ttl_left_s, "pinned": info.pinned})
    else:
        click.echo("pinned" if info.ttl_left_s is None else f"{info.ttl_left_s:.0f}")


@click.command()
@click.argument("keys", type=KEY, nargs=-1, required=True, metavar="KEY...")
@click.option("--ttl-s", type=click.FloatRange(min=0, min_open=True),
              help="Seconds to live from now.  [default: each entry's own]")  # fmt: skip
@remote
def touch(client: "Client", as_json: bool, keys: tuple[bytes, ...], ttl_s: float | None) -> None:  # noqa: FBT001
    """Count as use of keys and move their deadlines, as a get does. Exit code 1: not all of them are held.

    A deadline that does not slide, and a pinned entry, stay as they are.
    """
    unique = tuple(dict.fromkeys(keys))
    report_count("touch", "touched", client.touch(unique, ttl_s=ttl_s), len(unique), as_json=as_json)


def _over_keys(verb: str, done: str, summary: str) -> click.Command:
    """A command that calls one verb of the client with all keys and prints the count."""

    @click.command(name=verb, help=f"{summary} Exit code 1: not all of them were.")
    @click.argument("keys", type=KEY, nargs=-1, required=True, metavar="KEY...")
    @remote
    def command(client: "Client", as_json: bool, keys: tuple[bytes, ...]) -> None:  # noqa: FBT001
        unique = tuple(dict.fromkeys(keys))
        report_count(verb, done, getattr(client, verb)(*unique), len(unique), as_json=as_json)

    return command


COMMANDS = (
    get,
    put,
    ttl,
    touch,
    _over_keys("delete", "deleted", "Forget keys in all tiers, for good."),
    _over_keys("pin", "pinned", "Keep keys from eviction and expiry."),
    _over_keys("unpin", "unpinned", "Let keys be evicted and expire again."),
)
