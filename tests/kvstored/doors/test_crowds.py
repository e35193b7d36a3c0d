"""Calls that are silent, or that nobody has authorised, keep no other call out."""

import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstored.access.admission import STRANGER_MAX
from kvstored.access.tokens import digest, make_token
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import wait_until
from tests.kvstored.inside import daemon_inside
from tests.raw import HalfOpenCalls, RawClient, header, spec

MATCH, PUT, STATS = "/kvstored.v1.Cache/Match", "/kvstored.v1.Cache/Put", "/kvstored.v1.Admin/Stats"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
TOKENS = {name: make_token() for name in ("a", "b", "operator")}
ENTRY = '[[token]]\nname = "{}"\nsha256 = "{}"\n{}\n'
FILE = "".join(
    ENTRY.format(name, digest(TOKENS[name]), f'tenant = "{name}"\nrights = ["read", "write"]') for name in "ab"
) + ENTRY.format("operator", digest(TOKENS["operator"]), 'rights = ["admin"]')


def bearer(name):
    return ("authorization", f"Bearer {TOKENS[name]}")


def running(daemon, method):
    registry = daemon.daemon.watch.meter.registry
    return registry.get_sample_value("kvstored_rpc_running", {"method": method}) or 0.0


@pytest.fixture(scope="module")
def guarded():
    with daemon_inside(tcp=True, tokens=FILE, silence_s=60.0, calls_max=64) as found:
        yield found


@pytest.fixture(scope="module")
def open_to_all():
    with daemon_inside(tcp=True, silence_s=60.0, calls_max=64) as found:
        yield found


@pytest.fixture
def call_as(guarded):
    channel = grpc.insecure_channel(f"127.0.0.1:{guarded.port}", options=[("grpc.use_local_subchannel_pool", 1)])
    message = pb.MatchRequest(keys=[b"k"]).SerializeToString()

    def call(name, path=MATCH, data=message):
        return channel.unary_unary(path)(data, timeout=60, metadata=[bearer(name)])

    yield call
    channel.close()


@pytest.fixture
def attacker():
    made = []

    def attack(where, *metadata):
        made.append(HalfOpenCalls(where, *metadata))
        return made[-1]

    yield attack
    for one in made:
        one.close()


@pytest.mark.parametrize("path", [MATCH, PUT, STATS])
def test_a_call_without_a_token_ends_before_its_message_comes(guarded, attacker, call_as, path):
    """330 of them over three connections took every place, for as long as their peer answered pings."""
    peers = [attacker(("127.0.0.1", guarded.port)) for _ in range(3)]
    opened = [(peer, stream) for peer in peers for stream in peer.open(path, 110)]
    for peer, stream in opened:
        assert peer.wait_for(stream)["grpc-status"] == str(grpc.StatusCode.UNAUTHENTICATED.value[0])
    assert call_as("a")


@pytest.mark.parametrize("path", [CHECK, WATCH])
def test_health_calls_without_a_message_keep_neither_callers_nor_health_checks_out(guarded, attacker, call_as, path):
    peers = [attacker(("127.0.0.1", guarded.port)) for _ in range(3)]
    for peer in peers:
        peer.open(path, 110)
    lane = "watch" if path == WATCH else "health"
    # However each has ended: on a busy machine some are silent for too long before another one needs their place. And
    # read: a peer that does not answer HTTP/2's settings is hung up on after 20 s, with calls that nobody has seen yet.
    wait_until(lambda: sum(peer.take_all() for peer in peers) >= 3 * 110 - STRANGER_MAX)
    assert call_as("a")
    assert call_as("operator", STATS, b"")
    with grpc.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    # Those that are left have been told so little later.
    wait_until(lambda: running(guarded, path.removeprefix("/grpc.health.v1.")) == 0)
    assert guarded.refused(lane, "silent") > 0


def test_watches_of_one_address_are_few_and_are_told_when_the_daemon_stops(guarded, attacker, call_as):
    peer = attacker(("127.0.0.1", guarded.port))
    for stream in peer.open(WATCH, 40):
        peer.speak(stream, b"")
    wait_until(lambda: running(guarded, "Health/Watch") == STRANGER_MAX)
    while len(peer.ended) < 40 - STRANGER_MAX:
        peer.take()
    assert {said["grpc-status"] for said in peer.ended.values()} == {str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])}
    assert call_as("a")


def test_a_tenant_with_every_place_taken_by_silent_calls_keeps_no_other_tenant_out(guarded, attacker, call_as):
    peer = attacker(("127.0.0.1", guarded.port), bearer("a"))
    peer.open(MATCH, 100)
    wait_until(lambda: running(guarded, "Cache/Match") >= 64)
    for _ in range(5):
        assert call_as("b")
        assert call_as("operator", STATS, b"")
    assert call_as("a")  # its own calls that speak go on, too


def test_a_tenants_puts_that_stop_half_way_give_way_to_another_tenant(guarded, attacker, call_as):
    peer = attacker(("127.0.0.1", guarded.port), bearer("a"))
    frame = header(b"k", 1, spec("x", 1)).SerializeToString()
    first = peer.open(PUT, 100)
    wait_until(lambda: running(guarded, "Cache/Put") >= 64)
    peer._h2.send_data(first[-1], b"\0" + len(frame).to_bytes(4, "big") + frame)
    peer._flush()
    for _ in range(5):
        assert call_as("b")


def test_where_nobody_needs_a_token_silent_calls_still_keep_nobody_out(open_to_all, attacker):
    """The same address on TCP, or anybody on the unix socket: there is one caller, and it is not told apart."""
    raw = RawClient(f"unix:{open_to_all.socket_path}")
    tcp = RawClient(f"127.0.0.1:{open_to_all.port}")
    before = open_to_all.refused("calls", "gave_way")
    attacker(("127.0.0.1", open_to_all.port)).open(MATCH, 100)
    attacker(open_to_all.socket_path).open(MATCH, 100)
    wait_until(lambda: open_to_all.refused("calls", "full") + open_to_all.refused("calls", "gave_way") > 100)
    for _ in range(5):
        wait_until(lambda: answered(lambda: raw.match(b"k")))
        wait_until(lambda: answered(lambda: tcp.match(b"k")))
        assert open_to_all.client(shared_memory=False).stats().values["uptime_s"] > 0
    assert open_to_all.refused("calls", "gave_way") > before
    raw.close()
    tcp.close()


def answered(call):
    """Whether a call was answered: silent calls of the same caller may be too new to be told from ones that speak."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return False
    return True


def test_a_message_that_does_not_come_in_time_ends_its_call_and_is_counted(attacker):
    with daemon_inside(silence_s=0.05) as daemon:
        peer = attacker(daemon.socket_path)
        streams = peer.open(MATCH, 3) + peer.open(STATS, 1)
        for stream in streams:
            said = peer.wait_for(stream)
            assert said["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
            assert "0.05 s" in said["grpc-message"]
        assert daemon.refused("calls", "silent") == 4
        late = peer.open(MATCH)[0]
        peer.speak(late, pb.MatchRequest(keys=[b"k"]).SerializeToString())
        assert peer.wait_for(late)["grpc-status"] == "0"


def test_a_call_that_ends_without_its_message_is_answered(open_to_all, attacker):
    peer = attacker(open_to_all.socket_path)
    stream = peer.open(MATCH)[0]
    peer._h2.end_stream(stream)
    peer._flush()
    assert peer.wait_for(stream)["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


def test_readers_that_take_nothing_are_limited_by_caller_and_others_are_served():
    """gRPC cannot end a call whose reader takes nothing: 256 of them took every place until their connections ended."""
    with daemon_inside(silence_s=0.05, calls_max=4, tcp=True) as daemon:
        client = daemon.client()
        client.put(b"large", {"x": np.zeros(1 << 20, np.uint8)}, fidelity="exact")
        raw = RawClient(f"127.0.0.1:{daemon.port}")
        released = threading.Event()
        calls = []
        for _ in range(8):
            calls.append(raw.get(pb.GetRequest(keys=[b"large"]), timeout=120))
            next(calls[-1])
            wait_until(lambda: daemon.daemon._admission.lanes["calls"].running == 0)
        other = RawClient(f"unix:{daemon.socket_path}")
        assert other.match(b"large").held
        assert client.stats().values["in_flight_nbytes"] == 0
        released.set()
        for call in calls:
            call.cancel()
        wait_until(lambda: daemon.daemon._admission.lanes["calls"]._ending == {})
        raw.close()
        other.close()
