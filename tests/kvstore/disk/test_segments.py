"""Segments: what `append` returns is on the disk, in its order, and what failed is nowhere."""

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.disk import Buffer, SystemDisk
from kvstore.disk.segments import Segments


class Recording(SystemDisk):
    """Notes what is written and synced; fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.fails = ""

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._note("write")
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._note("sync")
        super().sync(fd)

    def _note(self, what: str) -> None:
        self.done.append(what)
        if what == self.fails:
            raise OSError(errno.EIO, "failed")


def test_records_are_synced_before_anybody_hears_of_their_places(tmp_path: Path) -> None:
    """Or a row would name bytes that a power cut takes."""
    disk = Recording()
    segments = Segments(tmp_path, disk, segment_nbytes=100_000)
    for _ in range(3):
        places = segments.append([[b"x" * 70_000], [b"y" * 70_000], [b"z" * 500]])
        assert disk.done[-1] == "sync"
        for place, byte in zip(places, b"xyz", strict=True):
            data = (tmp_path / f"{place.segment:08d}.seg").read_bytes()[place.offset :][: place.nbytes]
            assert data == bytes([byte]) * place.nbytes
    assert len({place.segment for place in places}) == 2, "a segment is closed once it is that long"
    unsynced = [i for i, what in enumerate(disk.done[:-1]) if what == disk.done[i + 1] == "sync"]
    assert unsynced == []
    segments.append([])
    segments.close()


@pytest.mark.parametrize("fails", ["write", "sync"])
def test_after_a_failure_nothing_is_added_to_that_segment_and_nothing_counted(tmp_path: Path, fails: str) -> None:
    disk = Recording()
    segments = Segments(tmp_path, disk, segment_nbytes=1 << 20)
    first = segments.append([[b"x" * 500]])[0]
    slack = segments.slack_nbytes
    disk.fails = fails
    with pytest.raises(OSError, match="failed"):
        segments.append([[b"y" * 500], [b"z" * 500]])
    disk.fails = ""
    assert segments.slack_nbytes == slack
    second = segments.append([[b"w" * 500]])[0]
    assert second.segment > first.segment
    segments.free([first, second])
    assert segments.slack_nbytes == 0
    segments.close()


def test_space_that_the_file_system_does_not_take_back_is_offered_again(tmp_path: Path) -> None:
    """Out of descriptors, or with a disk that failed for a moment, it stayed lost until the next start."""

    class Refusing(SystemDisk):
        refuses = True

        def punch(self, fd: int, offset: int, nbytes: int) -> None:
            if self.refuses:
                raise OSError(errno.EIO, "failed")
            super().punch(fd, offset, nbytes)

        def unlink(self, path: Path) -> None:
            if self.refuses:
                raise OSError(errno.EIO, "failed")
            super().unlink(path)

    disk = Refusing()
    segments = Segments(tmp_path, disk, segment_nbytes=200_000)
    places = segments.append([[bytes([n]) * 100_000] for n in range(1, 7)])
    assert [place.segment for place in places] == [1, 1, 2, 2, 3, 3]
    segments.free([places[0], places[2], places[3]])
    before = segments.disk_nbytes()
    assert {file.name for file in tmp_path.iterdir()} >= {"00000001.seg", "00000002.seg"}
    disk.refuses = False
    segments.free([])
    assert not (tmp_path / "00000002.seg").exists()
    assert segments.disk_nbytes() < before - 250_000
    assert (tmp_path / "00000001.seg").read_bytes()[places[1].offset :][:100_000] == b"\2" * 100_000
    assert segments._unfreed == []
    segments.close()
