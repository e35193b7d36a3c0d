"""Paged buffers filled from the cache: chunks are leased, and their blocks written right out of the store's memory.

What lies encoded crosses the bus to a GPU as it is held, in one batch of copies, and is decoded there. A chunk that is
gone, of another shape, or used again while it was read fills nothing that counts: its answer is False. Any thread.
Imports no engine.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kvstore.errors import KvstoreError
from kvstore.hit import Hit
from kvstore.lookup import ELSEWHERE
from kvstore.packed import PackedTensor, specs_of
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_groups import Places

logger = logging.getLogger(__name__)
T = TypeVar("T")

CALL_NBYTES = 64 << 20
"""About the bytes of one get or put: a call has a deadline."""
GPU_CALL_NBYTES = 256 << 20
"""Of a get into a GPU's memory: 70 MiB in four bits lie beside the engine's until one launch has decoded them."""


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
                if how:
                    filled = self._filled_there(found, some)
                else:
                    for at, (hit, (_, first, places)) in enumerate(zip(found, some, strict=True)):
                        filled[at] = hit is not None and self._buffers.fill(
                            places, hit.tensors, self._chunk_blocks, first
                        )
                    hit = None
                self._say_lossy(found)
                self._buffers.settle()  # before the lease ends: chunks in the GPU's memory are read by its stream
                del hits, found
        except KvstoreError as error:  # a block was used again while it was read
            logger.debug("a lease failed: %s", error)
            return [False] * len(some)
        return filled

    def _filled_there(self, hits: Sequence[Hit | None], some: Sequence[tuple[bytes, int, Places]]) -> list[bool]:
        """The same on the engine's GPU: one batch of copies over the bus, and one launch for what is held encoded.

        What lies in the GPU's memory already is read there. Raises RecordCorrupt.
        """
        wanted, of = self._buffers.specs(self._chunk_blocks), self._chunk_blocks
        filled = [False] * len(some)
        pairs: list[tuple[Any, Any]] = []
        dense: dict[int, Mapping[str, Any]] = {}
        for at, (hit, (_, first, places)) in enumerate(zip(hits, some, strict=True)):
            if hit is None or specs_of(hit.tensors) != wanted:
                continue
            if all(getattr(x, "is_cuda", False) for x in hit.tensors.values()):
                filled[at] = self._buffers.fill(places, hit.tensors, of, first)
                continue
            paged = self._buffers.paged(places, of, first)
            if wanted.keys() == paged.keys() and all(isinstance(x, PackedTensor) for x in hit.tensors.values()):
                pairs += [(paged[name], x) for name, x in hit.tensors.items()]
                filled[at] = True
                continue
            dense[at] = hit.tensors
            if (len(dense) + 1) * of * self._buffers.block_nbytes() > CALL_NBYTES:
                self._fill_densely(dense, some, filled, [])
        self._fill_densely(dense, some, filled, pairs)
        return filled

    def _fill_densely(
        self,
        dense: dict[int, Mapping[str, Any]],
        some: Sequence[tuple[bytes, int, Places]],
        filled: list[bool],
        pairs: list[tuple[Any, Any]],
    ) -> None:
        """Bring chunks to the GPU as they are, beside the engine's memory, and write their blocks; and fill `pairs`."""
        rooms = {at: self._buffers.empty(self._chunk_blocks) for at in dense}
        pairs = pairs + [(x, dense[at][name]) for at, room in rooms.items() for name, x in room.items()]
        if pairs:
            self._guard.fill(pairs)
        for at, room in rooms.items():
            _, first, places = some[at]
            filled[at] = self._buffers.fill(places, room, self._chunk_blocks, first)
        dense.clear()

    def _say_lossy(self, hits: Sequence[Hit | None]) -> None:
        """The receipt of what came back in fewer bits: a line whenever it is worse than any before."""
        for hit in hits:
            if hit is not None and hit.lossy and hit.relative_error > self._worst:
                self._worst = hit.relative_error
                logger.info("chunks come back in %s: relative error %.3f at most so far", hit.encoding, self._worst)


def pieces(items: Sequence[T], nbytes: int, call_nbytes: int = CALL_NBYTES) -> Iterator[Sequence[T]]:
    """About `call_nbytes` at once, of items of so many bytes."""
    count = max(1, call_nbytes // nbytes)
    return (items[start : start + count] for start in range(0, len(items), count))
