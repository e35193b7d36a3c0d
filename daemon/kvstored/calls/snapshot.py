"""A snapshot under way: a copy of the store's disk, and of the secret that tenants' keys follow from.

    DIR/cold            as a daemon leaves it at its end; there only once it is whole
    DIR/tenants.secret  without it every tenant would start empty

So DIR is a data directory for a daemon. Interrupted, it leaves neither; killed, DIR/cold.partial, which no daemon takes
for its own. Thread rule: any thread, one step at a time; `end` waits for the step that is being taken.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TypeVar

from kvstore.disk.copying import check_target
from kvstore.errors import ConfigError
from kvstore.hit import Copied
from kvstore.printable import printable

logger = logging.getLogger(__name__)

SECRET, COLD = "tenants.secret", "cold"

T = TypeVar("T")


def last_within(steps: Iterator[T], seconds: float) -> T | None:
    """Go on for so long; where that led. None: there was no step left."""
    until = monotonic() + seconds
    last: T | None = None
    for step in steps:
        last = step
        if monotonic() >= until:
            break
    return last


class Snapshot:
    """One snapshot. copy: `Store.snapshot`. data_dir: the daemon's. target: where to, as the caller wrote it."""

    def __init__(self, copy: Callable[[Path], Iterator[Copied]], data_dir: Path, target: str) -> None:
        self._copy = copy
        self._data_dir = data_dir
        self._target = Path(target)
        self._steps = self._all()
        self._lock = threading.Lock()

    def step(self, seconds: float) -> Copied | None:
        """Go on for so long; how far it is. None: it is done. Raises ConfigError."""
        with self._lock:
            return last_within(self._steps, seconds)

    def end(self) -> None:
        """Stop. Unless it was done, nothing of it is left."""
        with self._lock:
            self._steps.close()

    def _all(self) -> Generator[Copied]:
        check_target(self._target)
        made = not self._target.exists()
        secret = self._target / SECRET
        whole = False
        try:
            self._target.mkdir(mode=0o700, exist_ok=True)
            self._target.chmod(0o700)
            self._take_secret(secret)
            told = Copied(0, 0, 0, 0, 0)
            for told in self._copy(self._target / COLD):
                yield told
            whole = True
            where = printable(self._target)
            logger.info("snapshot made directory=%s entries=%d lost=%d", where, told.copied, told.lost)
        except OSError as error:
            raise ConfigError(f"{error.filename or self._target}: {error.strerror}; the snapshot is not made") from None
        finally:
            if not whole:
                secret.unlink(missing_ok=True)
                if made:
                    with suppress(OSError):
                        self._target.rmdir()

    def _take_secret(self, to: Path) -> None:
        held = (self._data_dir / SECRET).read_bytes()
        fd = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(held)
            file.flush()
            os.fsync(file.fileno())
