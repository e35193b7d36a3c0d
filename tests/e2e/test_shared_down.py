"""A shared store that does not answer while a daemon is put to: memory stays bounded, what is dropped is counted.

KVSTORED_TORTURE=N: for 60 s instead of a few.
"""

import os
import time

import numpy as np
import pytest

from tests.conftest import DaemonProcess, wait_until
from tests.kvstore.shared.engines.servers import Servers

pytestmark = pytest.mark.slow
SECONDS = 60.0 if os.environ.get("KVSTORED_TORTURE") else 3.0
MIB = 1 << 20
BUFFER_NBYTES = 8 * MIB
CHUNK = np.random.default_rng(0).standard_normal((2, 4, 256, 2, 64)).astype(np.float32)
STEADY_PUTS = 100
"""Hot, warm and cold are full, and the allocator has what it wants."""


@pytest.fixture
def servers():
    found = Servers()
    yield found
    found.resume()
    found.close()


def put(client, n: int) -> None:
    k, v = CHUNK
    assert client.put_many([(b"%032d" % n, {"k": k, "v": v})], chain=True) == 1


def test_memory_stays_within_the_queues_bound_while_the_store_is_down_under_puts(servers, daemon_factory, tmp_path):
    for name, digit in (("share", "1"), ("seal", "2")):
        (tmp_path / name).write_text(digit * 64)
        (tmp_path / name).chmod(0o600)
    daemon: DaemonProcess = daemon_factory(
        store='[store.hot]\ncapacity_nbytes = "32MiB"\n[store.warm]\ncapacity_nbytes = "8MiB"\n'
        '[store.cold]\ncapacity_nbytes = "32MiB"\n'
        f'[store.shared]\nurl = "{servers.url}"\nsecret_file = "{tmp_path}/share"\ntokens_min = 0\n'
        f'key_files = {{ "*" = "{tmp_path}/seal" }}\nbuffer_nbytes = {BUFFER_NBYTES}\n'
    )
    client = daemon.client(framework="numpy")
    for n in range(STEADY_PUTS):
        put(client, n)
        if n % 10 == 9:  # the queue has room for so many
            wait_until(lambda due=n + 1: client.stats().values["shared_published"] == due)
    before = daemon.rss_nbytes()
    servers.pause()
    most, longest_s, n = before, 0.0, STEADY_PUTS
    began = time.monotonic()
    while time.monotonic() < began + SECONDS or not client.stats().values.get("shared_dropped_full"):
        begun = time.monotonic()
        put(client, n)
        longest_s = max(longest_s, time.monotonic() - begun)
        n += 1
        if n % 10 == 0:
            most = max(most, daemon.rss_nbytes())
    values = client.stats().values
    print(  # noqa: T201 - with pytest -s
        f"\n{n - STEADY_PUTS} puts in {time.monotonic() - began:.0f} s, the longest {1000 * longest_s:.0f} ms; RSS "
        f"{before / MIB:.0f} -> at most {most / MIB:.0f} MiB; dropped {values['shared_dropped_full']:.0f}"
    )
    assert values["shared_queue_nbytes"] <= BUFFER_NBYTES
    assert most <= 1.05 * (before + BUFFER_NBYTES)
    servers.resume()
    wait_until(lambda: client.stats().values["shared_published"] > STEADY_PUTS, "what waited is published")
