"""kvstored as a secondary tier of vLLM's offloading (0.32), below its pinned CPU memory.

    "kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": ..., "secondary_tiers": [{"type": "KvstoredTier",
        "module_path": "kvstored_client.integrations.vllm_tier", "address": "unix:/run/kvstored/kvstored.sock"}]}

Runs in the scheduler's process: no method waits for the cache, `drain_jobs` apart. A lookup answers RETRY until it is
known; a load that finds nothing fails its job, and vLLM recomputes. Jobs run in order on one thread of the tier's.
Keys are vLLM's own, under a digest of the whole offloading configuration (`_HARMLESS` says what is left out). vLLM does
not tell a tier of the model's weights, RoPE, quantization or LoRA files: `namespace` in the tier's settings is the
operator's word for those.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import vllm
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import configured
from kvstored_client.integrations.dropped import PENDING_MAX, Dropped
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard

logger = logging.getLogger(__name__)

_KNOWN_MAX = 65_536
"""Answers of lookups that are kept."""
_KNOWN_S = 5.0
"""An answer is good for so long: another host may put or evict the block meanwhile."""
_PLACE = "where a process or its peers are, not what they compute"
_HARMLESS = {
    "OffloadingConfig.engine_id": "random, and new at each start",
    "OffloadingConfig.enable_kv_cache_events": "what is reported",
    "OffloadingParallelConfig.data_parallel_index": "replicas compute the same chunks",
    "OffloadingParallelConfig.data_parallel_rank_local": "replicas compute the same chunks",
    "extra_config.cpu_bytes_to_use": "how much memory, not what is in a chunk",
    "extra_config.secondary_tiers": "where else chunks go; this tier's own settings are in",
    "settings.address": _PLACE,
    "settings.lookup_timeout_s": "how long a call is waited for",
    "settings.fetch_timeout_s": "how long a call is waited for",
}
"""All that is not in the identity. A field that is not here is in it, those of other versions of vLLM included."""


class KvstoredTier(SecondaryTierManager):
    """Chunks of vLLM's CPU memory in kvstored."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._guard = Guard(
            settings.get("address"),
            lookup_timeout_s=float(settings.get("lookup_timeout_s", LOOKUP_TIMEOUT_S)),
            fetch_timeout_s=float(settings.get("fetch_timeout_s", FETCH_TIMEOUT_S)),
        )
        self._root = _identity(offloading_spec, settings)
        self._slots = torch.from_numpy(np.asarray(primary_kv_view).view(np.uint8))
        self._threads = ThreadPoolExecutor(1, "kvstored-jobs")
        self._askers = ThreadPoolExecutor(1, "kvstored-lookups")
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._asked: list[bytes] = []
        self._finished: list[JobResult] = []
        self._running: set[Future[None]] = set()
        events = getattr(offloading_spec, "kv_events_config", None)
        self._events: list[OffloadingEvent] | None = [] if getattr(events, "enable_kv_cache_events", False) else None
        self._told: OrderedDict[OffloadKey, None] = OrderedDict()
        self.dropped = Dropped()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT or MISS where that is known, RETRY until then."""
        del req_context
        own = self._key(key)
        with self._lock:
            found = self._known.get(own)
            if found is not None and time.monotonic() - found[1] < _KNOWN_S:
                if not found[0]:
                    self._tell([key], removed=True)
                return LookupResult.HIT if found[0] else LookupResult.MISS
            if own not in self._asked:
                self._asked.append(own)
                if len(self._asked) == 1:
                    self._askers.submit(self._ask)
        return LookupResult.RETRY

    def _ask(self) -> None:
        # All lookups that came together are one call.
        with self._lock:
            asked = self._asked[:4096]
        # Each chunk once while its answer is known; a prompt's chunks are not told apart from another's.
        held = self._guard.locate(asked, lookup=Lookup(len(asked)))
        with self._lock:
            for key, at in zip(asked, held, strict=True):
                self._learn(key, held=at is not None)
            del self._asked[: len(asked)]
            if self._asked:
                self._askers.submit(self._ask)

    def _learn(self, key: bytes, *, held: bool) -> None:
        self._known[key] = (held, time.monotonic())
        self._known.move_to_end(key)
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Put chunks from their slots."""
        self._start(job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Fill slots with chunks."""
        self._start(job_metadata, self._load)

    def _start(self, job: TransferJob, work: Any) -> None:
        def run() -> None:
            start = time.monotonic()
            try:
                result = work(job)
            except Exception as error:  # noqa: BLE001 - the boundary: vLLM only ever sees a failed job
                logger.warning("job %s failed: %s: %s", job.job_id, type(error).__name__, error)
                result = JobResult(job.job_id, success=False, successful_keys=())
            result.transfer_time = time.monotonic() - start
            with self._lock:
                self._finished.append(result)

        future = self._threads.submit(run)
        with self._lock:
            self._running.add(future)
        future.add_done_callback(self._ended)

    def _ended(self, future: "Future[None]") -> None:
        with self._lock:
            self._running.discard(future)

    def _store(self, job: TransferJob) -> JobResult:
        keys = [self._key(key) for key in job.keys]
        held = self._guard.locate(keys)
        missing = [(key, int(slot)) for key, slot, at in zip(keys, job.chunk_ids, held, strict=True) if at is None]
        # Copies: a put given up at its deadline may still be reading when vLLM reuses the slot.
        chunks = self._guard.copies([self._slots[slot] for _, slot in missing]) if missing else []
        entries = [(key, {"chunk": chunk}) for (key, _), chunk in zip(missing, chunks, strict=True)]
        stored = self._guard.put_many(entries, fidelity="exact") if entries else 0
        done = stored == len(entries)
        if done:
            with self._lock:
                for key in keys:
                    self._learn(key, held=True)
                self._tell(list(job.keys), removed=False)
        return JobResult(job.job_id, success=done, transfer_bytes=stored * self._block_size_bytes)

    def _load(self, job: TransferJob) -> JobResult:
        keys = list(job.keys)
        filled: list[bool] = []
        with self._guard.lease_many([self._key(key) for key in keys], lookup=ELSEWHERE) as hits:
            for slot, hit in zip(job.chunk_ids, hits, strict=True):
                filled.append(hit is not None and _fills(hit.tensors.get("chunk"), self._slots[int(slot)]))
                del hit
        good = [key for key, done in zip(keys, filled, strict=True) if done]
        with self._lock:
            for key in (key for key, done in zip(keys, filled, strict=True) if not done):
                self._learn(self._key(key), held=False)
                self._tell([key], removed=True)
        return JobResult(
            job.job_id, success=len(good) == len(keys), successful_keys=good,
            transfer_bytes=len(good) * self._block_size_bytes,
        )  # fmt: skip

    def _tell(self, keys: list[OffloadKey], *, removed: bool) -> None:
        """Note for routers what was stored, and what of it is gone. Under the lock."""
        if self._events is None:
            return
        changed = [key for key in keys if (key in self._told) is removed]
        if not removed and len(self._events) >= PENDING_MAX:
            self.dropped.add(len(changed))
            return  # not told, so no removal of them is due: those are never dropped
        for key in changed:
            if removed:
                del self._told[key]
            else:
                self._told[key] = None
        if changed:
            self._events.append(OffloadingEvent(keys=changed, medium=Medium.STORAGE, removed=removed))
        oldest = [self._told.popitem(last=False)[0] for _ in range(len(self._told) - _KNOWN_MAX)]
        if oldest:
            self._events.append(OffloadingEvent(keys=oldest, medium=Medium.STORAGE, removed=True))

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What was stored, and what was found gone, since the last call; nothing unless the engine publishes events."""
        if self._events is None:
            return []
        with self._lock:
            found, self._events = self._events, []
        return found

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Results since the last call."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def has_pending_work(self) -> bool:
        """Whether jobs or lookups are under way."""
        with self._lock:
            return bool(self._running or self._asked or self._finished)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count as use, later."""
        del req_context
        own = [self._key(key) for key in keys]
        if own:
            self._guard.later(lambda: self._guard.cache.touch(own), 0)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """No wish of its own."""
        del req_context
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Wait for every job; each is bounded by its deadlines."""
        with self._lock:
            running = list(self._running)
        for future in running:
            future.result()

    def shutdown(self) -> None:
        """End the threads once their jobs are done."""
        self._askers.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True)

    def _key(self, key: OffloadKey) -> bytes:
        return hashlib.sha256(self._root + bytes(key)).digest()


def _fills(chunk: Any, target: torch.Tensor) -> bool:
    """Copy a chunk to its slot. False: it is none of this size."""
    if chunk is None or chunk.shape != target.shape or chunk.dtype != target.dtype:
        return False
    target.copy_(chunk)
    return True


def _identity(spec: Any, settings: dict[str, Any]) -> bytes:
    """Digest of whatever makes chunks interchangeable.

    A configuration that has no stable form belongs to this process alone: no other process finds its chunks.
    """
    whole = {
        "version": vllm.__version__, "config": spec.config, "settings": settings,
        "replicated_layout": getattr(spec, "replicated_layout", None),
    }  # fmt: skip
    try:
        return configured.digest("vllm-tier", whole, _HARMLESS)
    except configured.NoStableForm as error:
        logger.warning("what is kept here is found by this process only: %s", error)
        return secrets.token_bytes(32)
