"""What is said of a hit, and of an entry that is sent as it is held."""

import json

import numpy as np
import pytest
import torch

from kvstore.codecs import codec_for, encode_entry
from kvstore.entries.compact import packed
from kvstore.entries.entry import Entry
from kvstore.hit import Hit
from kvstore.residency.read_path import Found
from kvstore.residency.transcode import raw_entry
from kvstored.calls.replies import encoded_reply, hit_header
from kvstored_client.wire._pb import cache_pb2 as pb


def test_exact_tensors_cost_no_bytes():
    hit = Hit(b"key", {"k": torch.zeros(4)}, "hot", "raw", False, 0.0, {"k": 0.0})
    assert not pb.GetHeader.FromString(hit_header(0, hit)).relative_errors


@pytest.mark.parametrize("in_one_piece", [False, True])
def test_an_entry_as_it_is_held_is_said_in_parts_and_attributes(in_one_piece: bool):
    raw = raw_entry(b"key", {"k": torch.randn(2, 64, 2, 64), "ids": torch.arange(7)})
    entry: Entry = encode_entry(raw, codec_for("auto"))
    found = Found(b"key", "warm", packed(entry) if in_one_piece else entry, 0.5)
    reply = encoded_reply(found)
    header = pb.GetHeader.FromString(hit_header(3, reply, 9))
    assert (header.index, header.boot_epoch, header.lossy, header.encoding) == (3, 9, True, "nf4-kv2")
    assert list(header.relative_errors) == list(entry.receipt.values())
    parts = [part for tensor in entry.tensors.values() for part in tensor.parts.values()]
    assert [bytes(part) for part in reply.contents.payload] == [
        np.asarray(part.reshape(-1).view(torch.uint8)).tobytes() for part in parts
    ]
    for message, tensor in zip(header.packed, entry.tensors.values(), strict=True):
        assert message.encoding == tensor.encoding
        assert [part.name for part in message.parts] == list(tensor.parts)
        assert (json.loads(message.attrs) if message.attrs else {}) == dict(tensor.attrs)
