"""The one thread of a Valkey engine: it probes servers that failed, and learns the topology.

So no call ever waits for a server that does not answer. A probe is a PING on a link of its own that may wait as long as
the longest pause: a server that hung answers it the moment it goes on, whatever the pause had grown to.
Invariant: only this thread sets the topology.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kvstore.shared.addresses import Address
from kvstore.shared.breaker import PAUSE_MAX_S
from kvstore.shared.link import Denied, Link
from kvstore.shared.nodes import Node, Nodes, Topology
from kvstore.shared.resp import Broken

REFRESH_S = 60.0
"""A topology is looked at this often without a reason to: a replica that was added, a host that left."""
REFRESH_AGAIN_S = 0.5
"""And this often while a server of it fails: its replica may be the primary by now."""
RETRY_S = 1.0
"""A topology that could not be learned is tried again after this."""
ASKED_AT_ONCE = 3

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Probe:
    node: Node
    link: Link
    until: float


class Keeper:
    """Begun by the first `wake`. learn: the topology as one server tells it; raises OSError or KvstoreError."""

    def __init__(
        self, nodes: Nodes, learn: Callable[[Address], Topology], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._nodes, self._learn, self._monotonic = nodes, learn, monotonic
        self._lock = threading.Lock()
        self._begun = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = self._ended = False
        self._wanted = True
        self._learned_at = -REFRESH_S
        self._tried_at = -REFRESH_S
        self._probes: dict[int, _Probe] = {}
        self._poll = select.poll()
        self._poll.register(self._wake_fd, select.POLLIN)
        self.tried = threading.Condition()
        """Notified after every attempt to learn the topology."""
        self.attempts = 0
        self.reason, self.sentence = "unreachable", "not asked yet"
        """Why the last attempt failed."""

    def wake(self) -> None:
        """A server failed, or a call was sent elsewhere: look. Any thread; costs a microsecond."""
        self._wanted = True
        if not self._begun:
            self._begin()
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def _begin(self) -> None:
        with self._lock:
            if self._begun or self._closed:
                return
            self._begun = True
        threading.Thread(target=self._run, name="kvstored-shared-keeper", daemon=True).start()

    def wait_for_topology(self, timeout_s: float) -> bool:
        """Whether a topology is known, waiting for the attempt that is on its way. At once after one that failed."""
        if self._nodes.topology is None:
            self.wake()
            with self.tried:
                self.tried.wait_for(lambda: self._nodes.topology is not None or self.attempts > 0, timeout_s)
        return self._nodes.topology is not None

    def close(self) -> None:
        """End the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._begun:
                os.eventfd_write(self._wake_fd, 1)
            else:
                self._end_waking()

    def _run(self) -> None:
        while not self._closed:
            if self._refresh_in_s() <= 0:
                self._refresh()
            self._begin_probes()
            for fd, _ in self._poll.poll(self._wait_ms()):
                if fd == self._wake_fd:
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                elif fd in self._probes:
                    self._step(fd)
            self._give_up_probes()
        for probe in self._probes.values():
            probe.link.close()
        with self._lock:
            self._end_waking()

    def _end_waking(self) -> None:
        """Under the lock: a number that was closed may be another file's by now."""
        self._ended = True
        os.close(self._wake_fd)

    def _wait_ms(self) -> int:
        now = self._monotonic()
        waits = [node.breaker.due_s() for node in self._nodes.known()]
        waits += [probe.until - now for probe in self._probes.values()]
        waits.append(self._refresh_in_s())
        return max(0, int(1000 * min(wait for wait in waits if wait is not None)) + 1)

    def _refresh_in_s(self) -> float:
        """Seconds until the topology is looked at: again and again while a server of it fails."""
        now = self._monotonic()
        if self._nodes.topology is None:
            return self._tried_at + RETRY_S - now
        if self._wanted or not all(node.breaker.closed for node in self._nodes.known()):
            return self._tried_at + REFRESH_AGAIN_S - now
        return self._learned_at + REFRESH_S - now

    def _refresh(self) -> None:
        """Ask servers that are well, a few of them; the others are asked when a probe finds them well."""
        self._tried_at, self._wanted = self._monotonic(), False
        nodes = [node for node in self._nodes.known() if node.breaker.closed]
        nodes += [
            node for node in map(self._nodes.node, self._nodes.seeds) if node not in nodes and node.breaker.closed
        ]
        for node in nodes[:ASKED_AT_ONCE]:
            try:
                topology = self._learn(node.address)
            except Exception as error:  # noqa: BLE001 - whatever a server answers, this thread goes on
                self.reason = "denied" if isinstance(error, Denied) else "unreachable"
                self.sentence = f"{node.address}: {error}"
                node.breaker.failed(hung=isinstance(error, TimeoutError))
                self._wanted = True
                continue
            if topology != self._nodes.topology:
                _log.info("shared store topology cluster=%s servers=%d", topology.cluster, len(topology.addresses()))
            self._nodes.adopt(topology)
            self._find_all()
            self._learned_at = self._monotonic()
            break
        with self.tried:
            self.attempts += 1
            self.tried.notify_all()

    def _find_all(self) -> None:
        for node in self._nodes.known():
            with suppress(OSError):  # told by the first call that wants it
                node.find()

    def _begin_probes(self) -> None:
        for node in self._nodes.known():
            if not node.breaker.take_probe():
                continue
            try:
                node.find()
                link = node.open()
                link.begin([])
            except OSError:
                node.breaker.probe_failed()
                continue
            self._probes[link.fileno()] = _Probe(node, link, self._monotonic() + PAUSE_MAX_S)
            self._poll.register(link.fileno(), link.events)
            self._step(link.fileno())

    def _step(self, fd: int) -> None:
        probe = self._probes[fd]
        try:
            probe.link.step()
        except (OSError, Broken, Denied):
            self._end(fd)
            probe.node.breaker.probe_failed()
            return
        if not probe.link.idle:
            self._poll.modify(fd, probe.link.events)
            return
        self._end(fd, keep=True)
        probe.node.breaker.succeeded()
        self._wanted = True  # it may have come back as a replica

    def _give_up_probes(self) -> None:
        now = self._monotonic()
        for fd in [fd for fd, probe in self._probes.items() if probe.until <= now]:
            probe = self._probes[fd]
            self._end(fd)
            probe.node.breaker.probe_failed()

    def _end(self, fd: int, *, keep: bool = False) -> None:
        self._poll.unregister(fd)
        probe = self._probes.pop(fd)
        if keep:
            probe.node.give(probe.link)
        else:
            probe.link.close()
