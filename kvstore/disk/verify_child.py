"""Run by path in a child process: whether an LMDB index can be opened without harm. Exit code 0: yes; UNFINISHED: it
is whole and empty, without even the table of rows: the power was cut before it was made.

A child, because a truncated file is SIGBUS and a damaged page can be an abort; neither is an exception. A file of its
own that imports lmdb and nothing of ours: importing torch would take longer than the check.
"""

import sys

import lmdb
import lmdb.verify

UNFINISHED = 3
PROBES = 200
"""Rows put and given up: a dozen pages, so that the free ones are looked up."""


def main(path: str, how: str) -> int:
    """Unless `how` is "quick", first the byte walker, which never hands the file to the engine: 3 s for a million rows.

    Then the engine itself, over every row, and in a transaction that is given up: the list of free pages is read only
    by who writes.
    """
    problems = [] if how == "quick" else lmdb.verify.verify(path)  # type: ignore[no-untyped-call]  # it has no types
    if problems:
        sys.stdout.write("\n".join(problems[:20]))
        return 1
    # A map larger than any index: the file's own size would do for reading, not for a page more.
    with lmdb.open(path, max_dbs=4, map_size=1 << 40, lib_version=0, sync=False) as env:
        if how != "quick" and not env.stat()["entries"]:
            return UNFINISHED
        db = env.open_db(b"rows", create=False)
        with env.begin(db=db) as txn, txn.cursor() as cursor:
            rows = sum(1 for _ in cursor.iternext(keys=True, values=True))
        with env.begin(db=db, write=True) as txn:
            for n in range(PROBES):
                txn.put(b"probe %d" % n, bytes(200))
            txn.abort()
    sys.stdout.write(f"{rows} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
