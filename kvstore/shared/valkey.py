"""Valkey and Redis as an engine, standalone and Cluster in one code. Long values: `long_values`.

It keeps its own deadlines and a breaker for each server; `guarded` adds a thread, so that not even a name server can
hold a caller. Any thread.
"""

import math
import time
from collections.abc import Callable, Sequence

import redis

from kvstore.clock import Clock
from kvstore.errors import KvstoreError
from kvstore.shared import HEAD_NBYTES, Buffer, Health, SharedUnavailable, server_health
from kvstore.shared.addresses import Address
from kvstore.shared.discovery import TlsFiles, Unfit, asking, learn
from kvstore.shared.exchange import Call, is_unanswered
from kvstore.shared.keeper import Keeper
from kvstore.shared.link import Denied, Login, Op
from kvstore.shared.long_values import (  # fmt: skip
    UNIT_NBYTES,
    Upload,
    Whole,
    cut,
    get_op,
    head_op,
    may_be_long,
    other_gets,
    set_op,
    unlink_rounds,
)
from kvstore.shared.names import PREFIX
from kvstore.shared.nodes import Nodes, Topology
from kvstore.shared.resp import Refusal, command

PIECE_NBYTES = 2 << 20
LEARN_TIMEOUT_S = 0.5
"""Of each step of learning the topology from one server."""
CLAIM_PREFIX = f"{PREFIX}w:"


class Valkey:
    """An `Engine`. seeds: some of the servers. It connects when it is first used.

    piece_nbytes: of a long value; rounded down to a multiple of 64 KiB.
    """

    def __init__(
        self,
        seeds: Sequence[Address],
        login: Login,
        clock: Clock,
        *,
        tls: TlsFiles | None = None,
        piece_nbytes: int = PIECE_NBYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tls = tls or TlsFiles()
        self._piece_nbytes = max(UNIT_NBYTES, piece_nbytes - piece_nbytes % UNIT_NBYTES)
        self._monotonic = monotonic
        self._clock = clock
        self._closed = False
        self.nodes = Nodes(seeds, login, clock)
        self.keeper = Keeper(self.nodes, self._learn, monotonic)

    def heads(self, names: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """See `Engine`."""
        ops = [head_op(name) for name in _encoded(names)]
        if ops:
            _run(self._call(timeout_s), ops)
        return [op.reply if isinstance(op.reply, bytes) and op.reply else None for op in ops]

    def get(self, names: Sequence[str], nbytes: Sequence[int], timeout_s: float) -> list[bytearray | None]:
        """See `Engine`."""
        ops: list[Op] = []
        wholes: list[Whole | None] = []
        for name, size in zip(_encoded(names), nbytes, strict=True):
            whole = Whole(size) if size > UNIT_NBYTES else None  # longer ones may be in pieces
            low = size if whole is None else min(size, HEAD_NBYTES)
            ops.append(get_op(name, low, size, whole, min(size, self._piece_nbytes)))
            wholes.append(whole)
        if not ops:
            return []
        call = self._call(timeout_s, spins=True)
        _run(call, ops)
        others = [[] if of is None else other_gets(op, of.value) for op, of in zip(ops, wholes, strict=True)]
        more = [op for pieces in others for op in pieces or ()]
        if more:
            call.run(more)
        return [
            _body(op) if whole is None else _joined(whole, pieces)
            for op, whole, pieces in zip(ops, wholes, others, strict=True)
        ]

    def put(
        self, objects: Sequence[tuple[str, Sequence[Buffer]]], ttl_s: float, timeout_s: float, *, replace: bool = False
    ) -> list[bool]:
        """See `Engine`."""
        ttl = ("EX", max(1, math.ceil(ttl_s)))
        ops: list[Op] = []
        uploads: dict[int, Upload] = {}
        for at, (name, (_, buffers)) in enumerate(zip(_encoded([name for name, _ in objects]), objects, strict=True)):
            pieces = cut(buffers, self._piece_nbytes)
            if len(pieces) > 1:
                uploads[at] = Upload(name, pieces)
                ops.append(uploads[at].first(ttl))
            else:
                ops.append(set_op(name, pieces[0], ttl if replace else ("NX", *ttl)))
        if not ops:
            return []
        call = self._call(timeout_s)
        there = _find_whole(call, uploads) if uploads and not replace else set()
        sent = {at: upload for at, upload in uploads.items() if at not in there}
        call.run([op for upload in sent.values() for op in upload.send_others(ttl)])
        left_out = there | {at for at, upload in sent.items() if not upload.is_sent()}
        now = [op for at, op in enumerate(ops) if at not in left_out]
        _run(call, now)
        stored = {id(op) for op in now if op.reply == b"OK" or op.reply is None}
        return [at in there or id(op) in stored for at, op in enumerate(ops)]

    def claim(self, names: Sequence[str], ttl_s: float, timeout_s: float) -> list[bool]:
        """See `Engine`."""
        ops = [_claim_op(name, ttl_s) for name in names]
        if ops:
            _run(self._call(timeout_s), ops)
        return [op.reply == b"OK" for op in ops]

    def heads_or_claims(self, names: Sequence[str], claim_s: float, timeout_s: float) -> list[bytes | bool | None]:
        """See `AsksAndClaims`. What is there is claimed too, for nothing: asking first would be another round trip."""
        heads = [head_op(name) for name in _encoded(names)]
        claims = [_claim_op(name, claim_s) for name in names]
        if heads:
            _run(self._call(timeout_s), [op for pair in zip(heads, claims, strict=True) for op in pair])
        return [_found_or_claimed(head, claim) for head, claim in zip(heads, claims, strict=True)]

    def delete(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """See `Engine`. The other pieces of long values are removed as far as they are found."""
        heads = [head_op(name) for name in _encoded(names)]
        lengths = [Op(head.name, command("STRLEN", head.name), b":") for head in heads]
        ops = [Op(head.name, command("UNLINK", head.name), b":", writes=True) for head in heads]
        if not ops:
            return []
        call = self._call(timeout_s)
        _run(call, [op for trio in zip(heads, lengths, ops, strict=True) for op in trio])
        rounds = [
            unlink_rounds(head.name, head.reply)
            for head, length in zip(heads, lengths, strict=True)
            if isinstance(head.reply, bytes) and isinstance(length.reply, int) and may_be_long(length.reply)
        ]
        while rounds:
            asked = [(more, next(more, [])) for more in rounds]
            call.run([op for _, pieces in asked for op in pieces])
            rounds = [more for more, pieces in asked if pieces and all(op.reply == 1 for op in pieces)]
        return [isinstance(op.reply, int) for op in ops]

    def health(self, timeout_s: float) -> Health:
        """See `Engine`. Asks the servers in turn, by redis-py."""
        deadline = self._monotonic() + timeout_s
        self._call(timeout_s)
        return server_health.of_servers(
            self.nodes,
            self._tls,
            lambda: deadline - self._monotonic(),
            self._clock.now,
            piece_nbytes=self._piece_nbytes,
        )

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self.keeper.close()
        self.nodes.close()

    def _call(self, timeout_s: float, *, spins: bool = False) -> Call:
        """spins: somebody waits for it. Raises SharedUnavailable where nothing is known of the servers yet."""
        if self._closed:
            raise SharedUnavailable("closed", "the shared store is closed")
        call = Call(self.nodes, self.keeper.wake, timeout_s, self._monotonic, spins=spins)
        if not self.keeper.wait_for_topology(timeout_s):
            raise SharedUnavailable(self.keeper.reason, f"the shared store: {self.keeper.sentence}")
        return call

    def _learn(self, address: Address) -> Topology:
        try:
            with asking(address, self.nodes.login, self._tls, LEARN_TIMEOUT_S) as client:
                return learn(client, address)
        except redis.TimeoutError as error:
            raise TimeoutError(str(error)) from None
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise Denied(str(error)) from None
        except (redis.RedisError, Unfit, ValueError, TypeError, LookupError) as error:
            raise KvstoreError(str(error) or type(error).__name__) from None


def _claim_op(name: str, ttl_s: float) -> Op:
    """In the braces the object's name: the same slot, so who answers for one answers for the other."""
    claim = f"{CLAIM_PREFIX}{{{name}}}"
    return set_op(claim.encode("ascii"), [b"1"], ("NX", "PX", max(1, math.ceil(1000 * ttl_s))))


def _encoded(names: Sequence[str]) -> list[bytes]:
    return [name.encode("ascii") for name in names]


def _run(call: Call, ops: Sequence[Op]) -> None:
    """Have ops answered. Raises SharedUnavailable where none was, and where all were refused."""
    call.run(ops)
    refusals = [op.reply for op in ops if isinstance(op.reply, Refusal)]
    if ops and len(refusals) == len(ops):
        raise SharedUnavailable("refused", f"the shared store refuses: {refusals[0].text[:200]}")


def _found_or_claimed(head: Op, claim: Op) -> bytes | bool | None:
    if isinstance(head.reply, bytes) and head.reply:
        return head.reply
    if is_unanswered(head.reply) or is_unanswered(claim.reply):
        return None
    return claim.reply == b"OK"


def _body(op: Op) -> bytearray | None:
    if isinstance(op.reply, bytearray):
        return op.reply
    return bytearray(op.reply) if isinstance(op.reply, bytes) else None


def _joined(whole: Whole, others: list[Op] | None) -> bytearray | None:
    """A long value, if each of its pieces lies in it."""
    if others is None or any(not isinstance(op.reply, int) for op in others):
        return None
    return whole.value


def _find_whole(call: Call, uploads: dict[int, Upload]) -> set[int]:
    """Which of them are there already, every piece of them: those are not sent again."""
    call.run([op for upload in uploads.values() for op in upload.ask()])
    call.run([op for upload in uploads.values() for op in upload.ask_others()])
    return {at for at, upload in uploads.items() if upload.is_there()}
