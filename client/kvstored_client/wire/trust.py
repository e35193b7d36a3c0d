"""Who listens on a unix socket, asked before a token or a tensor goes there. Standard library only.

Trusted are this process's user, root, the user of $KVSTORED_DAEMON_UID (a number, or several with commas), and the
owner of the socket's directory where only root could have made that: /run/kvstored of the service. A directory in /tmp
proves nothing: whoever came first may have made it.
Two things are asked. Who listens (SO_PEERCRED), of each lease connection and when a channel is opened. And who could
listen: the directory's owner and mode, because gRPC connects again by itself and shows nobody its sockets. While the
directory is the one that was asked about (`Place.is_current`), only trusted users can put a socket there. Where others
may, too (in /tmp, or with an umask of 002), the socket has to be the one that was asked about, else it is asked again.
"""

import errno
import os
import socket
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from kvstore.errors import TierUnavailable
from kvstore.ownership import overflow_uid, user_name

VARIABLE = "KVSTORED_DAEMON_UID"
_UCRED = struct.Struct("iII")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_WHOLE_MAP = ["0", "0", "4294967295"]
_NOBODY_THERE = frozenset({errno.ENOENT, errno.ECONNREFUSED})


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a unix socket, from the kernel; of a listener, the user that called listen()."""
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


class Place:
    """The directory of a socket that may be trusted. It is held open: no other directory gets its inode's number."""

    def __init__(self, path: Path, environ: Mapping[str, str] = os.environ) -> None:
        """path: the socket's. Raises TierUnavailable for one that cannot be trusted, FileNotFoundError without one."""
        self.path = path
        self._fd = -1
        self._fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.users, self.shared = _trusted(path, os.fstat(self._fd), environ)
        self._socket: tuple[int, int] | None = None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def is_current(self) -> bool:
        """Whether the path still leads to this directory and, where others may write there, to the same socket."""
        try:
            here = os.path.samestat(os.fstat(self._fd), self.path.parent.stat())
            return here and (not self.shared or self._socket == _number(os.lstat(self.path)))
        except OSError:
            return False

    def check(self, sock: socket.socket) -> None:
        """Raise TierUnavailable unless a trusted user listens at the other end of a connected socket."""
        uid = peer_uid(sock)
        if uid not in self.users:
            raise _refused(self.path, f"{user_name(uid)} listens there", uid)

    def check_listener(self) -> None:
        """The same of whoever listens at the path now.

        Nobody may be there, and nothing is sent then. Where others may put a socket there, that is an OSError.
        """
        try:
            found = os.lstat(self.path)
            if found.st_uid not in self.users:
                raise _refused(self.path, f"{user_name(found.st_uid)} made it", found.st_uid)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)  # a daemon that accepts nobody must not hold the caller
                sock.connect(str(self.path))
                self.check(sock)
        except OSError as error:
            if error.errno in _NOBODY_THERE and not self.shared:
                return
            if error.errno == errno.ENOENT:
                raise
            raise TierUnavailable(f"failed to connect to {self.path}: {error.strerror}") from None
        self._socket = _number(found)


def _number(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _trusted(path: Path, found: os.stat_result, environ: Mapping[str, str]) -> tuple[frozenset[int], bool]:
    """The users trusted to listen in the socket's directory, and whether others may put a socket there, too.

    Raises TierUnavailable for a directory that another user made.
    """
    users = {0, *named_users(environ)}
    if _is_somebody(os.geteuid()):
        users.add(os.geteuid())
    shared = bool(found.st_mode & _OTHERS_WRITE)
    made_by_root = True
    for step in _steps(path.parent):
        status = os.lstat(step)
        if status.st_uid != 0 or (status.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(status.st_mode)):
            made_by_root = False
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in users:
            raise _refused(path, f"{step} is a link made by {user_name(status.st_uid)}", status.st_uid)
        if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX and not stat.S_ISLNK(status.st_mode):
            shared = True  # they may rename what is in it
    if found.st_uid not in users:
        if not made_by_root:
            raise _refused(path, f"its directory belongs to {user_name(found.st_uid)}", found.st_uid)
        users.add(found.st_uid)
    return frozenset(users), shared


def _steps(directory: Path) -> list[Path]:
    """What lies above a directory, by the name given (links too) and by the real one."""
    given, real = Path(os.path.abspath(directory)), Path(os.path.realpath(directory))  # noqa: PTH100 - links are looked at
    links = [given] if given.is_symlink() else []
    return [*given.parents, *links, *real.parents]


def named_users(environ: Mapping[str, str]) -> list[int]:
    """The users that the variable names. Raises ValueError for anything but numbers."""
    text = environ.get(VARIABLE, "")
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{VARIABLE} is a user's number, or several with commas, got {text!r:.80}") from None


def _is_somebody(uid: int) -> bool:
    """Whether a number stands for one user. The overflow uid stands for all that this namespace has no number for."""
    if uid != overflow_uid():
        return True
    try:
        return Path("/proc/self/uid_map").read_text().split() == _WHOLE_MAP
    except OSError:
        return False


def _refused(path: Path, why: str, uid: int) -> TierUnavailable:
    return TierUnavailable(
        f"{path} is not trusted: {why}, and that is neither this user, nor root, nor the owner of a directory that "
        f"only root could have made; if it is the daemon's user, set {VARIABLE}={uid}"
    )
