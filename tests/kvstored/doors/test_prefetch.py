"""A match of a client that says that gets follow: the daemon brings to memory what only its disk holds."""

import pytest
import torch

from kvstore.lookup import Lookup
from kvstored_client import Client
from tests.conftest import DaemonProcess, wait_until


@pytest.mark.parametrize("shared_memory", [True, False])
def test_what_a_match_finds_on_disk_is_in_memory_before_its_get(
    shared_daemon: DaemonProcess, shared_memory: bool
) -> None:
    keys = [b"soon %d %d" % (shared_memory, i) for i in range(3)]
    with Client(shared_daemon.address, on_error="raise", shared_memory=shared_memory) as client:
        client.put_many([(key, {"x": torch.randn(4, 256, 2, 64)}) for key in keys], chain=True)
        while any(at is not None and at.tier != "cold" for at in client.locate(keys)):
            client.demote(*keys)
        on_disk = [client.get(key) for key in keys[:1]]
        assert client.match(keys, lookup=Lookup(3, prefetch=True)) == 3
        wait_until(lambda: [at.tier for at in client.locate(keys[1:]) if at is not None] == ["warm"] * 2)
        hit = client.get(keys[0])
        assert hit is not None
        assert on_disk[0] is not None
        assert torch.equal(hit.tensors["x"], on_disk[0].tensors["x"])
