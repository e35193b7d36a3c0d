"""What connections hold: each has a share, whoever came first."""

import os
import socket
from dataclasses import dataclass

import pytest
import torch

from kvstored.calls.budget import Budget
from kvstored.doors import lending
from kvstored.doors.lending import HELD_MAX, LEASES_MAX, Lending
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import DaemonProcess, wait_until
from tests.kvstored.conftest import running_daemon

MIB = 1 << 20
SEGMENT = 16 * MIB


@dataclass(eq=False)
class Connection:
    uid: int
    ingest_nbytes: int = 0
    held: int = 0
    ended: bool = False

    def hang_up(self) -> None:
        self.ended = True


class Door:
    """Connections that ask for segments of 16 MiB, and give them back when they are hung up."""

    def __init__(self) -> None:
        self.lending = Lending(Budget(256 * MIB))
        self.connections: list[Connection] = []

    def connect(self, uid: int) -> Connection:
        self.connections.append(Connection(uid))
        return self.connections[-1]

    def ask(self, connection: Connection, nbytes: int = SEGMENT) -> bool:
        lent = self.lending.lend(nbytes, connection, list(self.connections))
        connection.ingest_nbytes += nbytes if lent else 0
        for ended in [one for one in self.connections if one.ended]:
            self.connections.remove(ended)
            self.lending.ingest.give_back(ended.ingest_nbytes)
        return lent

    def take_all(self, connection: Connection) -> None:
        while self.ask(connection):
            pass


@pytest.fixture
def door() -> Door:
    return Door()


def test_one_connection_takes_no_more_than_half(door: Door) -> None:
    greedy = door.connect(1)
    door.take_all(greedy)
    assert greedy.ingest_nbytes == 128 * MIB
    assert door.ask(door.connect(1))


def test_a_user_that_came_later_gets_its_share_of_what_another_one_holds(door: Door) -> None:
    greedy = [door.connect(1) for _ in range(2)]
    for connection in greedy:
        door.take_all(connection)
    late = door.connect(2)
    assert not door.ask(late), "this call goes over the stream"
    assert door.ask(late), "the next one finds room"
    assert sum(connection.ended for connection in greedy) == 1
    assert door.lending.hangups == 1


def test_many_small_connections_of_one_user_have_one_users_share(door: Door) -> None:
    greedy = [door.connect(1) for _ in range(16)]
    assert all(door.ask(connection) for connection in greedy)
    late = door.connect(2)
    assert not door.ask(late)
    assert sum(connection.ended for connection in greedy) == 0, "16 MiB are over the share of one of 17"
    late_and_small = door.connect(3)
    assert not door.ask(late_and_small, 8 * MIB)
    assert sum(connection.ended for connection in greedy) == 1
    assert door.ask(late_and_small, 8 * MIB)


def test_who_has_its_share_ends_nobody(door: Door) -> None:
    one, two = door.connect(1), door.connect(2)
    door.take_all(one)
    door.take_all(two)
    for _ in range(3):
        assert not door.ask(one)
        assert not door.ask(two)
    assert not one.ended
    assert not two.ended


def test_workers_of_one_user_have_equal_shares_too(door: Door) -> None:
    first, second, third = (door.connect(1) for _ in range(3))
    door.take_all(first)
    door.take_all(second)
    assert not door.ask(third)
    assert first.ended or second.ended
    assert door.ask(third)


def test_leases_are_bounded_in_number_and_in_entries() -> None:
    held = Lending(Budget(MIB))
    one = Connection(1)
    assert held.may_hold(LEASES_MAX - 1, one, [one])
    assert not held.may_hold(LEASES_MAX, one, [one])
    one.held = HELD_MAX
    assert not held.may_hold(1, one, [one])


def test_a_user_with_many_connections_leaves_leases_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "HELD_TOTAL", 4 * HELD_MAX)
    held = Lending(Budget(MIB))
    many = [Connection(1, held=HELD_MAX - 1) for _ in range(3)]
    other = Connection(2, held=HELD_MAX // 2)
    assert not held.may_hold(1, many[0], [*many, other])
    assert held.may_hold(1, other, [*many, other])
    assert held.may_hold(1, many[0], many)


def asked(daemon: DaemonProcess, *calls: pb.LeaseCall) -> list[pb.LeaseReply]:
    """The replies to calls of one connection to the lease socket."""
    replies = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect(f"{daemon.socket_path}.lease")
        for call in calls:
            sock.send(call.SerializeToString())
            data, fds, _, _ = socket.recv_fds(sock, 1 << 18, 8)
            replies.append(pb.LeaseReply.FromString(data))
            for fd in fds:
                os.close(fd)
    return replies


def test_shared_memory_for_puts_needs_the_right_to_put() -> None:
    with running_daemon('tokens = "{dir}/tokens.toml"') as daemon:
        entry = f'name = "reader"\nuid = {os.geteuid()}\nsha256 = "{"0" * 64}"\nrights = ["read"]\n'
        (daemon.directory / "tokens.toml").write_text(f"[[token]]\n{entry}")
        daemon.start(wait=False)
        wait_until((daemon.directory / "k.sock.lease").exists)
        (reply,) = asked(daemon, pb.LeaseCall(ingest_nbytes=1 << 20))
        assert reply.error.kind == "PermissionDenied"
        assert not reply.segments


def test_a_connection_that_releases_nothing_is_told_to_use_the_stream(shared_daemon: DaemonProcess) -> None:
    with Client(shared_daemon.address) as client:
        client.put(b"held", {"k": torch.ones(16)})
        get = pb.LeaseCall(get=pb.GetRequest(keys=[b"held"] * 4096))
        replies = asked(shared_daemon, *[get] * (HELD_MAX // 4096 + 1))
        assert all(reply.lease or reply.error.kind == "UseStream" for reply in replies)
        assert replies[0].lease or "is over" in replies[0].error.message, "or the reply is too long for a packet"
        few = pb.LeaseCall(get=pb.GetRequest(keys=[b"held"]))
        replies = asked(shared_daemon, *[few] * (LEASES_MAX + 1))
        assert all(reply.lease for reply in replies[:-1])
        assert replies[-1].error.kind == "UseStream"
        assert f"{LEASES_MAX} leases of {LEASES_MAX} entries are held" in replies[-1].error.message
        wait_until(lambda: client.stats().values["leased_entries"] == 0)
