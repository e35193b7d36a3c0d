"""Servers that redirect, fail, cut off, answer late or answer something else: never a wrong byte, one kind of error."""

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.clock import SystemClock
from kvstore.shared import SharedUnavailable, exchange
from kvstore.shared.addresses import Address
from kvstore.shared.link import Login
from kvstore.shared.nodes import Nodes
from kvstore.shared.valkey import Valkey

from .scripted import Scripted, bulk, one_shard

TIMEOUT_S = 10.0
VALUES = {b"n%d" % n: bytes([n]) * 300 for n in range(20)}


@pytest.fixture
def servers():
    made = []

    def make(answer):
        made.append(Scripted(answer))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def engine_of(monkeypatch):
    """An engine that knows the topology already: these servers are not asked for it."""
    made = []

    def make(topology):
        engine = Valkey([topology.shards[0].primary], Login(), SystemClock())
        monkeypatch.setattr(engine.keeper, "_learn", lambda address: engine.nodes.topology)
        engine.nodes.adopt(topology)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def value_of(words, _number=0):
    """A server that has VALUES."""
    value = VALUES.get(words[1])
    if words[0] == b"GETRANGE":
        return bulk((value or b"")[:96])
    return bulk(value)


def get(engine, *numbers, timeout_s=TIMEOUT_S):
    return engine.get([f"n{n}" for n in numbers], [300] * len(numbers), timeout_s)


def outcome(engine, *numbers):
    """What a get gives, and why it gives nothing."""
    try:
        return get(engine, *numbers), None
    except SharedUnavailable as error:
        return [], error.reason


def expected(*numbers):
    return [VALUES[b"n%d" % n] for n in numbers]


def test_moved_is_followed_within_the_call_and_the_topology_is_looked_at(servers, engine_of, monkeypatch):
    new = servers(value_of)
    old = servers(lambda words, _: f"-MOVED 5 127.0.0.1:{new.address.port}\r\n".encode())
    engine = engine_of(one_shard(old.address))
    learned = threading.Event()
    monkeypatch.setattr(engine.keeper, "_learn", lambda address: learned.set() or one_shard(new.address))
    assert get(engine, 1, 2, 3) == expected(1, 2, 3)
    assert new.connections == 1  # together, not one by one
    assert learned.wait(10)


def test_ask_is_followed_with_asking_before_each_command(servers, engine_of):
    new = servers(value_of)
    old = servers(lambda words, _: f"-ASK 5 :{new.address.port}\r\n".encode())
    engine = engine_of(one_shard(old.address))
    assert get(engine, 1, 2) == expected(1, 2)
    assert [words[0] for _, words in new.asked] == [b"ASKING", b"GET", b"ASKING", b"GET"]


def test_servers_that_send_each_other_the_caller_do_not_keep_it(servers, engine_of):
    ports = {}
    one = servers(lambda words, _: f"-MOVED 5 127.0.0.1:{ports[2]}\r\n".encode())
    two = servers(lambda words, _: f"-MOVED 5 127.0.0.1:{ports[1]}\r\n".encode())
    ports.update({1: one.address.port, 2: two.address.port})
    with pytest.raises(SharedUnavailable) as caught:
        get(engine_of(one_shard(one.address)), 1)
    assert caught.value.reason == "refused"
    assert len(one.asked) + len(two.asked) < 10


@pytest.mark.parametrize("where", ["nonsense", "5", "5 nowhere", "5 h:0", "5 h:99999", "5 h:x", "5 127.0.0.1:1"])
def test_a_redirection_to_nowhere_is_a_miss_or_a_refusal(servers, engine_of, where):
    engine = engine_of(one_shard(servers(lambda words, _: f"-MOVED {where}\r\n".encode()).address))
    got, reason = outcome(engine, 1)
    assert got == [None] or reason in ("refused", "unreachable")


@pytest.mark.parametrize("text", ["LOADING dataset", "CLUSTERDOWN down", "MASTERDOWN link", "TRYAGAIN later"])
def test_a_primary_that_cannot_answer_now_has_its_reads_answered_by_a_replica(servers, engine_of, text):
    primary = servers(lambda words, _: f"-{text}\r\n".encode())
    replica = servers(value_of)
    assert get(engine_of(one_shard(primary.address, replica.address)), 1, 2) == expected(1, 2)
    assert replica.asked[0][1] == [b"READONLY"]


def test_a_primary_that_is_gone_has_its_reads_answered_by_a_replica_and_its_writes_refused(servers, engine_of):
    gone = servers(value_of)
    gone.close()
    replica = servers(value_of)
    engine = engine_of(one_shard(gone.address, replica.address))
    for _ in range(5):
        assert get(engine, 1, 2) == expected(1, 2)
    with pytest.raises(SharedUnavailable):
        engine.put([("n1", [b"x" * 300])], 60, TIMEOUT_S)
    assert all(words[0] != b"SET" for _, words in replica.asked)


def test_a_primary_that_hangs_has_its_reads_answered_by_a_replica_in_the_same_call(servers, engine_of):
    never = threading.Event()
    primary = servers(lambda words, _: never.wait() and b"")
    replica = servers(value_of)
    engine = engine_of(one_shard(primary.address, replica.address))
    assert get(engine, 1, 2, timeout_s=0.5) == expected(1, 2)
    never.set()


def test_nil_from_a_replica_is_a_miss(servers, engine_of):
    gone = servers(value_of)
    gone.close()
    replica = servers(lambda words, _: b"$-1\r\n")
    assert get(engine_of(one_shard(gone.address, replica.address)), 1) == [None]


def test_what_had_arrived_when_the_time_was_up_is_kept(servers, engine_of):
    never = threading.Event()

    def answer(words, _):
        if words[1] == b"n3":
            never.wait()
        return value_of(words)

    assert get(engine_of(one_shard(servers(answer).address)), 1, 2, 3, 4, timeout_s=0.3) == [
        *expected(1, 2),
        None,
        None,
    ]
    never.set()


def test_a_reply_that_comes_after_its_call_was_given_up_is_nobodys_answer(servers, engine_of):
    """The connection of the first call is never used again: its late reply would be the second call's first."""
    late = threading.Event()

    def answer(words, _):
        if words[1] == b"n1":
            late.wait()
        return value_of(words)

    server = servers(answer)
    engine = engine_of(one_shard(server.address))
    with pytest.raises(SharedUnavailable):
        get(engine, 1, timeout_s=0.1)
    late.set()
    wait_until_closed(engine)
    assert get(engine, 2, 3) == expected(2, 3)
    first = {number for number, words in server.asked if words[1] == b"n1"}
    assert first.isdisjoint(number for number, words in server.asked if words[1] == b"n2")


def wait_until_closed(engine):
    deadline = time.monotonic() + 20
    while engine.nodes.breaker() != 0:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_reply_that_nobody_asked_for_ends_its_connection(servers, engine_of):
    """Whether it is there before the next call, or comes in front of its first reply."""
    twice = servers(lambda words, _: value_of(words) + value_of([b"GET", b"n9"]))
    engine = engine_of(one_shard(twice.address))
    for numbers in ([1], [2, 3]):
        assert outcome(engine, *numbers) == ([], "protocol")
    assert twice.connections == 2


def test_a_connection_that_answers_an_earlier_call_is_known_by_its_first_reply(servers, engine_of):
    server = servers(value_of)
    engine = engine_of(one_shard(server.address))
    assert get(engine, 1) == expected(1)
    (link,) = engine.nodes.node(server.address)._idle[False]
    link._token += 1  # as if a reply were missing
    late = bulk(f"{link._salt}{link._token}".encode())
    link._replies._buffer[: len(late)] = late
    link._replies._low, link._replies._high = 0, len(late)
    assert not link.is_usable()
    link.begin([])
    with pytest.raises(Exception, match="another call"):
        for _ in range(1000):
            link.step()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_stream_that_goes_wrong_anywhere_gives_right_values_or_none(servers, engine_of, data):
    """Cut, spoilt or repeated at any command: the values before it are right, nothing is taken for another's."""
    at = data.draw(st.integers(0, 5))
    how = data.draw(st.sampled_from(["cut", "half", "garbage", "array", "longer", "shorter", "nil", "error", "status"]))
    seen = []

    def answer(words, _):
        seen.append(words)
        whole = value_of(words)
        if len(seen) - 1 != at:
            return whole
        return {
            "cut": None,
            "half": whole[: len(whole) // 2] + b"\xff" * 4096,
            "garbage": b"\x00\xffgarbage\r\n" * 20,
            "array": b"*2\r\n" + whole,
            "longer": bulk(b"L" * 301),
            "shorter": bulk(b"S" * 299),
            "nil": b"$-1\r\n",
            "error": b"-ERR no\r\n",
            "status": b"+OK\r\n",
        }[how]

    engine = engine_of(one_shard(servers(answer).address))
    got, reason = outcome(engine, *range(6))
    assert reason in (None, "protocol", "unreachable")
    for n, value in enumerate(got):
        assert value is None or value == VALUES[b"n%d" % n]
    if how in ("longer", "shorter", "nil", "error"):
        assert got == [None if n == at else VALUES[b"n%d" % n] for n in range(6)]


def test_a_refusal_of_everything_is_told_with_the_servers_words(servers, engine_of):
    engine = engine_of(one_shard(servers(lambda words, _: b"-OOM command not allowed\r\n").address))
    with pytest.raises(SharedUnavailable, match="OOM command not allowed") as caught:
        engine.put([("n1", [b"x"])], 60, TIMEOUT_S)
    assert caught.value.reason == "refused"


def test_slots_that_nobody_has_are_misses_beside_the_others_and_alone_an_error(servers, engine_of):
    from kvstore.shared.nodes import Shard, Topology, slot_of

    server = servers(value_of)
    slots = {n: slot_of(b"n%d" % n) for n in range(20)}
    middle = sorted(slots.values())[10]
    engine = engine_of(Topology((Shard(0, middle, server.address),), cluster=True))
    got = get(engine, *range(20))
    assert got == [VALUES[b"n%d" % n] if slots[n] <= middle else None for n in range(20)]
    with pytest.raises(SharedUnavailable) as caught:
        get(engine, max(slots, key=slots.get))
    assert caught.value.reason == "uncovered"


def test_a_store_that_was_never_reached_is_told_at_once_after_the_first_try():
    engine = Valkey([Address("127.0.0.1", 1)], Login(), SystemClock())
    with pytest.raises(SharedUnavailable):
        engine.heads(["a"], TIMEOUT_S)
    begun = time.monotonic()
    for _ in range(50):
        with pytest.raises(SharedUnavailable) as caught:
            engine.heads(["a"], TIMEOUT_S)
    assert caught.value.reason == "unreachable"
    assert time.monotonic() - begun < TIMEOUT_S  # none of the 50 waited
    engine.close()
    with pytest.raises(SharedUnavailable) as caught:
        engine.heads(["a"], TIMEOUT_S)
    assert caught.value.reason == "closed"


def test_not_more_than_four_mebibytes_are_asked_for_at_once(servers, engine_of):
    waiting, most = [0], [0]
    mib = 1 << 20

    def answer(words, _):
        return bulk(b"v" * mib)

    server = servers(answer)
    engine = engine_of(one_shard(server.address))
    # What a server has in its buffer, seen from the link: the weight of what is due.
    from kvstore.shared import link as links

    fill = links.Link._fill

    def watched(self):
        fill(self)
        most[0] = max(most[0], sum(op.weight for op in self._due))
        waiting[0] = max(waiting[0], len(self._waiting))

    links.Link._fill = watched
    try:
        got = engine.get([f"v{n}" for n in range(12)], [mib] * 12, TIMEOUT_S)
    finally:
        links.Link._fill = fill
    assert [len(value) for value in got] == [mib] * 12
    assert waiting[0] >= 8
    assert most[0] <= 4 * mib


@pytest.mark.parametrize("ends", ["close", "adopt"])
def test_a_connection_given_back_after_the_end_is_closed(servers, ends):
    """An exchange, or the keeper's probe, that was on its way while another thread closed the engine."""
    server, other = servers(lambda words, connection: bulk(None)), servers(lambda words, connection: bulk(None))
    nodes = Nodes([other.address], Login(), SystemClock())
    nodes.adopt(one_shard(server.address))
    node = nodes.node(server.address)
    link = node.take(replica=False)
    link.begin([])
    while not link.idle:
        link.step()
    if ends == "close":
        nodes.close()
        assert nodes.node(Address("127.0.0.1", 1)).closed
    else:
        nodes.adopt(one_shard(other.address))
    node.give(link)
    assert link.fileno() == -1


@pytest.mark.parametrize("spin_s", [0.0, 60.0], ids=["asleep", "awake"])
def test_a_get_that_sleeps_and_one_that_never_does_give_the_same(servers, engine_of, monkeypatch, spin_s):
    monkeypatch.setattr(exchange, "SPIN_S", spin_s)
    slow = threading.Event()

    def answer(words, number):
        slow.wait(0.05)
        return value_of(words, number)

    shown = servers(answer)
    engine = engine_of(one_shard(shown.address))
    assert get(engine, 1, 30, 2) == [VALUES[b"n1"], None, VALUES[b"n2"]]
    silent = servers(lambda words, _: b"")
    engine = engine_of(one_shard(silent.address))
    assert get(engine, 1, timeout_s=0.1) == [None]
