"""Checks, in a child process, that an LMDB index can be opened safely. Exit code 0: yes. UNFINISHED: the file is
whole and empty, without the table of rows, because the power was cut before the table was made. UNREADABLE: the system
refused the file, memory or the disk, and the first line printed says why: nothing is known of the index.

It is a child, because a truncated file means SIGBUS and a damaged page may mean abort; neither is an exception. It is
run by path and imports only lmdb: importing torch would take longer than the check.
"""

import sys
from collections import deque

import lmdb
import lmdb.verify

UNFINISHED, UNREADABLE = 3, 4
PROBES = 200
"""Rows written in an aborted transaction: a dozen pages, so that LMDB reads its list of free pages."""


def main(path: str, how: str) -> int:
    """The exit code of `check`, and UNREADABLE for what the system refused."""
    try:
        return check(path, how)
    except (OSError, MemoryError, lmdb.ReadonlyError, lmdb.MemoryError, lmdb.DiskError, lmdb.LockError) as error:
        told = str(error) or type(error).__name__
    except lmdb.Error as error:
        # The class itself stands for an errno that LMDB has no class for; its own codes for damage have theirs.
        if type(error) is not lmdb.Error:
            raise
        told = str(error)
    sys.stdout.write(f"{told}\n")
    return UNREADABLE


def check(path: str, how: str) -> int:
    """The exit code. how: "bytes" walks the file's bytes without LMDB, which takes some seconds for a million rows.

    "read" lets LMDB read every row, and write in a transaction that is aborted, since LMDB reads the list of free pages
    only when it writes. "whole": both. "quick": as "read", of a file closed in order, so it has a table of rows.
    """
    problems = lmdb.verify.verify(path) if how in ("bytes", "whole") else []  # type: ignore[no-untyped-call]  # no types
    if problems:
        sys.stdout.write("\n".join(problems[:20]))
        return 1
    if how == "bytes":
        return 0
    # A map larger than any index: the file's own size would be enough for reading, but not for one more page.
    with lmdb.open(path, max_dbs=4, map_size=1 << 40, lib_version=0, sync=False) as env:
        if how != "quick" and not env.stat()["entries"]:
            return UNFINISHED
        db = env.open_db(b"rows", create=False)
        with env.begin(db=db) as txn, txn.cursor() as cursor:
            deque(cursor.iternext(keys=True, values=True), maxlen=0)
        with env.begin(db=db, write=True) as txn:
            for n in range(PROBES):
                txn.put(b"probe %d" % n, bytes(200))
            txn.abort()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
