"""The chunks that a vLLM worker's steps fill: copied before their blocks are used anew, and put on another thread.

Buffers on a GPU are copied within it, on the engine's own stream: the step waits for nothing. The writer waits until
that stream has come to the copies, and then puts them right out of the GPU's memory, in one batch over the bus. What
waits there is bounded (`ON_GPU_MAX_NBYTES`); the rest goes to the host at once, for which the step waits. A request
whose chunk was not kept keeps none that follows: without the ones before it could never be found.
All but the puts is called by the forward's thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.errors import KvstoreError
from kvstore.hit import Fidelity
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.prefill_time import PrefillTime
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_encoding import Encoding
from kvstored_client.integrations.vllm_filling import pieces
from kvstored_client.integrations.vllm_groups import Groups, Places
from kvstored_client.integrations.vllm_work import Save, Work

ON_GPU_MAX_NBYTES = 256 << 20
"""Copies on the GPU that wait for the bus, beside what the engine has planned for: 10 ms of the bus."""
_BROKEN_MAX = 10_000
"""Requests remembered whose chain is broken; they are forgotten when they end."""

Gathered = list[list[torch.Tensor]]
"""A chunk's blocks, as `GroupedBuffers.gather` gives them."""


@dataclass
class _Put:
    """Chunks to put: `copied` by key, which continue `before`. facts: what routers are told.

    computed: waits until the copies are there; None: they are. seen: notes when the forward has ended.
    """

    save: Save
    copied: list[tuple[bytes, Gathered]]
    before: bytes | None
    facts: list[Any]
    computed: Callable[[], None] | None
    seen: Callable[[], None]

    @property
    def on_gpu(self) -> int:
        """Chunks that wait on a GPU."""
        return sum(x.is_cuda for _, gathered in self.copied for x in gathered[0][:1])


class Saving:
    """Of one worker. reported: who tells routers what was stored; encoding: encodes chunks on a GPU; None: nobody."""

    def __init__(
        self,
        guard: Guard,
        time: PrefillTime,
        fidelity: Fidelity,
        namespace: str,
        reported: Any,
        encoding: Encoding | None = None,
    ) -> None:
        self._guard = guard
        self._encoding = encoding
        self._time = time
        self._fidelity: Fidelity = fidelity
        self._namespace = namespace
        self._reported = reported
        self._broken: OrderedDict[str, None] = OrderedDict()
        self._on_gpu = [0, 0]
        """Chunks begun, by the forward's thread, and done, by the writer's."""
        self.over(GroupedBuffers({}, Groups()), 1)

    def over(self, buffers: GroupedBuffers, chunk_nbytes: int) -> None:
        """What is kept lies in these buffers."""
        self._buffers = buffers
        self._chunk_nbytes = chunk_nbytes

    def ended(self, request_id: str) -> None:
        """A request is over."""
        self._broken.pop(request_id, None)

    def keep(self, work: Work, key: Callable[[bytes], bytes], began_s: float) -> None:
        """Copy the chunks that a step filled, and have them put. began_s: when its forward began."""
        for save in work.saves:
            before = None if save.before is None else key(save.before)
            told = save.told or [[] for _ in save.chunks]
            for some in pieces(list(zip(save.chunks, told, strict=True)), self._chunk_nbytes):
                if save.request_id in self._broken:
                    break
                copied = [(key(found), self._copied(places)) for (found, places), _ in some]
                computed = self._guard.before(_named(gathered) for _, gathered in copied)
                seen = self._prefill(work, began_s)
                if computed is None:  # the copies have waited for the device, so the forward pass has ended
                    seen()
                facts = [fact for _, each in some for fact in each]
                self._put_later(_Put(save, copied, before, facts, computed, seen))
                before = copied[-1][0]

    def _copied(self, places: Places) -> Gathered:
        gathered = self._buffers.gather(places)
        if not self._buffers.on_gpu:
            return gathered
        begun, done = self._on_gpu
        if (begun - done + 1) * self._chunk_nbytes > ON_GPU_MAX_NBYTES:
            return [[x.cpu() for x in own] for own in gathered]
        self._on_gpu[0] += 1
        return gathered

    def _prefill(self, work: Work, began_s: float) -> Callable[[], None]:
        """What notes, once, how long a step took that was one whole prefill; called when it has ended."""
        tokens, work.prefill = work.prefill, 0

        def seen() -> None:
            if tokens:
                self._time.observe(1, tokens, self._time.clock() - began_s)

        return seen

    def _put_later(self, put: _Put) -> None:
        on_gpu = put.on_gpu

        def now() -> None:
            stored = False
            try:
                stored = self._put(put)
            finally:
                put.copied.clear()
                self._on_gpu[1] += on_gpu
                if not stored:
                    self._break(put.save.request_id)

        if not self._guard.later(now, self._chunk_nbytes * len(put.copied)):
            self._on_gpu[0] -= on_gpu
            self._break(put.save.request_id)

    def _put(self, put: _Put) -> bool:
        """Whether all of it was stored."""
        if put.save.request_id in self._broken:
            return False
        if put.computed is not None:
            put.computed()
            put.seen()
        entries = [(key, self._buffers.entry(gathered)) for key, gathered in put.copied]
        if not (self._put_encoded(put, entries) or self._stored(put, entries)):
            return False
        for fact in put.facts if self._reported is not None else ():
            self._reported.stored(*fact)
        return True

    def _stored(self, put: _Put, entries: Sequence[tuple[bytes, Mapping[str, Any]]]) -> bool:
        stored: int = self._guard.cache.put_many(
            entries, chain=True, parent=put.before, fidelity=self._fidelity, namespace=self._namespace,
            **put.save.options,
        )  # fmt: skip
        return stored >= len(entries)

    def _put_encoded(self, put: _Put, entries: Sequence[tuple[bytes, Mapping[str, Any]]]) -> bool:
        """Whether all of it was stored in four bits. Where not, it is put as it is: what was stored is replaced."""
        encoding = self._encoding
        packed = None if encoding is None else encoding.packed(entries, starts=put.before is None)
        if encoding is None or packed is None:
            return False
        try:
            stored = self._stored(put, packed)
        except KvstoreError as error:  # an older daemon, or one without a tier below hot
            encoding.failed(str(error))
            return False
        if stored:
            encoding.taken()
        else:
            encoding.failed("the daemon did not take them")
        return stored

    def _break(self, request_id: str) -> None:
        """A chunk of it was not kept, so none that follows is."""
        self._broken[request_id] = None
        if len(self._broken) > _BROKEN_MAX:
            with suppress(KeyError):  # two threads
                self._broken.popitem(last=False)


def _named(gathered: Gathered) -> Mapping[str, torch.Tensor]:
    return {f"{at}.{i}": x for at, own in enumerate(gathered) for i, x in enumerate(own)}
