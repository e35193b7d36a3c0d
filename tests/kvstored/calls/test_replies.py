"""What is said of a hit beside its bytes; of one that is sent as it is held: tests/contract/test_packed.py."""

import torch

from kvstore.hit import Hit
from kvstored.calls.replies import hit_header
from kvstored_client.wire._pb import cache_pb2 as pb


def test_exact_tensors_cost_no_bytes():
    hit = Hit(b"key", {"k": torch.zeros(4)}, "hot", "raw", False, 0.0, {"k": 0.0})
    assert not pb.GetHeader.FromString(hit_header(0, hit)).relative_errors
