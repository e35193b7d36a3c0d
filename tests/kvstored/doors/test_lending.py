"""What connections hold: each has a share, whoever came first."""

from dataclasses import dataclass

import pytest

from kvstored.calls.budget import Budget
from kvstored.doors import lending
from kvstored.doors.lending import HELD_MAX, LEASES_MAX, Lending

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
