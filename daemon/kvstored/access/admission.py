"""Which calls may run at once: places, shared out by caller, so that no caller can keep another from its own.

A caller may have all places of a lane while nobody else asks. When the lane is full, the caller with the most calls
gives one up for a caller with fewer: first a call that waits for its own peer (for a message, or for the reader of a
reply), the longest wait first. A caller at its own limit is refused, unless one of its calls has waited for long: one
that is silent never keeps out one that speaks.

Thread rule: the event loop's thread. It knows callers by a name, and calls as places that are told to give way.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

import grpc

ADMIN_RESERVE = 16
"""Places for the operator beside `server.calls_max`: `kvstored stats` has to answer when all of those are taken."""
HEALTH_MAX, WATCHES_MAX, STRANGER_MAX = 32, 32, 8
"""Health checks and watches at once, and those of one address: they need no token, so they have places of their own."""
SILENT_S = 0.02
"""A call without its first message may be ended for another one after this: a message comes with the call's head."""
QUIET_S = 1.0
"""The same for a call whose peer has spoken: between two frames a healthy client takes milliseconds."""
STALLED_MAX = 64
"""Replies that one caller has not taken for QUIET_S: gRPC holds up to a frame of each, and cannot end the call."""
RETRY_MS = 100
_V6_GROUP_BLOCKS = 4
"""A network gives a host 64 bits of IPv6 addresses to choose from: a peer is the other 64."""


class Refusal(Exception):
    """A call that is refused or ended: its status, a sentence, and the class of kvstore.errors that a client raises."""

    def __init__(self, code: grpc.StatusCode, text: str, error: str = "PermissionDenied") -> None:
        super().__init__(text)
        self.code = code
        self.error = error

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The trailing metadata that tells a client what to do."""
        named = ("kvstored-error", self.error)
        return (named, ("retry-after-ms", str(RETRY_MS))) if self.error == "OverQuota" else (named,)


class Place:
    """A call in a lane, once it has entered one (`Admission.enter`). It begins as one that waits for its first message.

    caller: under whose name it counts. Whose call it is says when it waits: quiet_since is the lane's time since when,
    None while it works, and spoken whether its peer has sent or taken anything. now: the lane's clock.
    """

    caller = ""
    lane: "Lane | None" = None
    working = True
    """Whether more than the reply is left."""
    quiet_since: float | None = None
    spoken = False
    now: Callable[[], float] = staticmethod(time.monotonic)

    def give_way(self, refusal: Refusal) -> None:
        """End the call: another caller needs its place."""
        raise NotImplementedError

    def over(self) -> None:
        """Only the reply is left to be taken."""
        self.working = False
        if self.lane is not None:
            self.lane.move_to_ending(self)

    def left(self, _: object = None) -> None:
        """The peer has taken the reply, or is gone."""
        self.working = False
        if self.lane is not None:
            self.lane.remove(self)


class Lane:
    """Places of one kind. limit: at once; each: of one caller."""

    def __init__(self, limit: int, each: int, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.each = each
        self.now = now
        self.running = 0
        self._running: dict[str, dict[Place, None]] = {}
        self._ending: dict[str, dict[Place, float]] = {}

    def has_stalled(self, caller: str) -> bool:
        """Whether a caller leaves too many replies lying."""
        ending = self._ending.get(caller)
        if ending is None or len(ending) < STALLED_MAX:
            return False
        latest = next(islice(ending.values(), STALLED_MAX - 1, None))
        return self.now() - latest >= QUIET_S

    def enter(self, place: Place) -> tuple[bool, Place | None]:
        """(whether a call has a place, another one that is to be ended for it). Its caller waits where it has none."""
        victim, own = None, self._running.get(place.caller)
        if self.running >= self.limit or (own is not None and len(own) >= self.each):
            victim = self._victim(place.caller)
            if victim is None:
                return False, None
            self.move_to_ending(victim)
        place.lane, place.now, place.quiet_since = self, self.now, self.now()
        self._running.setdefault(place.caller, {})[place] = None
        self.running += 1
        return True, victim

    def _victim(self, caller: str) -> Place | None:
        """The place to take for a call of this caller's."""
        own = self._running.get(caller, {})
        if len(own) < self.each:
            most = max(self._running.values(), key=len, default=own)
            if len(most) > len(own):
                quiet = self._longest_quiet(most, at_least=False)
                # Of working calls only from one who has two more: otherwise equals would end each other's in turn.
                if quiet is not None or len(most) > len(own) + 1:
                    return quiet or next(iter(most))
        return self._longest_quiet(own, at_least=True)

    def _longest_quiet(self, places: dict[Place, None], *, at_least: bool) -> Place | None:
        """The call that has waited for its peer the longest. at_least: only one that has waited for long."""
        now, found, since = self.now(), None, float("inf")
        for place in places:
            quiet_since = place.quiet_since
            if quiet_since is None or quiet_since >= since:
                continue
            if not at_least or now - quiet_since >= (QUIET_S if place.spoken else SILENT_S):
                found, since = place, quiet_since
        return found

    def move_to_ending(self, place: Place) -> None:
        """Of a running call only the reply is left to be taken: it counts as stalled if that lasts."""
        if self._drop(self._running, place):
            self.running -= 1
            self._ending.setdefault(place.caller, {})[place] = self.now()

    def remove(self, place: Place) -> None:
        """The call is over."""
        if self._drop(self._running, place):
            self.running -= 1
        else:
            self._drop(self._ending, place)

    @staticmethod
    def _drop(groups: "dict[str, dict[Place, None]] | dict[str, dict[Place, float]]", place: Place) -> bool:
        group = groups.get(place.caller)
        if group is None or place not in group:
            return False
        del group[place]
        if not group:  # callers come and go: none of them is remembered
            del groups[place.caller]
        return True


class Admission:
    """The lanes of a daemon. refused: told of each call that is refused or ended, by lane and reason."""

    def __init__(
        self, calls_max: int, refused: Callable[[str, str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._refused = refused
        self.lanes = {
            "calls": Lane(calls_max, calls_max, now),
            "admin": Lane(ADMIN_RESERVE, ADMIN_RESERVE, now),
            "health": Lane(HEALTH_MAX, STRANGER_MAX, now),
            "watch": Lane(WATCHES_MAX, STRANGER_MAX, now),
        }

    def enter(self, method: str, place: Place) -> None:
        """Give a call a place; another caller's may be ended for it. Raises Refusal."""
        names = _lanes_of(method)
        for name in names:
            lane = self.lanes[name]
            if lane.has_stalled(place.caller):
                self._refused(name, "stalled")
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"this caller leaves {STALLED_MAX} replies unread (the limit): read them or close the connection",
                    "OverQuota",
                )
            entered, victim = lane.enter(place)
            if victim is not None:
                self._refused(name, "gave_way")
                victim.give_way(_crowded(name, lane))
            if entered:
                return
        self._refused(names[0], "full")
        raise _crowded(names[0], self.lanes[names[0]])

    def count(self, method: str, reason: str) -> None:
        """Count a call that was ended for another reason."""
        self._refused(_lanes_of(method)[0], reason)


@lru_cache(maxsize=64)
def _lanes_of(method: str) -> tuple[str, ...]:
    if method.startswith("Admin/"):
        return "calls", "admin"
    if method.startswith("Health/"):
        return ("watch",) if method == "Health/Watch" else ("health",)
    return ("calls",)


def _crowded(name: str, lane: Lane) -> Refusal:
    limits = {
        "calls": f"{lane.limit} calls are under way (server.calls_max)",
        "admin": f"all places are taken, the {lane.limit} for operators too",
    }
    text = limits.get(name, f"{lane.limit} calls of this kind are under way, {lane.each} of one address at most")
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "OverQuota")


@lru_cache(maxsize=1024)
def peer_group(peer: str) -> str:
    """Whose calls count together where nobody has said who it is: an address, without its port.

    peer: gRPC's name for it. A whole loopback network is one peer, as is an IPv6 network of 64 bits.
    """
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    if kind == "ipv6" and host.startswith("::ffff:") and "." in host:
        kind, host = "ipv4", host.removeprefix("::ffff:")
    if kind == "ipv4":
        return "ipv4:127" if host.startswith("127.") else f"ipv4:{host}"
    if kind == "ipv6":
        return "ipv6:" + ":".join(_blocks(host)[:_V6_GROUP_BLOCKS])
    return kind


def _blocks(host: str) -> list[str]:
    """The eight blocks of an IPv6 address."""
    head, gap, tail = host.partition("%")[0].partition("::")
    first, last = head.split(":") if head else [], tail.split(":") if tail else []
    return [*first, *["0"] * (8 - len(first) - len(last)), *last] if gap else first
