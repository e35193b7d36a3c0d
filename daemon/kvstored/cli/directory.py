"""Verbs for a cold directory that no daemon has open: fsck, compact, export, import. They need the engine."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from kvstore.printable import printable
from kvstored.cli.exits import REFUSED, BadUsage, errors_as_exit_codes
from kvstored.cli.remote import print_json
from kvstored.cli.text import size

_DIRECTORY = click.option(
    "--data-dir", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The daemon's data directory; the cold tier is in its folder cold.",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")


def _cold(data_dir: Path) -> Path:
    """The cold tier's directory: in the data directory, or the data directory itself."""
    inner = data_dir / "cold"
    found = next((path for path in (inner, data_dir) if (path / "STATE").exists()), None)
    if found is None:
        raise BadUsage(
            f"{data_dir} holds no cold tier: there is no STATE file in it or in {inner}; name the daemon's "
            "server.data_dir (`kvstored config show`)"
        )
    return found


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error that takes (done, of)."""
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield progress


@click.command()
@_DIRECTORY
@_JSON
def fsck(data_dir: Path, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Check the index and every record; remove damaged records. Exit code 4: there was damage.

    The daemon must not be running; `kvstored verify` asks a running one.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import fsck as check

        with _bar("checking") as progress:
            found = check(_cold(data_dir), SystemClock(), progress)
    if as_json:
        print_json(asdict(found))
    else:
        index = "sound" if found.quarantined is None else f"set aside, {printable(found.quarantined)}"
        click.echo(f"{found.entries} entries, {found.corrupt} damaged and removed; index {index}")
    if found.corrupt or found.quarantined is not None:
        sys.exit(REFUSED)


@click.command()
@_DIRECTORY
@_JSON
def compact(data_dir: Path, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Give unneeded space back to the file system. It shrinks the index and removes what a crash left.

    Records give their space back when they leave, so this is rarely needed and never urgent.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import compact as shrink

        before, after = shrink(_cold(data_dir), SystemClock())
    if as_json:
        print_json({"before_nbytes": before, "after_nbytes": after})
        return
    click.echo(f"{size(before)} before, {size(after)} after")


@click.command()
@_DIRECTORY
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@_JSON
def export(data_dir: Path, target: Path, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Write each entry to TARGET as a safetensors file that any reader opens."""
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import export as write

        with _bar("exporting") as progress:
            written = write(_cold(data_dir), target, SystemClock(), progress)
    if as_json:
        print_json({"target": str(target), "entries": written})
        return
    click.echo(f"{printable(target)}: {written} entries")


@click.command(name="import")
@_DIRECTORY
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ttl-s", default=3600.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
              help="Seconds that the entries live after their last use.")  # fmt: skip
@_JSON
def import_(data_dir: Path, files: tuple[Path, ...], ttl_s: float, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Put exported FILES into the directory. Exit code 4: a file was refused; a line says why, and the others are put.

    A file is refused if kvstored did not export it, if it is damaged, or if it does not decode.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import import_files

        where = data_dir / "cold" if not (data_dir / "STATE").exists() else data_dir
        with _bar("importing") as progress:
            refused = import_files(where, list(files), SystemClock(), ttl_s=ttl_s, progress=progress)
    if as_json:
        print_json({"entries": len(files) - len(refused), "refused": refused})
    else:
        click.echo("\n".join([*refused, f"{len(files) - len(refused)} entries"]))
    if refused:
        sys.exit(REFUSED)


COMMANDS = (fsck, compact, export, import_)
