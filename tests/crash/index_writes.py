"""Run in a process of its own with `failing_calls` loaded before libc: LMDB's own writes and syncs fail, one by one.

    python -m tests.crash.index_writes DIRECTORY SHIM MOST

Every nth call until a life has fewer than n, with EIO, with ENOSPC, and as a short write. Prints the trials; a lie or a
loss ends it with a traceback.
"""

import contextlib
import ctypes
import errno
import logging
import shutil
import sys
from pathlib import Path

import kvstore.disk.writer
from kvstore.errors import ConfigError
from kvstore.tiers.cold import Cold
from tests.crash.history import entry_of, key_of, open_cold, version_in

WRITE, SYNC = 0, 1
SHORT = 0
FAILURES = [(WRITE, errno.EIO), (WRITE, errno.ENOSPC), (WRITE, SHORT), (SYNC, errno.EIO), (SYNC, errno.ENOSPC)]
PUTS, KEYS = 16, 6


def life(cold: Cold) -> dict[int, int]:
    """Puts, replacements and a removal, with a failure somewhere among them; what must be there at the end."""
    for version in range(1, PUTS + 1):
        cold.put(entry_of(version % KEYS, version, 3_000))
        if version % 2 == 0:
            cold.flush()
        assert version_in(got(cold, version % KEYS), version % KEYS) == version
    cold.wait(cold.queue_removal(key_of(3)))
    cold.touch([key_of(1)])
    cold.flush_meta()
    cold.flush()
    assert cold.healthy
    return held(cold)


def got(cold: Cold, n: int):  # type: ignore[no-untyped-def]  # an entry
    entry = cold.get(key_of(n))
    assert entry is not None, f"LOST: key {n}"
    return entry


def held(cold: Cold) -> dict[int, int]:
    return {n: version_in(entry, n) for n in range(KEYS) if (entry := cold.get(key_of(n)))}


def main(directory: Path, shim: ctypes.CDLL, most: int) -> None:
    logging.disable(logging.CRITICAL)
    kvstore.disk.writer.PAUSE_MIN_S = 0.001
    trials = 0
    for call, code in FAILURES:
        for nth in range(1, most + 1):
            path = directory / f"{call}-{code}-{nth}"
            cold = open_cold(path)
            shim.arm(b"/data.mdb", call, nth, code)
            kept = life(cold)
            with contextlib.suppress(ConfigError):
                cold.close()
            fired = shim.fired()
            shim.arm(b"", -1, 0, 0)
            latest = {v % KEYS: v for v in range(1, PUTS + 1)}
            assert kept == {n: v for n, v in latest.items() if n != 3}, f"call {call} code {code} n={nth}: {kept}"
            cold = open_cold(path)
            assert held(cold) == kept, f"call {call} code {code} n={nth}: {held(cold)} after a restart, not {kept}"
            assert cold.stats().quarantined is None
            cold.close()
            shutil.rmtree(path)
            if not fired:
                break
            trials += 1
    print(f"index writes failing: {trials} trials, 0 lies, 0 lost")  # noqa: T201 - read by the test


if __name__ == "__main__":
    main(Path(sys.argv[1]), ctypes.CDLL(sys.argv[2]), int(sys.argv[3]))
