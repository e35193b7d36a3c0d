"""kvstored as a KV connector of vLLM 0.32 and 0.33: chunks are kept as prompts fill them and loaded before a prefill.

    --kv-transfer-config '{"kv_connector": "KvstoredConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvstored_client.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": "unix:/run/kvstored/kvstored.sock"}}'

Set the policy: vLLM's default ("fail") ends a request whose block was there at the lookup and is gone at the load.
Keys come from `request.block_hashes`, which cover salt, images, LoRA's name and path and embeddings, never from token
ids; the bytes of a LoRA adapter's files are added here, and a request whose adapter cannot be read runs without the
store. The rest of a key is a digest of the whole configuration (`vllm_identity`) and the shard. It is made in the
scheduler, and the workers are told: what a worker changes in its own copy cannot part the two.

A chunk is `chunk_tokens` of a prompt (256; on a CPU one block of the engine's), in one entry (`vllm_blocks`) under the
hash of its last block. It continues the chunk before it: no chunk is kept without the ones before. What is behind a
prompt's last whole chunk is computed anew. All shards of a chunk must be held for it to count.
Loads of more than `sync_load_budget_bytes` run on a thread beside the engine's steps; smaller ones before the forward.
Full attention, MLA, and full attention beside sliding windows (`vllm_groups`); other models run without the store.
Never raises into the engine.
"""

import hashlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvstore.hit import Fidelity
from kvstore.keys import NAMESPACE_MAX_NBYTES
from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import adapters, configured
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard
from kvstored_client.integrations.prefill_time import PrefillTime
from kvstored_client.integrations.vllm_ahead import AFTER_S, Ahead
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_encoding import encoding_of
from kvstored_client.integrations.vllm_filling import CALL_NBYTES, GPU_CALL_NBYTES, Filling, pieces
from kvstored_client.integrations.vllm_groups import Groups, Places, groups_of
from kvstored_client.integrations.vllm_identity import identity, shards_of, tokens_per_block
from kvstored_client.integrations.vllm_saving import Saving
from kvstored_client.integrations.vllm_work import Load, Loading, Save, Work
from kvstored_client.integrations.wishes import Wishes, wishes_of

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""An engine on a CPU has chunks of one block (128 tokens): what it computes anew takes it some ms a token, and a chunk
more costs a tenth of one."""
SYNC_LOAD_NBYTES = 16 << 20
"""Copied in some milliseconds, for which the other requests of the batch wait."""
_WARNINGS_MAX = 1000
"""Reasons that are logged, once each."""


@dataclass
class _Tracked:
    """A request in the scheduler: its blocks so far, and how many leading chunks need no saving."""

    request: Any
    salt: bytes
    wishes: Wishes
    saved: int = 0
    first_load: int = 0
    alone: bool = False
    lost: bool = False
    """A load of it has failed: it is computed."""
    blocks: Places = ()
    loading: frozenset[int] = frozenset()
    """What it waits for: blocks that are loaded beside the steps."""


class KvstoredConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        self._guard = Guard(
            extra.get("address"),
            lookup_timeout_s=float(extra.get("lookup_timeout_s", LOOKUP_TIMEOUT_S)),
            fetch_timeout_s=float(extra.get("fetch_timeout_s", FETCH_TIMEOUT_S)),
        )
        # "auto" lets blocks become 4 bits below hot; the default gives back every bit.
        self._fidelity: Fidelity = "auto" if extra.get("fidelity") == "auto" else "exact"
        self._prompt_only = bool(extra.get("offload_prompt_only", True))
        self._sync_nbytes = int(extra.get("sync_load_budget_bytes", SYNC_LOAD_NBYTES))
        self._allow_pin = bool(extra.get("allow_pin", False))
        self._root = b""
        self._groups = Groups()
        self._block_size = self._chunk_blocks = 1
        try:
            self._groups = groups_of(kv_cache_config)
            self._block_size = tokens_per_block(vllm_config, kv_cache_config)
            self._chunk_blocks = _chunk_blocks(vllm_config, extra, self._block_size)
            self._root = identity(vllm_config, kv_cache_config, self._chunk_blocks)
            self._on = True
        except (configured.NoStableForm, ValueError) as error:
            self._on = False
            logger.warning("running without the store: %s", error)
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec if self._on else None
        self._shards = shards_of(vllm_config.parallel_config, spec)
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        self._ended: list[str] = []
        self._buffers = GroupedBuffers({}, Groups())
        self._filling = Filling(self._guard, self._buffers, self._chunk_blocks)
        self._loading = Loading(self._load)
        self._warned: set[str] = set()
        self._time = PrefillTime()
        self._loaded_at = 0.0
        self._announced: Any = None
        self._reported: Any = None
        if self._on and _wants_events(vllm_config):  # imported here alone: it needs vLLM's own clients of ZeroMQ
            from kvstored_client.integrations.vllm_events import Announced, Reported

            self._announced, self._reported = Announced(self._shards.count), Reported()
        encoding = encoding_of(extra, self._fidelity, self._guard)
        self._saving = Saving(
            self._guard, self._time, self._fidelity, _namespace(vllm_config), self._reported, encoding
        )
        after_s = float(extra.get("prefetch_after_s", AFTER_S)) if self._on else 0.0
        self._ahead = Ahead(self._guard, after_s, self._groups.block_nbytes * self._chunk_blocks)

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a cache. A put that is dropped is a later miss, and no request is computed anew for it."""
        return False

    # In the scheduler.

    def on_new_request(self, request: Any) -> None:
        """It waits for its turn: what of it lies on disk is fetched meanwhile."""
        self._ahead.arrived(request.request_id, lambda: self._keys_of(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed, and whether they are beside the steps.

        Never the last token, which must be run.
        """
        self._ahead.asked(request.request_id)
        before = self._tracked.get(request.request_id)
        if not self._on or (before is not None and before.lost):
            return 0, False
        try:
            salt, per = adapters.salt_of(request), self._chunk_blocks
            hashes = self._hashes(request, salt)
            # A request that waits for room, or was preempted, is asked for again: that is no other lookup.
            held = self._held(hashes, counted=before is None)
        except adapters.Unknown as error:
            self._warn_once(f"requests run without the store: {error}")
            return 0, False
        except Exception:
            logger.exception("a lookup failed")
            return 0, False
        if self._announced is not None and held < len(hashes):
            self._announced.missing([bytes(each) for each in request.block_hashes[held * per : len(hashes) * per]])
        wishes = wishes_of(request, allow_pin=self._allow_pin)
        if wishes.complaint:
            self._warn_once(f"a request's wish for its blocks is left out: {wishes.complaint}")
        first = num_computed_tokens // self._block_size
        last = min(held * per, (request.num_tokens - 1) // self._block_size)
        if self._groups.windowed:
            last -= last % per
        # A failure of the whole request can be told only while it waits for the load.
        alone = self._groups.fails_whole or (last - first) * self._groups.block_nbytes > self._sync_nbytes
        tracked = _Tracked(
            request, salt, wishes, saved=held, first_load=first, alone=alone, blocks=self._groups.none_yet()
        )
        self._tracked[request.request_id] = tracked
        return max(0, last - first) * self._block_size, alone and last > first

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember which blocks the loaded tokens go to."""
        tracked = self._tracked.get(request.request_id)
        if not self._on or tracked is None or num_external_tokens <= 0:
            return
        ids, per = blocks.get_block_ids(), self._chunk_blocks
        at, last = tracked.first_load, tracked.first_load + num_external_tokens // self._block_size
        load = Load(request.request_id, [], tracked.alone)
        while at < last:
            end = min(last, (at // per + 1) * per)
            name = _salted(request, tracked.salt, (at // per + 1) * per - 1)
            load.chunks.append((name, at % per, tuple(list(own[at:end]) for own in ids)))
            at = end
        self._loads.append(load)
        if load.alone:
            tracked.loading = frozenset(load.blocks())

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads, and the chunks that it fills."""
        work = Work(root=self._root, loads=self._loads, ended=self._ended)
        self._loads, self._ended = [], []
        if not self._on:
            return work
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self._note(new.req_id, new.block_ids, fresh=True)
            work.saves += self._filled(new.req_id, new.num_computed_tokens, scheduled.get(new.req_id, 0))
            alone = len(scheduled) == 1 and not new.num_computed_tokens
            work.prefill = int(scheduled.get(new.req_id, 0)) if alone else 0
        old = scheduler_output.scheduled_cached_reqs
        for i, name in enumerate(old.req_ids):
            self._note(name, old.new_block_ids[i], fresh=name in old.resumed_req_ids)
            work.saves += self._filled(name, old.num_computed_tokens[i], scheduled.get(name, 0))
        return work

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have put since the last step, and which loads have failed: those requests are computed.

        What the store still holds and cannot give would else be waited for again and again.
        """
        failed = set(getattr(connector_output, "failed_recving", None) or ())
        invalid = getattr(connector_output, "invalid_block_ids", None)
        if invalid:  # of a running request vLLM computes these blocks at once, and does not ask again
            failed.update(name for name, each in self._tracked.items() if not each.loading.isdisjoint(invalid))
        for name in failed:
            if name in self._tracked:
                self._tracked[name].lost, self._tracked[name].saved = True, 0
        for name in getattr(connector_output, "finished_recving", None) or ():
            if name in self._tracked:
                self._tracked[name].loading = frozenset()
        events = getattr(connector_output, "kv_cache_events", None)
        if self._announced is not None and events is not None:
            self._announced.reported(events.get_all_events())

    def take_events(self) -> Any:
        """`BlockStored` and `BlockRemoved` since the last call, for routers; see `vllm_events`."""
        return () if self._announced is None else self._announced.take()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed at once: what is being put was copied."""
        del block_ids
        self._ahead.asked(request.request_id)
        if self._tracked.pop(request.request_id, None) is not None:
            self._ended.append(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished."""
        del block_ids
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        """Make all blocks kept so far misses for this engine: its weights may have changed, and it does not say how."""
        self._root = hashlib.sha256(self._root + secrets.token_bytes(32)).digest()
        if self._announced is not None:
            self._announced.reset()
        return True

    def _warn_once(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < _WARNINGS_MAX:
            self._warned.add(text)
            logger.warning(text)

    def _hashes(self, request: Any, salt: bytes) -> list[bytes]:
        """Of its chunks."""
        per = self._chunk_blocks
        return [_salted(request, salt, at) for at in range(per - 1, len(request.block_hashes), per)]

    def _keys_of(self, request: Any) -> list[bytes]:
        """Of its chunks' shards. Raises Unknown. Any thread."""
        return self._shard_keys(self._hashes(request, adapters.salt_of(request)))

    def _shard_keys(self, hashes: Sequence[bytes]) -> list[bytes]:
        return [self._key(each, shard) for each in hashes for shard in range(self._shards.count)]

    def _held(self, hashes: Sequence[bytes], *, counted: bool) -> int:
        """Leading chunks of which every shard is held. One question for all shards."""
        if not hashes:
            return 0
        shards, tokens = self._shards.count, self._chunk_blocks * self._block_size
        keys = self._shard_keys(hashes)
        lookup = Lookup(len(keys), len(hashes) * tokens, tokens // shards) if counted else ELSEWHERE
        return int(self._guard.match(keys, lookup=lookup)) // shards

    def _note(self, name: str, block_ids: Any, *, fresh: bool) -> None:
        tracked = self._tracked.get(name)
        if tracked is None or block_ids is None:
            return
        if fresh:  # also of a request that comes back after a preemption
            tracked.blocks = self._groups.none_yet()
        for own, more in zip(tracked.blocks, block_ids, strict=True):
            own.extend(more)

    def _filled(self, name: str, computed: int, scheduled: int) -> list[Save]:
        """Chunks that are full after this step and were not saved before: none, or one chain of them."""
        tracked = self._tracked.get(name)
        if tracked is None or not tracked.wishes.store:
            return []
        request, per, tokens = tracked.request, self._chunk_blocks, computed + scheduled
        if self._prompt_only:
            tokens = min(tokens, getattr(request, "num_prompt_tokens", request.num_tokens))
        blocks = min(map(len, tracked.blocks))
        full = min(tokens // self._block_size, len(request.block_hashes), blocks) // per
        if full <= tracked.saved:
            return []
        before = _salted(request, tracked.salt, tracked.saved * per - 1) if tracked.saved else None
        chunks = []
        for at in range(tracked.saved, full):
            places = self._groups.places(tracked.blocks, at * per, at * per + per, computed, self._block_size)
            if places is None:  # found on this engine, computed long ago, and not held: what continues it is not either
                tracked.wishes = replace(tracked.wishes, store=False)
                full = at
                break
            chunks.append((_salted(request, tracked.salt, at * per + per - 1), places))
        if not chunks:
            return []
        save = Save(name, before, chunks, tracked.wishes.options)
        if self._announced is not None:
            save.told = [_facts(request, at * per, per, self._block_size) for at in range(tracked.saved, full)]
        tracked.saved = full
        return [save]

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The paged buffers: block is their first dimension."""
        self._buffers = GroupedBuffers(kv_caches, self._groups)
        self._filling = Filling(self._guard, self._buffers, self._chunk_blocks)
        self._saving.over(self._buffers, self._chunk_nbytes())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill this step's blocks, or begin to; those that are gone are reported as load errors."""
        del forward_context, kwargs
        work = self._work()
        for request_id in work.ended:
            self._saving.ended(request_id)
        for load in work.loads:
            if load.alone:
                self._loading.begin(load)
            else:
                self._loading.run(load)
        self._loaded_at = self._time.clock()

    def _work(self) -> Work:
        work = self._get_connector_metadata()
        found = work if isinstance(work, Work) else Work()
        self._root = found.root or self._root
        return found

    def _load(self, load: Load) -> list[int]:
        """The blocks that could not be filled."""
        began, failed, mine = self._time.clock(), list[int](), self._shards.mine
        at_once = GPU_CALL_NBYTES if self._buffers.on_gpu else CALL_NBYTES
        for some in pieces(load.chunks, self._chunk_nbytes(), at_once):
            filled = self._filling.filled([(self._key(name, mine), first, places) for name, first, places in some])
            failed += [block for (_, _, places), ok in zip(some, filled, strict=True) if not ok for block in places[0]]
        tokens = (len(load.blocks()) - len(failed)) * self._block_size
        if tokens and not self._shards.mine and self._shards.writes:  # the ranks compute side by side
            self._guard.report(prefill_saved_s=self._time.restored(1, tokens, tokens, self._time.clock() - began))
        return failed

    def _chunk_nbytes(self) -> int:
        return max(1, self._buffers.block_nbytes() * self._chunk_blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Chunks are saved whole, after the forward."""

    def wait_for_save(self) -> None:
        """Copy the chunks that this step filled; they are put on another thread."""
        work = self._work()
        if not self._shards.writes:
            return
        try:
            mine = self._shards.mine
            self._saving.keep(work, lambda found: self._key(found, mine), self._loaded_at)
        except Exception:
            logger.exception("what a step has filled was not kept")

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads beside the steps have ended."""
        del finished_req_ids
        return None, self._loading.take_done() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """The same, and which of them have failed where that cannot be told by blocks."""
        found = super().get_transfer_results(finished_req_ids)
        if self._groups.fails_whole:
            found.failed_recving = self._loading.take_failed_requests()
        return found

    def get_kv_connector_kv_cache_events(self) -> Any:
        """What this worker has put since the last step; None: nothing."""
        return None if self._reported is None else self._reported.take()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be filled since the last call; none where requests are told instead."""
        failed = self._loading.take_failed()
        return set() if self._groups.fails_whole else failed

    def shutdown(self) -> None:
        """Finish what is waiting."""
        self._ahead.close()
        self._loading.close()
        self._guard.flush()

    def _key(self, found: bytes, shard: int) -> bytes:
        return hashlib.sha256(self._root + shard.to_bytes(4, "little") + found).digest()


def _salted(request: Any, salt: bytes, at: int) -> bytes:
    """The hash of a request's block, and with it of all before: with what the engine's hashes do not cover."""
    found = bytes(request.block_hashes[at])
    return hashlib.sha256(salt + found).digest() if salt else found


def _facts(request: Any, first: int, count: int, size: int) -> list[tuple[bytes, Any]]:
    """What routers are told of blocks, under the hashes that the engine publishes: they know no salt of ours."""
    from kvstored_client.integrations.vllm_events import Block

    bare = [bytes(each) for each in request.block_hashes[max(0, first - 1) : first + count]]
    before: list[bytes | None] = [None, *bare] if not first else [*bare]
    tokens = getattr(request, "all_token_ids", ())
    lora = getattr(getattr(request, "lora_request", None), "lora_name", None)
    return [
        (found, Block(parent, tuple(tokens[(first + i) * size : (first + i + 1) * size]), lora))
        for i, (parent, found) in enumerate(zip(before, bare[-count:], strict=False))
    ]


def _namespace(vllm_config: Any) -> str:
    """What an operator reads beside the entries: the model's name, its end if it is too long."""
    name = str(getattr(getattr(vllm_config, "model_config", None), "model", ""))
    name = name.encode()[-NAMESPACE_MAX_NBYTES:].decode(errors="ignore")
    return name if name.isprintable() else ""


def _chunk_blocks(vllm_config: Any, extra: dict[str, Any], block_tokens: int) -> int:
    on_a_cpu = getattr(getattr(vllm_config, "device_config", None), "device_type", "") == "cpu"
    tokens = int(extra.get("chunk_tokens", block_tokens if on_a_cpu else CHUNK_TOKENS))
    return max(1, tokens // block_tokens)


def _wants_events(vllm_config: Any) -> bool:
    return bool(getattr(getattr(vllm_config, "kv_events_config", None), "enable_kv_cache_events", False))
