"""Places for calls: whoever asks for little gets it, whatever others hold."""

import grpc
import pytest

from kvstored.access.admission import (
    ADMIN_RESERVE,
    QUIET_S,
    SILENT_S,
    STALLED_MAX,
    STRANGER_MAX,
    WATCHES_MAX,
    Admission,
    Place,
    Refusal,
    peer_group,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Call(Place):
    """A call that says what it does, as the interceptor's do."""

    def __init__(self, caller, ended):
        self.caller = caller
        self.give_way = ended

    def waits(self):
        self.quiet_since = self.now()

    def works(self):
        self.quiet_since, self.spoken = None, True

    def ends(self):
        self.lane.move_to_ending(self)

    def leave(self):
        self.lane.remove(self)


class Calls:
    """An Admission, the calls in it, and what was ended."""

    def __init__(self, calls_max):
        self.clock = Clock()
        self.counted = []
        self.ended = []
        self.admission = Admission(calls_max, lambda lane, reason: self.counted.append((lane, reason)), self.clock)

    def enter(self, caller, method="Cache/Get", name=None):
        call = Call(caller, lambda refusal: self.ended.append((name or caller, refusal.code)))
        self.admission.enter(method, call)
        return call

    def working(self, caller, count, method="Cache/Get"):
        places = [self.enter(caller, method, f"{caller} {i}") for i in range(count)]
        for place in places:
            place.works()
        return places


def test_one_caller_alone_may_have_every_place():
    calls = Calls(8)
    calls.working("a", 8)
    with pytest.raises(Refusal, match=r"8 calls are under way \(server.calls_max\)") as refused:
        calls.enter("a")
    assert refused.value.code == EXHAUSTED
    assert ("retry-after-ms", "100") in refused.value.metadata
    assert calls.ended == []
    assert calls.counted == [("calls", "full")]


def test_another_caller_gets_its_share_of_places_that_one_has_taken():
    calls = Calls(8)
    calls.working("a", 8)
    calls.working("b", 4)
    assert [name for name, _ in calls.ended] == ["a 0", "a 1", "a 2", "a 3"]
    with pytest.raises(Refusal):
        calls.enter("b")  # both have as many: neither ends the other's
    assert calls.admission.lanes["calls"].running == 8


def test_of_another_callers_calls_the_one_that_has_waited_longest_for_its_peer_goes_first():
    calls = Calls(4)
    places = calls.working("a", 4)
    places[2].waits()
    calls.clock.now += 0.001
    places[1].waits()
    calls.enter("b")
    assert calls.ended == [("a 2", EXHAUSTED)]
    assert calls.counted == [("calls", "gave_way")]


def test_a_silent_call_keeps_no_call_of_the_same_caller_out():
    calls = Calls(2)
    for i in range(2):
        calls.enter("a", name=f"silent {i}")
    with pytest.raises(Refusal):
        calls.enter("a")  # both are so new that their messages may be on the way
    calls.clock.now += 2 * SILENT_S
    calls.enter("a", name="speaks").works()
    assert calls.ended == [("silent 0", EXHAUSTED)]


def test_between_two_frames_a_call_is_left_in_peace_for_a_while():
    calls = Calls(1)
    place = calls.enter("a", name="slow")
    place.works()
    place.waits()
    calls.clock.now += QUIET_S / 2
    with pytest.raises(Refusal):
        calls.enter("a")
    calls.clock.now += QUIET_S / 2
    calls.enter("a")
    assert calls.ended == [("slow", EXHAUSTED)]


def test_the_operator_is_answered_when_all_places_are_taken():
    calls = Calls(4)
    calls.working("local unix", 4)
    calls.working("local unix", ADMIN_RESERVE, "Admin/Stats")
    assert calls.ended == []
    with pytest.raises(Refusal):
        calls.enter("local unix", "Admin/Stats")


def test_health_checks_and_watches_take_no_place_of_a_callers():
    calls = Calls(1)
    for address in range(WATCHES_MAX // STRANGER_MAX):
        calls.working(f"ipv4:10.0.0.{address}", STRANGER_MAX, "Health/Watch")
        calls.working(f"ipv4:10.0.0.{address}", STRANGER_MAX, "Health/Check")
    with pytest.raises(Refusal, match=f"{WATCHES_MAX} calls of this kind .* {STRANGER_MAX} of one address"):
        calls.enter("ipv4:10.0.0.1", "Health/Watch")
    calls.enter("ipv4:10.0.0.99", "Health/Watch")  # another address gets one of theirs
    calls.enter("tenant a")
    assert calls.counted == [("watch", "full"), ("watch", "gave_way")]


def test_replies_that_nobody_reads_are_limited_by_caller():
    calls = Calls(1000)
    places = calls.working("a", STALLED_MAX)
    for place in places:
        place.ends()
    assert calls.admission.lanes["calls"].running == 0
    calls.enter("a").leave()  # they ended a moment ago: that is no stall
    calls.clock.now += QUIET_S
    with pytest.raises(Refusal, match=f"leaves {STALLED_MAX} replies unread"):
        calls.enter("a")
    calls.enter("b").leave()
    places[0].leave()
    calls.enter("a").leave()
    assert calls.counted == [("calls", "stalled")]


def test_a_place_is_given_back_once_however_its_call_ends():
    calls = Calls(1)
    for end in (("ends", "leave"), ("leave", "ends"), ("leave", "leave"), ("ends", "ends", "leave")):
        place = calls.enter("a")
        for step in end:
            getattr(place, step)()
        assert calls.admission.lanes["calls"].running == 0
    lane = calls.admission.lanes["calls"]
    assert lane._running == lane._ending == {}


@pytest.mark.parametrize(
    ("peers", "same"),
    [
        (("ipv4:127.0.0.1:4000", "ipv4:127.9.9.9:4001"), True),
        (("ipv4:10.0.0.1:4000", "ipv4:10.0.0.1:4001"), True),
        (("ipv4:10.0.0.1:4000", "ipv4:10.0.0.2:4000"), False),
        (("ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B2001:db8:0:0:9:9:9:9%5D:2"), True),
        (("ipv6:[2001:db8::1]:1", "ipv6:[2001:db8:0:1::1]:1"), False),
        (("ipv6:%5B::ffff:10.0.0.1%5D:1", "ipv4:10.0.0.1:2"), True),
        (("ipv6:%5B::1%5D:1", "ipv6:%5B::1%5D:2"), True),
        (("unix:", "unix:/run/k.sock"), True),
    ],
)
def test_a_peer_is_its_address_and_not_its_port(peers, same):
    assert (peer_group(peers[0]) == peer_group(peers[1])) is same
