"""Whose files these are: who else could have put a file there that is about to be locked, written or believed.

A process writes only files of its own user and follows no symbolic link at a name that it chose itself. A directory
that everybody may write, or a link in it, would otherwise let another user choose what is overwritten. Standard library
only, no state; the daemon, its clients and the offline verbs use the same rules.
"""

import errno
import os
import pwd
import stat
from pathlib import Path

from kvstore.errors import ConfigError

_OVERFLOW_PATH = Path("/proc/sys/kernel/overflowuid")
_OVERFLOW_UID = 65534
"""The kernel's default."""


def overflow_uid() -> int:
    """The number that the kernel shows for every user who has none in this user namespace: it names nobody."""
    try:
        return int(_OVERFLOW_PATH.read_text())
    except (OSError, ValueError):
        return _OVERFLOW_UID


def user_name(uid: int) -> str:
    """A user for a message: "kvstored (uid 998)", or the number alone where it has no name here."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (KeyError, OverflowError):
        return f"uid {uid}"


def open_own(path: Path, flags: int, what: str, *, mode: int = 0o600) -> int:
    """A descriptor of a regular file of this process's user, made with `mode` if the flags say so.

    It follows no symbolic link and opens no file that has a second name: writing there would write to a file of another
    purpose. what: the setting or place, for the message. Raises ConfigError for such a file, OSError as os.open.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ConfigError(f"{what}: {path} is a symbolic link or a pipe; remove it") from None
        raise
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1:
        return fd
    os.close(fd)
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{what}: {path} belongs to {user_name(found.st_uid)}, not to {user_name(os.geteuid())}")
    raise ConfigError(f"{what}: {path} is no regular file with one name; remove it")


def check_private(path: str | Path, what: str, *, secret: bool) -> None:
    """Raise ConfigError for a file of settings that its group or everybody may write, or, if secret, everybody read.

    Its group may read it: the daemon reads what root wrote. Raises OSError if it is not there.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - a Path or text
    for bit, who, may, remedy in (
        (stat.S_IWOTH, "everybody on this host", "write", "o-w"),
        (stat.S_IWGRP, "its group", "write", "g-w"),
        (stat.S_IROTH if secret else 0, "everybody on this host", "read", "o-r"),
    ):
        if mode & bit:
            raise ConfigError(f"{what}: {who} can {may} {path}: chmod {remedy} {path}")


def read_private(path: str | Path, what: str) -> str:
    """The ASCII text of a file with a secret. what: the setting, for the message. Raises ConfigError."""
    try:
        check_private(path, what, secret=True)
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: cannot read {path}: {getattr(error, 'strerror', error)}") from None


def everybody_reads(path: str | Path) -> bool:
    """Whether any user of this host may read a file. Raises OSError."""
    return bool(os.stat(path).st_mode & stat.S_IROTH)  # noqa: PTH116 - a Path or text


def check_directory(path: Path, what: str, *, root_may_own: bool = True) -> None:
    """Raise ConfigError for a directory of another user's, or one where everybody may replace what a name means.

    A symbolic link at `path` itself is followed if root or this user made it. A group may write, as to a volume made
    for its pod, and everybody where the sticky bit is set: there nobody removes another's names, so it is enough that
    each file is checked (`open_own`). Raises OSError if there is no directory.
    """
    own = os.geteuid()
    allowed = {own, 0} if root_may_own else {own}
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in {own, 0}:
        raise ConfigError(f"{what}: {path} is a symbolic link made by {user_name(link.st_uid)}; remove it")
    found = os.stat(path)  # noqa: PTH116 - beside lstat
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if found.st_uid not in allowed:
        raise ConfigError(
            f"{what}: the directory {path} belongs to {user_name(found.st_uid)}, and this process runs as "
            f"{user_name(own)}: run it as that user (sudo -u), or name a directory of its own"
        )
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(f"{what}: everybody may write to the directory {path}: chmod o-w {path}, or name another")
