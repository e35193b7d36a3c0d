"""Paged buffers filled from the cache: chunks are leased, and their blocks written right out of the store's memory.

What lies encoded crosses the bus to a GPU as it is held, in one batch of copies, and is decoded there. A chunk that is
gone, of another shape, or used again while it was read fills nothing that counts: its answer is False. Any thread.
Imports no engine.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from kvstore.errors import KvstoreError
from kvstore.hit import Hit
from kvstore.lookup import ELSEWHERE
from kvstore.packed import specs_of
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_groups import Places

logger = logging.getLogger(__name__)
T = TypeVar("T")

CALL_NBYTES = 64 << 20
"""About the bytes of one get or put: a call has a deadline."""


class Filling:
    """Of one worker's buffers. chunk_blocks: blocks of a chunk."""

    def __init__(self, guard: Guard, buffers: GroupedBuffers, chunk_blocks: int) -> None:
        self._guard = guard
        self._buffers = buffers
        self._chunk_blocks = chunk_blocks
        self._worst = 0.0
        """The largest relative error of what came back."""

    def filled(self, some: Sequence[tuple[bytes, int, Places]]) -> list[bool]:
        """Whether each chunk was filled: of its key, the first of its blocks that is wanted, and their places."""
        filled = [False] * len(some)
        try:
            # In four bits over the bus, where the engine's own GPU decodes them; or not over the bus at all.
            how = self._guard.how_to_lease([self._buffers.empty(0)]) if self._buffers.on_gpu else {}
            with self._guard.lease_many([key for key, _, _ in some], lookup=ELSEWHERE, **how) as hits:
                found = [hits[at] for at in range(len(some))]
                tensors = self._decoded(found) if how else [None if hit is None else hit.tensors for hit in found]
                for at, ((_, first, places), chunk) in enumerate(zip(some, tensors, strict=True)):
                    filled[at] = chunk is not None and self._buffers.fill(places, chunk, self._chunk_blocks, first)
                self._say_lossy(found)
                self._buffers.settle()  # before the lease ends: chunks in the GPU's memory are read by its stream
                del hits, found, tensors
                chunk = None
        except KvstoreError as error:  # a block was used again while it was read
            logger.debug("a lease failed: %s", error)
            return [False] * len(some)
        return filled

    def _decoded(self, hits: Sequence[Hit | None]) -> list[dict[str, torch.Tensor] | None]:
        """The tensors of chunks on the engine's GPU: what is held encoded crossed the bus so. One batch of copies."""
        chunks: list[dict[str, torch.Tensor] | None] = []
        pairs: list[tuple[Any, Any]] = []
        for hit in hits:
            room = self._buffers.empty(self._chunk_blocks)
            if hit is None or specs_of(hit.tensors) != specs_of(room):
                chunks.append(None)
                continue
            if all(getattr(x, "is_cuda", False) for x in hit.tensors.values()):
                chunks.append(dict(hit.tensors))
                continue
            pairs += [(x, hit.tensors[name]) for name, x in room.items()]
            chunks.append(room)
        if pairs:
            self._guard.fill(pairs)
        return chunks

    def _say_lossy(self, hits: Sequence[Hit | None]) -> None:
        """The receipt of what came back in fewer bits: a line whenever it is worse than any before."""
        for hit in hits:
            if hit is not None and hit.lossy and hit.relative_error > self._worst:
                self._worst = hit.relative_error
                logger.info("chunks come back in %s: relative error %.3f at most so far", hit.encoding, self._worst)


def pieces(items: Sequence[T], nbytes: int) -> Iterator[Sequence[T]]:
    """About CALL_NBYTES at once, of items of so many bytes."""
    count = max(1, CALL_NBYTES // nbytes)
    return (items[start : start + count] for start in range(0, len(items), count))
