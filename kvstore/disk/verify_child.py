"""Run by path in a child process: whether an LMDB index can be opened without harm. Exit code 0: yes.

A child, because a truncated file is SIGBUS and a damaged page can be an abort; neither is an exception. A file of its
own that imports lmdb and nothing of ours: importing torch would take longer than the check.
"""

import sys

import lmdb
import lmdb.verify


def main(path: str) -> int:
    """First the byte walker, which never hands the file to the engine; then the engine itself, over every row."""
    problems = lmdb.verify.verify(path)  # type: ignore[no-untyped-call]  # lmdb's own module has no types
    if problems:
        sys.stdout.write("\n".join(problems[:20]))
        return 1
    with lmdb.open(path, max_dbs=4, readonly=True, lock=False, lib_version=0) as env:
        db = env.open_db(b"rows", create=False)
        with env.begin(db=db) as txn, txn.cursor() as cursor:
            rows = sum(1 for _ in cursor.iternext(keys=True, values=True))
    sys.stdout.write(f"{rows} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
