"""One call to all the servers that it concerns at once, in the caller's thread, over before its deadline.

Each server gets one exchange: its commands pipelined on a link of its own. Nothing here waits but `poll`, and that
never past the deadline; what had arrived by then stays in its `Op`. A read whose primary fails, or has said nothing
after half of the time, is asked of a replica. MOVED and ASK are followed, and tell the keeper to look at the topology.
A link whose exchange is not whole when the call ends is closed.
"""

import random
import select
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.shared import SharedUnavailable
from kvstore.shared.addresses import Address
from kvstore.shared.link import Denied, Link, Op
from kvstore.shared.nodes import NOBODY, Node, Nodes, Shard, slot_of
from kvstore.shared.resp import PENDING, Broken, Closed, Pending, Refusal, Reply, command

HOPS_MAX = 4
"""Redirections of one command: a topology that changes meanwhile needs two."""
SPIN_S = 0.0005
"""So long a call that somebody waits for looks again and again before it sleeps: to be woken took longer than 1.5 MiB
take to arrive. Of the whole call, so a server that is slow costs no more than that."""
STALLED_AFTER = 0.5
"""Share of a call's time after which a replica is asked instead of a primary that has said nothing."""
_ELSEWHERE = ("LOADING", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "READONLY")
"""Refusals that say: not this server, not now."""
_REDIRECTIONS = ("MOVED", "ASK")


@dataclass(eq=False, slots=True)
class _Exchange:
    node: Node
    link: Link
    ops: list[Op]
    before_nbytes: int

    @property
    def silent(self) -> bool:
        """Whether nothing has come since it began."""
        return self.link.received_nbytes == self.before_nbytes

    @property
    def stalled(self) -> bool:
        """Whether no answer has begun to come: one to PING is none."""
        return not self.link.is_amid_body and not self.answered

    @property
    def answered(self) -> bool:
        """Whether any of it has its reply."""
        return any(op.reply is not PENDING for op in self.ops)


class Call:
    """Ops to be answered within timeout_s. changed: called when the topology seems to be another. spins: see SPIN_S."""

    def __init__(
        self,
        nodes: Nodes,
        changed: Callable[[], None],
        timeout_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        spins: bool = False,
    ) -> None:
        self._nodes, self._changed, self._monotonic = nodes, changed, monotonic
        begun = monotonic()
        self._sleeps_from = begun + SPIN_S if spins else begun
        self.deadline = begun + timeout_s
        self._stalled_at = begun + STALLED_AFTER * timeout_s
        self._running: dict[int, _Exchange] = {}
        self.reached = False
        """Whether any server has answered anything."""
        self._reasons: dict[str, str] = {}

    def run(self, ops: Sequence[Op]) -> None:
        """Have them answered. May be called again, for what follows from the answers.

        Raises SharedUnavailable if no server was reached, in this and all earlier runs.
        """
        try:
            self._route(ops)
            while self._running:
                left_s = self.deadline - self._monotonic()
                if left_s <= 0:
                    break
                self._turn(left_s)
        finally:
            for exchange in list(self._running.values()):
                self._reasons.setdefault("timeout", f"{exchange.node.address} did not answer in time")
                self.reached |= exchange.answered
                self._fail(exchange, hung=exchange.silent)
        if ops and not self.reached:
            raise self.unavailable()

    def unavailable(self) -> SharedUnavailable:
        """Why nothing was reached: of several reasons the one that an operator can act on."""
        for reason in ("denied", "protocol", "unreachable", "timeout", "barred"):
            if reason in self._reasons:
                return SharedUnavailable(reason, f"the shared store: {self._reasons[reason]}")
        return SharedUnavailable("uncovered", "the shared store: no server has the slots of these names")

    def _turn(self, left_s: float) -> None:
        now = self._monotonic()
        if now < self._sleeps_from:
            for exchange in list(self._running.values()):
                self._step(exchange)
            return
        stalled_in_s = self._stalled_at - now
        wait_s = min(left_s, stalled_in_s) if stalled_in_s > 0 else left_s
        poll = select.poll()
        for fd, exchange in self._running.items():
            poll.register(fd, exchange.link.wait_for_more())
        for fd, _ in poll.poll(max(0, int(1000 * wait_s) + 1)):
            if fd in self._running:
                self._step(self._running[fd])
        if stalled_in_s > 0 and self._monotonic() >= self._stalled_at:
            for exchange in [one for one in self._running.values() if one.stalled and self._could_move(one)]:
                self._reasons.setdefault("timeout", f"{exchange.node.address} did not answer in time")
                self._fail(exchange, hung=exchange.silent)
                self._route(exchange.ops, replica=True)

    def _could_move(self, exchange: _Exchange) -> bool:
        return all(not op.writes and not op.on_replica and self._replicas(op) for op in exchange.ops)

    def _shard(self, op: Op) -> Shard | None:
        topology = self._nodes.topology
        if topology is None:
            return None
        return topology.shard(slot_of(op.name) if topology.cluster else 0)

    def _replicas(self, op: Op) -> list[Address]:
        shard = self._shard(op)
        return self._up(shard) if shard else []

    def _up(self, shard: Shard) -> list[Address]:
        return [address for address in shard.replicas if self._nodes.node(address).breaker.closed]

    def _route(self, ops: Sequence[Op], *, replica: bool = False) -> None:
        """Give each to the server that has its slot, or to a replica of it; to none if none may be asked."""
        by_target: dict[tuple[Address, bool], list[Op]] = defaultdict(list)
        for shard, group in self._by_shard(ops):
            primary = None if replica else self._primary(shard)
            for op in group:
                target = primary or self._replica(op, shard)
                if target is not None:
                    by_target[target, op.on_replica].append(op)
        for (address, on_replica), group in by_target.items():
            self._begin(self._nodes.node(address), group, replica=on_replica)

    def _by_shard(self, ops: Sequence[Op]) -> list[tuple[Shard, list[Op]]]:
        """Those whose slot somebody has, in their order: a lookup has hundreds, so no more is done for each of them."""
        topology = self._nodes.topology
        if topology is None:
            self._changed()
            return []
        owners, cluster = topology.owners, topology.cluster
        groups: dict[int, list[Op]] = {}
        for op in ops:
            at = owners[slot_of(op.name)] if cluster else 0
            if at in groups:
                groups[at].append(op)
            else:
                groups[at] = [op]
        if groups.pop(NOBODY, None):
            self._changed()
        return [(topology.shards[at], group) for at, group in groups.items()]

    def _primary(self, shard: Shard) -> Address | None:
        if self._nodes.node(shard.primary).breaker.closed:
            return shard.primary
        self._reasons.setdefault("barred", f"{shard.primary} has not answered lately and is not asked")
        return None

    def _replica(self, op: Op, shard: Shard) -> Address | None:
        up = [] if op.writes or op.on_replica else self._up(shard)
        if not up:
            return None
        op.on_replica = True
        return random.choice(up)  # noqa: S311 - spreads load

    def _begin(self, node: Node, ops: list[Op], *, replica: bool = False) -> None:
        topology = self._nodes.topology
        try:
            link = node.take(replica=replica and topology is not None and topology.cluster)
        except OSError as error:
            self._reasons.setdefault("unreachable", f"{node.address}: {error.strerror or error}")
            self._blame(node, hung=False)
            self._route([op for op in ops if op.reply is PENDING], replica=True)
            return
        exchange = _Exchange(node, link, ops, link.received_nbytes)
        link.begin(ops)
        self._running[link.fileno()] = exchange
        self._step(exchange)

    def _step(self, exchange: _Exchange) -> None:
        """Let an exchange go on as far as it can."""
        link = exchange.link
        fd = link.fileno()
        try:
            link.step()
        except Denied as error:
            self._lose(exchange, fd, "denied", str(error))
        except Closed as error:
            self._lose(exchange, fd, "unreachable", f"{link.address}: {error}")
        except Broken as error:
            self._disbelieve(exchange, fd, f"{link.address}: {error}")
        except OSError as error:
            self._lose(exchange, fd, "unreachable", f"{link.address}: {error.strerror or error}")
        else:
            if link.idle:
                self._finish(exchange)
            elif link.is_answered:  # and more has come: which reply is whose cannot be told
                self._disbelieve(exchange, fd, f"{link.address} sends more replies than it was asked for")

    def _finish(self, exchange: _Exchange) -> None:
        self._forget(exchange.link.fileno())
        self.reached = True
        exchange.node.breaker.succeeded()
        exchange.node.give(exchange.link)
        elsewhere: list[Op] = []
        moved: dict[Address, list[Op]] = defaultdict(list)
        for op in exchange.ops:
            if not isinstance(op.reply, Refusal):
                continue
            address = _redirection(op.reply, exchange.node.address)
            if address is not None and op.hops < HOPS_MAX:
                op.hops += 1
                if op.reply.code == "ASK":
                    moved[address].append(Op(op.name, command("ASKING"), b"+"))
                op.reply = PENDING
                moved[address].append(op)
            elif op.reply.code in _ELSEWHERE:
                self._changed()
                if not op.writes and not op.on_replica and self._replicas(op):
                    op.reply = PENDING
                    elsewhere.append(op)
        if moved:
            self._changed()
        for address, group in moved.items():
            self._begin(self._nodes.node(address), group)
        self._route(elsewhere, replica=True)

    def _disbelieve(self, exchange: _Exchange, fd: int, sentence: str) -> None:
        """Which reply is whose cannot be told: none of them counts."""
        for op in exchange.ops:
            op.reply = PENDING
        self._lose(exchange, fd, "protocol", sentence)

    def _lose(self, exchange: _Exchange, fd: int, reason: str, sentence: str) -> None:
        """A link failed: what it has not answered is asked of a replica, if it only reads."""
        self._reasons.setdefault(reason, sentence)
        self.reached |= exchange.answered
        self._fail(exchange, hung=False, fd=fd)
        self._route([op for op in exchange.ops if op.reply is PENDING and not op.writes], replica=True)

    def _fail(self, exchange: _Exchange, *, hung: bool, fd: int = -1) -> None:
        self._forget(fd if fd >= 0 else exchange.link.fileno())
        exchange.link.close()
        self._blame(exchange.node, hung=hung)

    def _blame(self, node: Node, *, hung: bool) -> None:
        node.drop_idle(forget_place=True)
        if node.breaker.failed(hung=hung) or not hung:
            self._changed()

    def _forget(self, fd: int) -> None:
        del self._running[fd]


def is_unanswered(reply: Reply | Pending) -> bool:
    """Whether no server has answered for good: none was reached, or it is not the one, or not now."""
    return reply is PENDING or (isinstance(reply, Refusal) and reply.code in (*_ELSEWHERE, *_REDIRECTIONS))


def _redirection(refusal: Refusal, answering: Address) -> Address | None:
    """The server that MOVED or ASK names. Without a host it is the one that answered."""
    words = refusal.text.split()
    if refusal.code not in _REDIRECTIONS or len(words) != 3:
        return None
    host, _, port = words[2].rpartition(":")
    if not port.isdigit() or not 1 <= int(port) <= 65535:
        return None
    return Address(host.strip("[]") or answering.host, int(port))
