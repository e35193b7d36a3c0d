"""A mutation run: the program is broken on purpose, one small change at a time, and a test must notice.

    python -m tests.mutants --file kvstore/residency/read_path.py      (or `make mutants MUTANTS_ARGS="--file ..."`)

`mutations` makes the changes, `lines` measures once which test executes which line, `running` runs those tests against
each change in a fork of a process that has torch imported already. What survived, and why it may, is in MUTANTS.md.
"""
