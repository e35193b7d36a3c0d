"""Chunks in four bits before they cross the bus: encoded on the engine's GPU, by the thread that puts them.

On a stream of its own, so that neither waits for the engine's steps nor holds them up more than its kernels do. An
encoder that fails (no compiler, no memory) or a daemon that takes no packed entries loses nothing: chunks are put as
they are, and after a few failures in a row nobody tries again. Only the writer's thread calls it. Imports no engine.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.packed import any_packed
from kvstored_client.device import Transfers
from kvstored_client.integrations.guard import Guard

logger = logging.getLogger(__name__)

FAILURES_MAX = 3
"""In a row: Triton without a compiler takes seconds each time to say so."""
Entry = tuple[bytes, Mapping[str, Any]]


class Encoding:
    """Of one worker, whose guard has the client that puts."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._failures = 0

    def packed(self, entries: Sequence[Entry], *, starts: bool) -> list[Entry] | None:
        """The entries in four bits, on the GPU that they are on; None: they are to be put as they are.

        starts: whether a prompt begins with the first of them.
        """
        transfers = getattr(self._guard.cache, "transfers", None)
        if not isinstance(transfers, Transfers) or self._failures >= FAILURES_MAX:
            return None
        found: list[Entry] = []
        try:
            for at, (key, tensors) in enumerate(entries):
                made = transfers.encoded(tensors, prefix_start=starts and at == 0)
                if made is None or not any_packed(made):
                    return None
                found.append((key, made))
        except Exception as error:  # noqa: BLE001 - Triton raises whatever its compiler does
            self.failed(f"{type(error).__name__}: {error}")
            return None
        return found

    def failed(self, why: str) -> None:
        """They were not encoded, or not taken."""
        self._failures += 1
        effect = "put as they are from now on" if self._failures == FAILURES_MAX else "put as they are"
        logger.warning("chunks were not put in four bits effect=%s reason=%s", effect, why)

    def taken(self) -> None:
        """The daemon took what was encoded."""
        self._failures = 0


def encoding_of(extra: Mapping[str, Any], fidelity: str, guard: Guard) -> Encoding | None:
    """As the connector's settings ask for it; None: chunks are put as they are."""
    if fidelity != "auto" or not extra.get("encode_on_gpu", False):
        return None
    return Encoding(guard)
