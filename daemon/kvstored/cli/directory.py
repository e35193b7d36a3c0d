"""Verbs for a cold directory that no daemon has open: fsck, compact, export, import. They need the engine.

Started by root they run as the directory's owner (`host.become`), after the engine is imported: the owner need not be
able to read where it is installed.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from kvstore.ownership import user_name
from kvstore.printable import printable, size
from kvstored.cli.exits import REFUSED, BadUsage, errors_as_exit_codes
from kvstored.cli.remote import print_json
from kvstored.host.become import become_owner_of

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


def _own(data_dir: Path) -> Path:
    """The cold tier's directory; from here on this process is its owner's."""
    found = _cold(data_dir)
    become_owner_of(found)
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
    """Check the index and every record; remove damaged records. Exit code 4: there was damage, or something unreadable.

    The daemon must not be running; `kvstored verify` asks a running one. What cannot be read (a file of another user, a
    failing disk, a missing key) is counted and stays. Root runs this as the directory's owner.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import fsck as check

        with _bar("checking") as progress:
            found = check(_own(data_dir), SystemClock(), progress)
    if as_json:
        print_json(asdict(found))
    else:
        index = "sound" if found.quarantined is None else f"set aside, {printable(found.quarantined)}"
        damage = f"{found.corrupt} damaged and removed, {found.unreadable} unreadable"
        click.echo(f"{found.entries} entries, {damage}; index {index}")
    if found.corrupt or found.unreadable or found.quarantined is not None:
        sys.exit(REFUSED)


@click.command()
@_DIRECTORY
@_JSON
def compact(data_dir: Path, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Give unneeded space back to the file system. It shrinks the index and removes what a crash left.

    Records give their space back when they leave, so this is rarely needed and never urgent. Root runs this as the
    directory's owner.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import compact as shrink

        before, after = shrink(_own(data_dir), SystemClock())
    if as_json:
        print_json({"before_nbytes": before, "after_nbytes": after})
        return
    click.echo(f"{size(before)} before, {size(after)} after")


@click.command()
@_DIRECTORY
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@_JSON
def export(data_dir: Path, target: Path, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Write each entry to TARGET as a safetensors file that any reader opens. Exit code 4: some could not be read.

    TARGET is made if it is not there, files are readable by their owner alone, and those of an earlier export are
    replaced. Root runs this as the directory's owner, who then owns a TARGET that was made.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import export as write

        cold = _cold(data_dir)
        fd = _target(target, cold)
        with _bar("exporting") as progress:
            found = write(cold, fd, SystemClock(), progress)
        os.close(fd)
    if as_json:
        print_json({"target": str(target), "entries": found.entries, "lost": found.lost})
    else:
        lost = f", {found.lost} could not be read" if found.lost else ""
        click.echo(f"{printable(target)}: {found.entries} entries{lost}")
    if found.lost:
        sys.exit(REFUSED)


def _target(target: Path, cold: Path) -> int:
    """A descriptor of an export's directory, opened before root's rights are given up."""
    from kvstore.tiers.offline import open_target

    made = not os.path.lexists(target)
    try:
        fd = open_target(target)
    except OSError as error:
        link = "; a link is not followed, name the directory itself" if target.is_symlink() else ""
        raise BadUsage(f"{target}: {error.strerror}{link}") from None
    become_owner_of(cold, *([fd] if made else []))
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=fd):
        raise BadUsage(f"{target} may not be written by {user_name(os.geteuid())}, who owns {cold}: name a new one")
    return fd


@click.command(name="import")
@_DIRECTORY
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--ttl-s", default=3600.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
              help="Seconds that the entries live after their last use.")  # fmt: skip
@_JSON
def import_(data_dir: Path, files: tuple[Path, ...], ttl_s: float, as_json: bool) -> None:  # noqa: FBT001 - a flag
    """Put exported FILES, or all that `export` or `snapshot` wrote to a directory. Exit code 4: some were refused.

    The others are put. A file is refused if kvstored did not export it, if it is damaged, if it does not decode, or if
    it is a link. Root runs this as the directory's owner, who has to be able to read them.
    """
    with errors_as_exit_codes(""):
        from kvstore.clock import SystemClock
        from kvstore.tiers.offline import cold_of, files_of, import_files, import_snapshot

        where = data_dir / "cold" if not (data_dir / "STATE").exists() else data_dir
        become_owner_of(where if where.is_dir() else data_dir)
        stores = {file: cold for file in files if file.is_dir() and (cold := cold_of(file)) is not None}
        found = files_of([file for file in files if file not in stores])
        with _bar("importing") as progress:
            refused = import_files(where, found, SystemClock(), ttl_s=ttl_s, progress=progress) if found else []
            entries = len(found) - len(refused)
            for file, source in stores.items():
                told = import_snapshot(where, source, SystemClock(), ttl_s=ttl_s, progress=progress)
                entries += told.entries
                refused += [f"{printable(file)}: {told.lost} entries could not be read"] if told.lost else []
    if as_json:
        print_json({"entries": entries, "refused": refused})
    else:
        click.echo("\n".join([*refused, f"{entries} entries"]))
    if refused:
        sys.exit(REFUSED)


COMMANDS = (fsck, compact, export, import_)
