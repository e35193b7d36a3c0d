"""An offline verb started by root becomes the user whose directory it works on. Never call it in a daemon.

Root's files in the daemon's directory are files that the daemon cannot read. And whoever owns a directory on the way
decides, at any moment, what the names below it mean: root that works there can be led anywhere by a link.
"""

import os
import pwd
import sys
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.ownership import user_name


def become_owner_of(directory: Path, *handed_over: int) -> None:
    """Give up root's rights for good where `directory`, or one on the way to it, is another user's.

    handed_over: descriptors of what that user is to own. Another user than root stays as it is: opening the directory
    refuses strangers. Raises ConfigError where two users own parts of the way: neither of them can be trusted with the
    other's.
    """
    owners = _others_on_the_way(directory) if os.geteuid() == 0 else []
    if len(owners) > 1:
        raise ConfigError(
            f"on the way to {directory} are directories of {user_name(owners[0])} and of {user_name(owners[1])}: run "
            "this as the user that the daemon runs as (sudo -u)"
        )
    for uid in owners:
        try:
            gid = pwd.getpwuid(uid).pw_gid
        except KeyError:
            gid = directory.stat().st_gid
        for fd in handed_over:
            os.fchown(fd, uid, gid)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if not os.access(sys.executable, os.X_OK):
            raise ConfigError(
                f"{directory} belongs to {user_name(uid)}, who cannot run {sys.executable}: run the kvstored that the "
                "daemon runs (python3 -m venv /opt/kvstored), or chown the directory to the user who shall have it"
            )


def _others_on_the_way(directory: Path) -> list[int]:
    """The users besides root who own a directory or a link on the way, by the name given and by the real one."""
    found: dict[int, None] = {}
    for path in (Path(os.path.abspath(directory)), Path(os.path.realpath(directory))):  # noqa: PTH100 - links kept
        for step in (*reversed(path.parents), path):
            uid = os.lstat(step).st_uid
            if uid != 0:
                found[uid] = None
    return list(found)
