"""What other hosts have put: a store outside (Valkey, Redis, S3) that several daemons read and write.

A source beside the tiers, not a tier: a chunk is published when it is put, and asked for where the tiers end. What only
the shared store has gets no Meta. Bytes in, bytes out: nothing here knows a tensor.

Thread rule: an engine may be called from any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from kvstore.errors import SharedUnavailable

__all__ = ["HEAD_NBYTES", "AsksAndClaims", "Buffer", "Engine", "Health", "SharedUnavailable"]

HEAD_NBYTES = 96
"""What a lookup reads of an object: its head (`shared.objects`), authenticated, so that one round trip proves presence,
version, key, size and time to live."""

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Health:
    """What an engine tells of its servers. nbytes and nbytes_max are -1 where it does not say."""

    nodes: int
    nodes_up: int
    round_trip_s: float
    nbytes: int = -1
    nbytes_max: int = -1
    evicted: int = -1
    complaints: list[str] = field(default_factory=list)
    """Settings under which it would lose, block or refuse: a sentence each, with the value and what it should be."""


class Engine(Protocol):
    """Objects by name on servers that other hosts use too: `valkey` (standalone and Cluster) and `s3`.

    A name is at most 200 printable ASCII bytes without spaces. An object is whole or not there: one whose pieces do not
    all arrive is None. What is None may be there all the same (a replica that lags, a node that is down): it is a miss,
    never a reason to delete. No call lasts longer than its timeout_s plus 20 ms, whatever the servers do; what had
    arrived by then is returned. A call that reached no node at all raises SharedUnavailable, and nothing else.
    """

    def heads(self, names: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """The first HEAD_NBYTES of each object, None where there is none. One round trip a node."""

    def get(self, names: Sequence[str], nbytes: Sequence[int], timeout_s: float) -> list[bytearray | None]:
        """Each object whole, of the size that its head tells. One round trip a node for what is up to a piece long."""

    def put(
        self, objects: Sequence[tuple[str, Sequence[Buffer]]], ttl_s: float, timeout_s: float, *, replace: bool = False
    ) -> list[bool]:
        """Store each object, its buffers one after another, for at least ttl_s; whether it is stored now.

        What is there already stays and counts as stored, unless `replace`.
        """

    def claim(self, names: Sequence[str], ttl_s: float, timeout_s: float) -> list[bool]:
        """Whether each name is now this caller's to upload: True to one caller within ttl_s.

        So two hosts do not send the same bytes. An engine without an atomic, cheap claim answers True.
        """

    def delete(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """Make each name absent; whether the server has acknowledged it. A name that is not there is acknowledged."""

    def health(self, timeout_s: float) -> Health:
        """What the servers tell of themselves."""

    def close(self) -> None:
        """Let go of connections and threads. Idempotent; a call in progress ends with SharedUnavailable."""


@runtime_checkable
class AsksAndClaims(Protocol):
    """What an engine may have in addition: presence and claim in one round trip, so that publishing takes two."""

    def heads_or_claims(self, names: Sequence[str], claim_s: float, timeout_s: float) -> list[bytes | bool | None]:
        """As `heads` and `claim` of each name, asked together. Where there is an object, its first HEAD_NBYTES.

        Else whether the name is now this caller's to upload, within claim_s. None: its server does not answer, or takes
        nothing now.
        """
