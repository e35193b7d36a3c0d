"""Opening a cold directory: flock, DROP, STATE, verify, quarantine, in this order.

    LOCK          flocked by the one process that uses the directory
    STATE         JSON: format, clean (closed in order), boot_id, loading (its rows were being read)
    DROP          made by an operator: start empty, once
    index/        LMDB: rows
    segments/     records
    quarantine/   the newest few indexes that failed their check, for a later analysis

What is read before a start may be damaged, and a damaged page can end a process. So a child process reads it first. Of
a directory that was not closed in order another child checks each byte, which takes as long as reading the rows here:
both go on at once, and nothing is written before the check has ended well. Should the rows end this process after
all, STATE says `loading`, and the next start waits for the check before it reads them.
Raises ConfigError for a directory that is in use, has a newer format, belongs to another user, or has a symbolic link
where one of these names should be. Damage is no error: the store starts empty. What could not be read is not damaged:
an errno of the system ends the opening and deletes nothing.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kvstore.disk import verify_child
from kvstore.errors import ConfigError
from kvstore.ownership import check_directory, open_own, user_name

log = logging.getLogger(__name__)

FORMAT, READABLE = 2, (1, 2)
"""2: records under 64 KiB share blocks. A version that knows only 1 would punch their neighbours, so it refuses."""
VERIFY_TIMEOUT_S, VERIFY_NBYTES_PER_S = 60.0, 4 << 20
"""A check may take so long, and in addition a second for so many bytes of the index: a million rows are 320 MB."""
QUARANTINES_MAX = 3
_FOLDERS = ("index", "index.new", "segments", "quarantine")
_FILES = ("index/data.mdb", "index/lock.mdb")
_KILLED = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})
"""How a check ends that somebody else ended. Damage ends it otherwise: SIGBUS, SIGSEGV, SIGABRT."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LMDB_META = struct.Struct("<16xIIQQI")
_LMDB_MAGIC = 0xBEEFC0DE


class IndexDamaged(Exception):
    """A check that went on while the rows were read found damage: nothing that was read counts."""


UNFINISHED = "unfinished"
"""The power was cut while an index was being made: it is empty, and no record was ever reported as stored."""


@dataclass(slots=True)
class Directory:
    """A cold directory held by this process. quarantined: why opening emptied it, None if it did not.

    clean: it was closed in order, or is new. checking: the check of each byte of the index, while it goes on.
    """

    path: Path
    lock_fd: int
    quarantined: str | None = None
    clean: bool = True
    checking: "Check | None" = None

    @property
    def index(self) -> Path:
        """Where LMDB is."""
        return self.path / "index"

    @property
    def segments(self) -> Path:
        """Where the records are."""
        return self.path / "segments"

    def finish_check(self) -> None:
        """Wait for the check that goes on, if one does. Raises IndexDamaged, ConfigError, OSError."""
        if self.checking is None:
            return
        problem, self.checking = self.checking.problem(), None
        if problem is not None:
            raise IndexDamaged(problem)
        self.write_state(clean=False)

    def write_state(self, *, clean: bool) -> None:
        """Write durably whether the directory was closed in order. Raises OSError."""
        loading = self.checking is not None
        state = {"format": FORMAT, "clean": clean, "boot_id": _boot_id(), "loading": loading}
        temporary = self.path / "STATE.new"
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / "STATE")

    def release(self) -> None:
        """Release the lock, so that another process may use the directory."""
        if self.checking is not None:
            self.checking.end()
        os.close(self.lock_fd)


def take(path: Path, *, verify_timeout_s: float = VERIFY_TIMEOUT_S, meanwhile: bool = False) -> Directory:
    """Lock and check a directory; create it if it does not exist. Raises ConfigError.

    meanwhile: return while each byte is still being checked. Then write nothing before `finish_check` has returned.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_directory(path, "cold.path", root_may_own=False)
        _check_names(path)
        directory = Directory(path, _lock(path))
    except OSError as error:
        raise ConfigError(_refused(path, error)) from None
    try:
        _check(directory, verify_timeout_s, meanwhile=meanwhile)
        directory.segments.mkdir(mode=0o700, exist_ok=True)
        directory.write_state(clean=False)
    except BaseException as error:
        directory.release()
        if isinstance(error, OSError):
            raise ConfigError(_refused(path, error)) from None
        raise
    return directory


def _refused(path: Path, error: OSError) -> str:
    where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
    return f"cold.path {path}: {error.strerror}{where}"


def _check_names(path: Path) -> None:
    """Raise ConfigError unless what has one of our names is ours and no link. A missing one will be made."""
    for name in (*_FOLDERS, *_FILES):
        try:
            found = os.lstat(path / name)
        except FileNotFoundError:
            continue
        wanted = stat.S_ISDIR if name in _FOLDERS else stat.S_ISREG
        if not wanted(found.st_mode):
            kind = "directory" if name in _FOLDERS else "regular file"
            raise ConfigError(f"cold.path {path}: {name} is a symbolic link or no {kind}; remove it")
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"cold.path {path}: {name} belongs to {user_name(found.st_uid)}, and this process runs as "
                f"{user_name(os.geteuid())}: chown -R {os.geteuid()} {path}"
            )


def _lock(path: Path) -> int:
    fd = open_own(path / "LOCK", os.O_RDWR | os.O_CREAT, f"cold.path {path}")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(
            f"cold.path {path} is in use by another process (its LOCK file is held): stop that one, or "
            "give this one another directory"
        ) from None
    return fd


def _check(directory: Directory, verify_timeout_s: float, *, meanwhile: bool) -> None:
    if (directory.path / "DROP").exists():
        log.warning("cold path=%s event=dropped reason=DROP file", directory.path)
        _empty(directory)
        (directory.path / "DROP").unlink()
        return
    state = _read_state(directory.path)
    if state is not None and state.get("format") not in READABLE:
        raise ConfigError(
            f"cold.path {directory.path} has format {state.get('format')}, this version knows 1 to {FORMAT}: "
            "use the version that wrote it, or put an empty file DROP there to start empty"
        )
    if not _is_there(directory.index / "data.mdb"):
        _empty(directory)
        return
    clean = state is not None and state.get("clean") is True and index_is_whole(directory.index / "data.mdb")
    directory.clean = clean
    meanwhile = meanwhile and state is not None and state.get("loading") is False
    problem = verify(directory.index, verify_timeout_s, "quick" if clean else "read" if meanwhile else "whole")
    if problem == UNFINISHED:
        _empty(directory)
    elif problem is not None:
        quarantine(directory, problem)
    elif meanwhile and not clean:
        directory.checking = Check(directory.index, verify_timeout_s, "bytes")


def _is_there(path: Path) -> bool:
    """As Path.exists, but an answer that cannot be had is no "no". Raises OSError."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _read_state(path: Path) -> dict[str, object] | None:
    try:
        with os.fdopen(os.open(path / "STATE", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            state = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def index_is_whole(data: Path) -> bool:
    """Whether an LMDB file has all pages that its newest meta page counts. This finds truncation without LMDB.

    Raises OSError for a file that cannot be read: of that file nothing is known.
    """
    try:
        with data.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metas = [_last_page(file.read(4096)) for _ in range(2)]
    except struct.error:
        return False
    last, _, page_nbytes = max(metas, key=lambda meta: meta[1])
    return last > 0 and size >= (last + 1) * page_nbytes


def _last_page(page: bytes) -> tuple[int, int, int]:
    """(last page, transaction, page size) of a meta page; zeros if it is not a meta page."""
    magic, version, _, _, page_nbytes = _LMDB_META.unpack_from(page)
    last, transaction = struct.unpack_from("<QQ", page, 136)
    return (last, transaction, page_nbytes) if (magic, version) == (_LMDB_MAGIC, 1) else (0, 0, 4096)


class Check:
    """A check of an index in a child process, which goes on until somebody asks for the problem.

    how: see `verify_child.check`. If a file that was closed in order is damaged, the child dies and not the daemon.
    """

    def __init__(self, index: Path, timeout_s: float, how: str) -> None:
        self._index = index
        self._timeout_s = timeout_s + (index / "data.mdb").stat().st_size / VERIFY_NBYTES_PER_S
        self._child = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-P", verify_child.__file__, str(index), how],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.communicate()

    def problem(self) -> str | None:
        """Wait for the child. Returns the problem, None for a sound index, UNFINISHED for an unmade one.

        Raises ConfigError if the check could not be made: the system refused the file or memory, or somebody ended it.
        """
        try:
            out, err = self._child.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return f"check took over {self._timeout_s:.0f} s"
        except BaseException:
            self.end()
            raise
        code = self._child.returncode
        if code == 0:
            return None
        if code == verify_child.UNFINISHED:
            return UNFINISHED
        if code == verify_child.UNREADABLE or code in _KILLED:
            why = out.strip() or f"the check was ended by signal {-code}"
            raise ConfigError(
                f"the index {self._index} could not be checked: {why}. Nothing was deleted; remove the cause, or put "
                f"an empty file DROP into {self._index.parent} to start empty"
            )
        lines = (out + err).strip().splitlines() or ["no message"]
        said = lines[0] if out.strip() else lines[-1]  # the first problem found, or the reason why the child died
        return f"check ended with {code}: {said}"


def verify(index: Path, timeout_s: float, how: str) -> str | None:
    """Check an index, as `Check` says, and wait for it."""
    return Check(index, timeout_s, how).problem()


def start_empty(directory: Directory, problem: str) -> None:
    """Go on without what the directory held, after its index was found damaged. Raises OSError."""
    quarantine(directory, problem)
    directory.segments.mkdir(mode=0o700)
    directory.write_state(clean=False)


def quarantine(directory: Directory, problem: str) -> None:
    """Move a damaged index to quarantine/ and start empty.

    The records are deleted: without rows a live record cannot be told from a deleted one, which must not come back.
    """
    place = directory.path / "quarantine"
    place.mkdir(mode=0o700, exist_ok=True)
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    while (place / name).exists():
        name += "-again"
    directory.index.rename(place / name)
    log.error("cold path=%s event=quarantined index=quarantine/%s reason=%s", directory.path, name, problem)
    for old in sorted(place.iterdir())[:-QUARANTINES_MAX]:
        shutil.rmtree(old, ignore_errors=True)
    _empty(directory)
    directory.quarantined = problem


def _empty(directory: Directory) -> None:
    shutil.rmtree(directory.index, ignore_errors=True)
    shutil.rmtree(directory.segments, ignore_errors=True)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
