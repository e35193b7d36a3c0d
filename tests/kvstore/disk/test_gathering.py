"""Gathering: only where it is worth it and allowed, all of a segment's records, step by step."""

from typing import Any

import pytest

from kvstore.disk import gathering
from kvstore.disk.gathering import Gatherer
from kvstore.disk.rows import Row
from kvstore.disk.segments import Place
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

KEYS = [Key(b"%d" % n) for n in range(5)]


class Disk:
    """Rows and segments of one sparse segment, number 7."""

    def __init__(self) -> None:
        self.slack_nbytes = 1 << 30
        self.rows = {key: Row(Place(7, 1000 * n, 100), 50, n, Meta(0, 1, 1, 1)) for n, key in enumerate(KEYS)}
        self.freed: list[Place] = []

    def sparsest(self, share: float, ignored: Any = ()) -> int | None:
        del share
        return None if 7 in ignored else 7

    def of_segment(self, number: int) -> list[Key]:
        return [key for key, row in self.rows.items() if row.place.segment == number]

    def get(self, key: Key) -> Row | None:
        return self.rows.get(key)

    def read(self, place: Place, buffers: Any) -> int:
        del buffers
        return place.nbytes

    def append(self, records: Any) -> list[Place]:
        return [Place(8, 1000 * n, 100) for n, _ in enumerate(records)]

    def write(self, put: dict[Key, Row], remove: list[Key]) -> list[Place]:
        assert remove == []
        before = [self.rows[key].place for key in put]
        self.rows.update(put)
        return before

    def free(self, places: list[Place]) -> None:
        self.freed += places


def gatherer(disk: Any, *, allowed: bool = True) -> Gatherer:
    return Gatherer(disk, disk, lambda nbytes: allowed)


def test_nothing_is_due_that_is_not_allowed_or_not_worth_it() -> None:
    disk = Disk()
    assert gatherer(disk).due(1000)
    assert not gatherer(disk, allowed=False).due(1000), "over the write budget, or on a full disk"
    disk.slack_nbytes = 0
    assert not gatherer(disk).due(1000)


def test_a_segments_records_are_moved_step_by_step_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "STEP_NBYTES", 200)
    disk = Disk()
    own = gatherer(disk)
    steps = []
    while own.due(1000):
        steps.append(own.step())
        assert len(steps) < 10
    assert [(step.records, step.nbytes) for step in steps] == [(2, 200), (2, 200), (1, 100)]
    assert sorted(place for step in steps for place in step.freed) == [Place(7, 1000 * n, 100) for n in range(5)]
    assert {row.place.segment for row in disk.rows.values()} == {8}
    assert own.step().records == 0, "once only"


def test_a_step_that_fails_gives_back_what_it_wrote_and_leaves_the_rows() -> None:
    disk = Disk()
    own = gatherer(disk)
    disk.write = lambda put, remove: (_ for _ in ()).throw(OSError("failed"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="failed"):
        own.step()
    assert len(disk.freed) == 5
    assert {row.place.segment for row in disk.rows.values()} == {7}
