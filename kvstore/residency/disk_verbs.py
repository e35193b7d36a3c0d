"""The verbs of a `Store` that deal with its disk as a whole. Any thread."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstore.disk.copying import check_target, copy
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import ConfigError
from kvstore.hit import Copied, Verified
from kvstore.keys import Key
from kvstore.metadata.slices import slices
from kvstore.residency.mover import Mover
from kvstore.residency.state import Residency
from kvstore.tiers.cold import Cold


class DiskVerbs:
    """Part of a store."""

    _r: Residency
    _mover: Mover

    def _check_open(self) -> None:
        raise NotImplementedError

    @without_torch_modes
    def drain(self) -> int:
        """Write to cold whatever is only in memory. Returns entries written."""
        return self._mover.drain()

    def verify(self) -> Iterator[Verified]:
        """Read and check every record on disk while serving; how far it is after each. Damaged ones are dropped.

        Does not count as use. Nothing to check, without a disk: one report of 0 records.
        """
        self._check_open()
        return iter([Verified(0, 0, 0, 0)]) if self._r.cold is None else self._r.cold.verify()

    def snapshot(self, path: str | Path) -> Iterator[Copied]:
        """Copy all entries to a directory that `Store.open` opens, while this store goes on; how far it is, in steps.

        path: absolute; not there yet, or empty. What is only in memory is written to cold first. The directory is there
        when the last step was taken, with mode 0700; if the iterator is closed before, or an error ends it, it is not.
        Each entry is as it was at one moment meanwhile, and one that is deleted meanwhile is not in it. Encrypted
        records stay so: the directory needs the same key files. Raises ConfigError for a path that cannot be used, a
        file system without room, or a store without a disk.
        """
        self._check_open()
        if not isinstance(self._r.cold, Cold):
            raise ConfigError("this store has no disk to copy: cold.path is not set")
        check_target(Path(path))
        return self._snapshot(self._r.cold, Path(path))

    def _snapshot(self, cold: Cold, path: Path) -> Iterator[Copied]:
        yield Copied(0, 0, 0, 0, 0)
        self.drain()
        cold.flush_meta()
        yield from copy(cold, _Above(self._r, self.drain), path)


class _Above:
    """Which keys the store holds, for a copy."""

    def __init__(self, residency: Residency, drain: Callable[[], int]) -> None:
        self._r = residency
        self.drain = drain

    def keys(self) -> Sequence[Key]:
        """All of them, as of now."""
        return self._r.keys_now()

    def held(self, keys: Sequence[Key]) -> set[Key]:
        """Of these keys those that are held now."""
        found: set[Key] = set()
        for some in slices(keys):
            with self._r.lock:
                found.update(key for key in some if key in self._r.index)
        return found
