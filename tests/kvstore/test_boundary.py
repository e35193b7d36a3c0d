"""Whose fault an error is: the bytes', the disk's, or nobody's when memory runs out."""

import pytest

from kvstore.boundary import Blaming, blamed
from kvstore.errors import CodecError, InvalidEntry, RecordCorrupt, TierUnavailable


def test_what_is_told_already_and_what_the_disk_says_stay_as_they_are() -> None:
    for error in (CodecError("x"), InvalidEntry("x"), OSError(5, "x")):
        assert blamed(error, RecordCorrupt, "record") is error
        with pytest.raises(type(error)), Blaming(RecordCorrupt, "record"):
            raise error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ran_out_says_nothing_about_the_bytes(error: Exception) -> None:
    """A record blamed for it would be thrown away."""
    assert isinstance(blamed(error, RecordCorrupt, "record"), TierUnavailable)


def test_anything_else_is_the_fault_of_the_bytes_and_named() -> None:
    with pytest.raises(RecordCorrupt, match="record: KeyError"), Blaming(RecordCorrupt, "record"):
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), Blaming(RecordCorrupt, "record"):
        raise KeyboardInterrupt
