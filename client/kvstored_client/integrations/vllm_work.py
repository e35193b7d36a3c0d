"""What a step's scheduler tells the workers of vLLM to load and to keep, and the loads that run beside the steps."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvstored_client.integrations.vllm_groups import Places

logger = logging.getLogger(__name__)


@dataclass
class Load:
    """What a request loads: each chunk's hash, the first of its blocks that is wanted, and the places of these."""

    request_id: str
    chunks: list[tuple[bytes, int, Places]]
    alone: bool = False
    """It is loaded beside the steps, and the request waits for it."""

    def blocks(self) -> list[int]:
        """All places in the first group: a block of each is as many tokens."""
        return [block for _, _, places in self.chunks for block in places[0]]


@dataclass
class Save:
    """Chunks of a request to keep: each one's hash and blocks. before: the hash of the chunk that they continue."""

    request_id: str
    before: bytes | None
    chunks: list[tuple[bytes, Places]]
    options: dict[str, Any] = field(default_factory=dict)
    told: list[list[Any]] = field(default_factory=list)
    """What routers are told of each chunk's blocks: pairs of hash and `vllm_events.Block`."""


@dataclass
class Work(KVConnectorMetadata):
    """What a step's workers load and keep. root: the scheduler's identity. ended: requests that are over.

    prefill: tokens of the step where it is one whole prefill and nothing else, so that its time can be told; else 0.
    """

    root: bytes = b""
    prefill: int = 0
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


class Loading:
    """Loads of a worker, one after the other on one thread or in the caller's, and what came of them. Any thread."""

    def __init__(self, load: Callable[[Load], list[int]]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._done: set[str] = set()
        self._failed: set[int] = set()
        self._failed_requests: set[str] = set()

    def begin(self, load: Load) -> None:
        """Load beside the steps; the request is done when all of it was tried."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstored-load")
        self._thread.submit(self.run, load)

    def run(self, load: Load) -> None:
        """Load now."""
        failed = load.blocks()
        try:
            failed = self._load(load)
        except Exception:
            logger.exception("a load failed")
        with self._lock:
            self._failed.update(failed)
            if failed:
                self._failed_requests.add(load.request_id)
            if load.alone:
                self._done.add(load.request_id)

    def take_done(self) -> set[str]:
        """Requests that are done since the last call. What failed of them is told by `take_failed` by then."""
        with self._lock:
            found, self._done = self._done, set()
        return found

    def take_failed(self) -> set[int]:
        """Blocks that could not be filled since the last call."""
        with self._lock:
            found, self._failed = self._failed, set()
        return found

    def take_failed_requests(self) -> set[str]:
        """Requests of which blocks could not be filled since the last call."""
        with self._lock:
            found, self._failed_requests = self._failed_requests, set()
        return found

    def close(self) -> None:
        """Wait for the load in progress; the others are given up."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
