"""What a reply says of a hit beside its bytes."""

from math import inf, nan

import pytest

from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import read_receipt

TENSORS = [pb.TensorSpec(name=name, dtype=pb.DTYPE_FLOAT32, shape=[64]) for name in ("k", "v")]


def test_a_receipt_is_read_as_it_was_sent():
    receipt = {"k": 0.25, "v": 0.0}
    head = pb.GetHeader(tensors=TENSORS, lossy=True, relative_errors=receipt.values())
    assert read_receipt(head) == receipt


def test_exact_tensors_cost_no_bytes_and_have_no_error():
    head = pb.GetHeader(tensors=TENSORS)
    assert read_receipt(head) == {"k": 0.0, "v": 0.0}


@pytest.mark.parametrize("said", [[], [0.1], [0.1, 0.2, 0.3], [nan, -1.0]], ids=str)
def test_a_daemon_that_says_nothing_usable_of_a_lossy_entry_promises_nothing(said):
    """One of an older version sends no errors at all."""
    assert read_receipt(pb.GetHeader(tensors=TENSORS, lossy=True, relative_errors=said)) == {"k": inf, "v": inf}
