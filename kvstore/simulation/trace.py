"""Request traces: the blocks of each request's prompt, and replaying them against a cache.

Reads the JSON lines of Mooncake's traces, plain or .xz: {"timestamp": ms, "hash_ids": [...], ...}. A hash id names a
block of tokens and all blocks before it, so a request's ids are a chain, root first. Knows no tensors.
"""

import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvstore.errors import InvalidEntry
from kvstore.hit import Hit
from kvstore.keys import KEYS_PER_CALL_MAX

TRACE_KEY_NBYTES = 32
BLOCK_TOKENS = 512
"""Tokens of a block in Mooncake's traces."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. at_s: seconds since the trace began."""

    at_s: float
    blocks: tuple[int, ...]


def read_trace(path: str | Path, limit: int | None = None) -> list[Request]:
    """The requests of a trace in order of time, at most `limit`. Raises InvalidEntry, which names the line."""
    opened = lzma.open if str(path).endswith(".xz") else open
    requests: list[Request] = []
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(requests) >= limit:
                break
            if line.strip():
                requests.append(_request(line, f"{path}:{number}"))
    return requests


def _request(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
        blocks = tuple(int(block) for block in row["hash_ids"])
        at_s = float(row["timestamp"]) / 1000
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InvalidEntry(f"{where}: not a request with timestamp and hash_ids: {error!r:.80}") from None
    if any(not 0 <= block < 1 << 62 for block in blocks) or len(set(blocks)) < len(blocks):
        raise InvalidEntry(f"{where}: hash_ids must be different numbers in 0..2**62")
    return Request(at_s, blocks[:KEYS_PER_CALL_MAX])


def block_key(block: int, salt: bytes = b"trace") -> bytes:
    """A key of 32 bytes for a block, as long as a chunk's."""
    return salt[:16].ljust(16, b"\0") + block.to_bytes(16, "big")


class Cache(Protocol):
    """The verbs a replay needs."""

    def get_many(self, keys: Sequence[bytes], *, leading: bool = False) -> list[Hit | None]:
        """Values of a chain."""
        ...

    def put_many(
        self, entries: Sequence[tuple[bytes, Mapping[str, Any]]], *, chain: bool = False, parent: bytes | None = None
    ) -> int:
        """Put a chain."""
        ...


@dataclass(slots=True)
class Replayed:
    """Counts so far. wrong: hits whose value was not the one put."""

    requests: int = 0
    blocks: int = 0
    hits: int = 0
    puts: int = 0
    wrong: int = 0


def replay(
    cache: Cache,
    requests: Iterable[Request],
    value_of: Callable[[int], Mapping[str, Any]],
    *,
    before: Callable[[Request], object] = lambda _: None,
    check: Callable[[int, Hit], bool] = lambda _block, _hit: True,
) -> Iterator[Replayed]:
    """Use a cache as a serving engine would: get the longest prefix, then put the rest. Yields after each request.

    before: called with each request before it is sent, to move a clock or to wait. check: compare each hit with the
    value that was put.
    """
    done = Replayed()
    for request in requests:
        before(request)
        keys = [block_key(block) for block in request.blocks]
        hits = [hit for hit in cache.get_many(keys, leading=True) if hit is not None] if keys else []
        done.wrong += sum(not check(block, hit) for block, hit in zip(request.blocks, hits, strict=False))
        rest = [(keys[i], value_of(request.blocks[i])) for i in range(len(hits), len(keys))]
        if rest:
            done.puts += cache.put_many(rest, chain=True, parent=keys[len(hits) - 1] if hits else None)
        done.requests += 1
        done.blocks += len(keys)
        done.hits += len(hits)
        yield done
