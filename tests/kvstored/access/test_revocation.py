"""A reload reaches what is open: a caller that is gone, has fewer rights or another tenant is not served as before."""

import os

import grpc
import numpy as np
import pytest

from kvstored.access.segment_owners import SegmentOwners
from kvstored.access.tokens import Identity, digest, make_token
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import wait_until
from tests.kvstored.inside import daemon_inside
from tests.raw import RawClient, header, spec

UID = os.geteuid()
TOKEN, OTHER = make_token(), make_token()
X = {"x": np.arange(5000, dtype=np.uint8)}
BEARER = [("authorization", f"Bearer {TOKEN}")]


def entry(token=TOKEN, name="worker", tenant="a", rights='"read", "write"', uid=UID):
    who = f'name = "{name}"\nsha256 = "{digest(token)}"\nrights = [{rights}]\n'
    return (
        "[[token]]\n"
        + who
        + (f'tenant = "{tenant}"\n' if tenant else "")
        + (f"uid = {uid}\n" if uid is not None else "")
    )


KEPT = entry(OTHER, "other", "c", uid=None)


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    (tmp_path / "t").write_text(TOKEN)
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
    with daemon_inside(tokens=entry() + KEPT, token_on_unix=True, silence_s=60.0) as found:
        yield found


def reload(daemon, text):
    (daemon.directory / "tokens.toml").write_text(text)
    daemon.on_loop(daemon.daemon.reload)


def connections(daemon):
    return daemon.daemon._shared.gauges()["lease_connections"]


CHANGES = {
    "revoked": KEPT,
    "another user": entry(uid=UID + 1) + KEPT,
    "fewer rights": entry(rights='"read"') + KEPT,
    "another tenant": entry(tenant="b") + KEPT,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_lease_connection_ends_with_the_entry_it_was_opened_by(daemon, change):
    """A revoked caller went on reading, deleting and pinning for as long as it kept its connection."""
    client = daemon.client()
    assert client.put(b"k", X)
    assert client.get(b"k") is not None
    assert connections(daemon) == 1
    connection = next(iter(daemon.daemon._shared.connections))
    reload(daemon, CHANGES[change])
    for call in (pb.LeaseCall(get=pb.GetRequest(keys=[b"k"])), pb.LeaseCall(delete=pb.DeleteRequest(keys=[b"k"]))):
        with pytest.raises(OSError, match="is no longer worker"):
            connection.answer(call.SerializeToString())
    wait_until(lambda: connection not in daemon.daemon._shared.connections)


def test_a_reload_that_changes_nothing_for_a_user_keeps_its_connection(daemon):
    client = daemon.client()
    client.put(b"k", X)
    before = set(daemon.daemon._shared.connections)
    reload(daemon, entry() + entry(make_token(), "new", "d", uid=None) + KEPT)
    assert client.get(b"k") is not None
    assert set(daemon.daemon._shared.connections) == before


def segments_of(client):
    return set(client._pool.segments._mappings)


def test_segments_of_a_user_whose_tenant_changed_are_not_handed_out_again(daemon):
    """One segment holds many entries: who is handed it can read what the tenant before put there."""
    before = daemon.client()
    assert before.put(b"k", X)
    assert before.get(b"k") is not None
    mapped = segments_of(before)
    assert mapped
    reload(daemon, entry(tenant="b") + KEPT)
    after = daemon.client()
    assert after.get(b"k") is None
    assert after.put(b"k", X)
    assert after.get(b"k") is not None
    assert segments_of(after)
    assert not segments_of(after) & mapped
    reload(daemon, entry() + KEPT)  # and back: what was put meanwhile is not in what it had mapped
    again = daemon.client()
    assert np.array_equal(again.get(b"k").tensors["x"], X["x"])
    assert not segments_of(again) & segments_of(after)


def test_the_daemons_own_user_is_not_handed_what_other_tenants_streamed(daemon, tmp_path, monkeypatch):
    (tmp_path / "t").write_text(OTHER)
    other = daemon.client(shared_memory=False)
    assert other.put(b"secret", X)
    streamed = {segment.number for segment in daemon.arena._segments}
    (tmp_path / "t").write_text(TOKEN)
    mine = daemon.client()
    assert mine.put(b"k", X)
    assert mine.get(b"k") is not None
    assert segments_of(mine)
    assert not segments_of(mine) & streamed


def test_an_owner_lasts_as_long_as_its_user_is_the_same_caller():
    owners = SegmentOwners()
    a, b, whole = (Identity("w", frozenset({"read"}), tenant) for tenant in ("a", "b", None))
    assert owners.of(5, whole) == 5
    assert owners.of(7, a) == owners.of(7, a) != 7
    assert owners.of(7, a) != owners.of(7, b) != owners.of(7, a)
    before = owners.of(7, a)
    owners.recheck({7: a, 5: whole}.get)
    assert owners.of(7, a) == before
    owners.recheck({5: whole}.get)  # revoked, and then let in again
    assert owners.of(7, a) != before
    assert owners.of(5, whole) == 5


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_put_ends_with_the_entry_it_was_begun_by(daemon, change):
    if change == "another user":
        pytest.skip("over gRPC the token counts, which is the same")
    raw = RawClient(f"unix:{daemon.socket_path}")
    released = []

    def frames():
        yield header(b"late", 1, spec("x", 1)).SerializeToString()
        wait_until(lambda: released)

    call = raw.channel.stream_unary("/kvstored.v1.Cache/Put").future(frames(), metadata=BEARER)
    wait_until(lambda: daemon.daemon._shared.budget.used_nbytes > 0)
    reload(daemon, CHANGES[change])
    expected = grpc.StatusCode.PERMISSION_DENIED if change == "fewer rights" else grpc.StatusCode.UNAUTHENTICATED
    assert call.code() == expected
    released.append(True)
    assert daemon.refused("calls", "revoked") == 1
    wait_until(lambda: daemon.daemon._shared.budget.used_nbytes == 0)
    raw.close()


@pytest.mark.parametrize("taken", [0, 1])
def test_an_open_get_ends_when_its_token_is_revoked(daemon, taken):
    # With nothing taken the head of the reply is under way too: it went out twice, and the caller heard nothing.
    client = daemon.client()
    client.put(b"large", {"x": np.zeros(64 << 20, np.uint8)}, fidelity="exact")
    raw = RawClient(f"unix:{daemon.socket_path}")
    request = pb.GetRequest(keys=[b"large"]).SerializeToString()
    call = raw.channel.unary_stream("/kvstored.v1.Cache/Get")(request, metadata=BEARER, timeout=120)
    for _ in range(taken):
        next(call)
    wait_until(lambda: daemon.daemon._shared.budget.used_nbytes > 0)
    reload(daemon, KEPT)
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert ended.value.code() == grpc.StatusCode.UNAUTHENTICATED
    raw.close()


def test_who_takes_not_even_the_first_frame_is_told_so(tmp_path):
    with daemon_inside(silence_s=0.2) as daemon:
        client = daemon.client()
        client.put(b"large", {"x": np.zeros(64 << 20, np.uint8)}, fidelity="exact")
        raw = RawClient(f"unix:{daemon.socket_path}")
        call = raw.get(pb.GetRequest(keys=[b"large"]))
        budget = daemon.daemon._shared.budget
        wait_until(lambda: budget.used_nbytes > 0)
        wait_until(lambda: budget.used_nbytes == 0)
        client.delete(b"large")
        wait_until(lambda: daemon.arena.used_nbytes == 0)  # nobody holds it while the reader is waited for
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert "the reader took no frame for 0.2 s" in ended.value.details()
        raw.close()
