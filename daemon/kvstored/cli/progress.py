"""A progress line on standard error during long work, if standard error is a terminal."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from kvstore.printable import size
from kvstored.cli.text import duration

_SHOW_AFTER_S = 0.5
"""Seconds before the line is shown: shorter work needs none."""
_FRAMES = "|/-\\"


@contextmanager
def waiting(what: str, nbytes: int) -> Iterator[None]:
    """Show `what`, its size and the time it has taken, while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_turn, args=(what, nbytes, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _turn(what: str, nbytes: int, done: threading.Event) -> None:
    start = time.monotonic()
    frame = 0
    while not done.wait(0.1 if frame else _SHOW_AFTER_S):
        of = f" {size(nbytes)}" if nbytes else ""
        click.echo(f"\r{_FRAMES[frame % 4]} {what}{of}, {duration(time.monotonic() - start)} ", nl=False, err=True)
        frame += 1
    if frame:
        click.echo("\r\033[K", nl=False, err=True)
