"""An engine in memory for tests: it counts round trips, and can hang, lose, lie and refuse at named points."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.clock import Clock, ManualClock
from kvstore.shared import HEAD_NBYTES, Buffer, Health, SharedUnavailable


@dataclass
class MemoryServer:
    """What hosts share. trips: calls by verb; gets, puts: by name; down: nothing answers.

    at: called at the named point of a call, `VERB` before it is answered and `VERB:done` after, with the names.
    silent: names of a part that does not answer. lost: names that get nothing, though their heads are there.
    slow_after: bodies of a get that arrive in time; the others do not, and the caller's clock has moved by its timeout.
    bodies_per_s: how fast the clock moves for bodies.
    """

    clock: Clock
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    claims: dict[str, float] = field(default_factory=dict)
    trips: Counter[str] = field(default_factory=Counter)
    gets: Counter[str] = field(default_factory=Counter)
    puts: Counter[str] = field(default_factory=Counter)
    deleted: list[str] = field(default_factory=list)
    down: bool = False
    at: dict[str, Callable[[Sequence[str]], None]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    slow_after: int | None = None
    bodies_per_s: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def total(self) -> int:
        """Round trips so far."""
        return sum(self.trips.values())

    def names(self) -> list[str]:
        """The names of objects, without the table of epochs."""
        return [name for name, (data, _) in self.objects.items() if data[:4] != b"KVSE"]


class MemoryEngine:
    """One host's engine on a server. both: it can ask and claim in one round trip."""

    def __init__(self, server: MemoryServer) -> None:
        self.server = server
        self.closed = False

    def _trip(self, verb: str, names: Sequence[str], timeout_s: float) -> None:
        server = self.server
        with server.lock:
            server.trips[verb] += 1
        if verb in server.at:
            server.at[verb](names)
        if self.closed:
            raise SharedUnavailable("closed", "the engine is closed")
        if server.down:
            if isinstance(server.clock, ManualClock):
                server.clock.advance(timeout_s)
            raise SharedUnavailable("timeout", f"no answer within {timeout_s} s")

    def _done(self, verb: str, names: Sequence[str]) -> None:
        if f"{verb}:done" in self.server.at:
            self.server.at[f"{verb}:done"](names)

    def _data(self, name: str) -> bytes | None:
        data, until = self.server.objects.get(name, (None, 0.0))
        return None if data is None or until <= self.server.clock.now() else data

    def heads(self, names: Sequence[str], timeout_s: float) -> list[bytes | None]:
        self._trip("heads", names, timeout_s)
        with self.server.lock:
            found = [self._data(name) for name in names]
        self._done("heads", names)
        return [None if data is None else data[:HEAD_NBYTES] for data in found]

    def heads_or_claims(self, names: Sequence[str], claim_s: float, timeout_s: float) -> list[bytes | bool | None]:
        self._trip("heads_or_claims", names, timeout_s)
        with self.server.lock:
            answers: list[bytes | bool | None] = []
            for name in names:
                data = self._data(name)
                if name in self.server.silent:
                    answers.append(None)
                else:
                    answers.append(self._claimed([name], claim_s)[0] if data is None else data[:HEAD_NBYTES])
        self._done("heads_or_claims", names)
        return answers

    def get(self, names: Sequence[str], nbytes: Sequence[int], timeout_s: float) -> list[bytearray | None]:
        self._trip("get", names, timeout_s)
        server = self.server
        with server.lock:
            server.gets.update(names)
            found = [None if name in server.lost else self._data(name) for name in names]
        answers = [
            None if data is None or len(data) != size else bytearray(data)
            for data, size in zip(found, nbytes, strict=True)
        ]
        if isinstance(server.clock, ManualClock):
            if server.slow_after is not None:
                answers[server.slow_after :] = [None] * len(answers[server.slow_after :])
                server.clock.advance(timeout_s)
            elif server.bodies_per_s:
                server.clock.advance(sum(nbytes) / server.bodies_per_s)
        self._done("get", names)
        return answers

    def put(
        self, objects: Sequence[tuple[str, Sequence[Buffer]]], ttl_s: float, timeout_s: float, *, replace: bool = False
    ) -> list[bool]:
        names = [name for name, _ in objects]
        self._trip("put", names, timeout_s)
        with self.server.lock:
            for name, buffers in objects:
                self.server.puts[name] += 1
                if replace or self._data(name) is None:
                    self.server.objects[name] = b"".join(buffers), self.server.clock.now() + ttl_s
        self._done("put", names)
        return [True] * len(objects)

    def claim(self, names: Sequence[str], ttl_s: float, timeout_s: float) -> list[bool]:
        self._trip("claim", names, timeout_s)
        with self.server.lock:
            return self._claimed(names, ttl_s)

    def _claimed(self, names: Sequence[str], ttl_s: float) -> list[bool]:
        now, claims = self.server.clock.now(), self.server.claims
        mine = [claims.get(name, 0.0) <= now for name in names]
        claims.update((name, now + ttl_s) for name, own in zip(names, mine, strict=True) if own)
        return mine

    def delete(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        self._trip("delete", names, timeout_s)
        with self.server.lock:
            for name in names:
                self.server.objects.pop(name, None)
                self.server.deleted.append(name)
        self._done("delete", names)
        return [True] * len(names)

    def health(self, timeout_s: float) -> Health:
        # Not a round trip of a caller's: the background asks.
        if self.server.down:
            raise SharedUnavailable("timeout", f"no answer within {timeout_s} s")
        return Health(1, 1, 0.0)

    def close(self) -> None:
        self.closed = True


class PlainEngine(MemoryEngine):
    """One that cannot ask and claim in one round trip."""

    heads_or_claims = None  # type: ignore[assignment]
