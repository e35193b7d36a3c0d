"""`kvstored serve` with two more signals: SIGUSR1 tells where each thread is, SIGUSR2 how large Python's heap is."""

import faulthandler
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """From the command line: as `kvstored`."""
    dumps = Path(os.environ["KVSTORED_SOAK_DUMP"]).open("a")  # noqa: SIM115 - for the length of the process
    faulthandler.enable(dumps)
    faulthandler.register(signal.SIGUSR1, dumps, all_threads=True)
    # Open from the start: the handler runs wherever the daemon is, also when it is out of descriptors.
    blocks = os.open(os.environ["KVSTORED_SOAK_BLOCKS"], os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    signal.signal(signal.SIGUSR2, lambda *_: os.pwrite(blocks, b"%16d" % sys.getallocatedblocks(), 0))
    # Only now: it takes a second, in which a signal must not end the process.
    from kvstored.__main__ import main as kvstored

    kvstored()


if __name__ == "__main__":
    main()
