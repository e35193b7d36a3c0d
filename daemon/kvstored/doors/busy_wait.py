"""Waiting for a client's next packet: awake for a moment where the last one came at once, else asleep.

Being put to sleep and woken is two thirds of a small call: 0.2 ms a view, 0.07 when both ends are awake. So the thread
looks for the next packet of a client that calls again at once. It sleeps again as soon as that client pauses, another
client calls, or looking was in vain.

Looking helps only while the two ends run on two processors. A packet wakes its reader on the sender's own (those a
virtual machine has idle do not count as free), and a reader that looks there keeps the client from sending what it
looks for. So who was woken and finds nothing at first moves to another processor, looks on there, and stays: while
nobody sleeps nobody is woken.
"""

import ctypes
import os
import socket
import time
from contextlib import suppress

LOOK_S = 0.0003
"""For how long, and how soon a call has to come for the next one to be looked for: a copy of 1 MiB takes 0.1 ms."""
MOVE_S = 0.00005
"""Into a look: a client that is running asks within this, and moving takes 0.1 ms."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.001, 0.016
"""Between a look in vain and the next, doubled each time: at worst, for a client that calls all the time and is never
found, 3% of a processor. A client's two calls in a row now and then must not keep it waiting for long, though."""

_getcpu = ctypes.CDLL(None).sched_getcpu


class Callers:
    """All who wait. latest: whose packet came last; for anybody else nobody stays awake."""

    def __init__(self, processors: frozenset[int] | None = None) -> None:
        """processors: which ones to use, by default those this process may."""
        self.processors = frozenset(os.sched_getaffinity(0)) if processors is None else processors
        self.latest: Waiting | None = None


class Waiting:
    """The wait for one socket's packets, by one thread."""

    def __init__(self, sock: socket.socket, callers: Callers) -> None:
        self._sock = sock
        self._callers = callers
        self._hurried = False
        self._woken = True
        self._not_before = 0.0
        self._pause_s = PAUSE_MIN_S

    def receive(self, packet: memoryview) -> int:
        """The bytes of the next packet, read into `packet`; 0 at the end. Raises OSError."""
        callers = self._callers
        began = time.perf_counter()
        if self._hurried and callers.latest is self and began >= self._not_before:
            nbytes = self._look(packet, began)
            if nbytes is not None:
                return nbytes
        nbytes = self._sock.recv_into(packet)
        self._woken = True
        self._hurried = len(callers.processors) > 1 and time.perf_counter() < began + LOOK_S
        callers.latest = self
        return nbytes

    def _look(self, packet: memoryview, began: float) -> int | None:
        callers, clock = self._callers, time.perf_counter
        until = began + LOOK_S
        move_at = began + MOVE_S if self._woken else until
        while callers.latest is self and (now := clock()) < until:
            try:
                nbytes = self._sock.recv_into(packet, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if now >= move_at:
                    self._move()
                    move_at = until = clock() + LOOK_S
                continue
            self._woken = False
            # Little by little: of calls that come in pairs every second look is in vain.
            self._pause_s = max(0.75 * self._pause_s, PAUSE_MIN_S)
            return nbytes
        self._not_before = clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        return None

    def _move(self) -> None:
        """Let somebody else have this processor."""
        everywhere = self._callers.processors
        with suppress(OSError):  # the set was narrowed since
            os.sched_setaffinity(0, everywhere - {_getcpu()})
            os.sched_setaffinity(0, everywhere)
