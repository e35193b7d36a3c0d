"""What other hosts have, through both doors of a daemon, and that a store that hangs holds nobody up."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.clock import SystemClock
from kvstore.config import SharedConfig
from kvstore.errors import ConfigError
from kvstore.shared import SharedUnavailable
from kvstored.access.tenant_view import read_secret, tenants_secret
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.kvstore.shared.memory import MemoryEngine, MemoryServer
from tests.kvstored.inside import InsideDaemon, daemon_inside
from tests.raw import RawClient

WAIT_S = 60.0


class HangingEngine(MemoryEngine):
    """One that hangs in the named verb until it is released, or for as long as its caller allows."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server)
        self.hangs_in = ""
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()

    def _trip(self, verb: str, names: Sequence[str], timeout_s: float) -> None:
        own = names and any(data[:4] == b"KVSE" for data, _ in [self.server.objects.get(names[0], (b"", 0))])
        if verb == self.hangs_in and len(names) > 1 and not own:
            self.entered.release()
            if not self.release.wait(min(timeout_s, WAIT_S)):
                raise SharedUnavailable("timeout", f"no answer within {timeout_s} s")
        super()._trip(verb, names, timeout_s)


@pytest.fixture
def settings(tmp_path: Path) -> SharedConfig:
    secret = tmp_path / "share.key"
    secret.write_text("1" * 64)
    secret.chmod(0o600)
    return SharedConfig(
        url="valkey://nowhere:1", secret_file=str(secret), clear=True, tokens_min=0, lookup_s=30.0, fetch_s=30.0
    )


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(SystemClock())


@pytest.fixture
def daemon(settings: SharedConfig, server: MemoryServer) -> Iterator[InsideDaemon]:
    with daemon_inside(outside={"shared": settings, "engine": HangingEngine(server)}) as found:
        yield found


@pytest.fixture
def published(settings: SharedConfig, server: MemoryServer) -> Iterator[list[bytes]]:
    """The keys of a chain that another daemon has put."""
    keys = [b"chunk %d" % i + bytes(24) for i in range(6)]
    with daemon_inside(outside={"shared": settings, "engine": MemoryEngine(server)}) as other:
        chunk, done = np.arange(2048, dtype=np.float32), threading.Event()
        server.at["put:done"] = lambda names: done.set()
        other.client().put_many([(key, {"x": chunk + i}) for i, key in enumerate(keys)], chain=True)
        assert done.wait(WAIT_S)
        assert len(server.names()) == 6
        server.at.clear()
        yield keys


def engine_of(daemon: InsideDaemon) -> HangingEngine:
    return daemon.store._sharing.source.outside.engine


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_daemon_gives_out_what_another_one_has_put(daemon, published, shared_memory):
    client = daemon.client(shared_memory=shared_memory)
    match = client.match(published)
    assert [held.tier for held in match.held] == ["shared"] * 6
    hits = client.get_many(published, leading=True)
    assert [hit.tier for hit in hits] == ["warm"] * 6
    assert [held.tier for held in client.match(published).held] == ["warm"] * 6
    assert client.explain(published[0])[0].shared.startswith("yes, 0.0 MiB, 3")


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("verb", ["heads", "get"])
def test_a_store_that_hangs_holds_up_no_call_on_what_is_held_here(daemon, published, verb, shared_memory):
    engine = engine_of(daemon)
    local = [b"local %d" % i for i in range(3)]
    x = {"x": np.ones(1000, np.float32)}
    daemon.client().put_many([(key, x) for key in local], chain=True)
    engine.hangs_in = verb
    waiting: list[Client] = [daemon.client(shared_memory=shared_memory) for _ in range(12)]
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda c=client: found.append(len(c.get_many(published, leading=True))))
        for client in waiting
    ]
    for thread in threads:
        thread.start()
    assert engine.entered.acquire(timeout=WAIT_S)  # one asks, the others wait for it
    for other in (daemon.client(shared_memory=True), daemon.client(shared_memory=False)):
        assert len(other.get_many(local, leading=True)) == 3
        assert other.match(local) == 3
        assert other.put(b"another", x)
        assert other.get(b"nowhere") is None
    assert found == []
    engine.release.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [6] * 12


def test_a_call_with_less_time_than_the_store_takes_is_answered_in_that_time(daemon, published):
    """The caller's deadline ends the wait: what it gets is a miss, not an error after its time."""
    engine_of(daemon).hangs_in = "heads"
    raw = RawClient(f"unix:{daemon.socket_path}")
    frames = list(raw.get(pb.GetRequest(keys=published, leading=True), timeout=2.5))
    assert [frame.HasField("miss") for frame in frames] == [True]
    raw.close()


def test_all_hosts_with_one_secret_file_have_one_tenants_secret(settings, tmp_path):
    a, b = (tenants_secret(tmp_path / name, settings) for name in "ab")
    assert a == b
    assert a == read_secret(tmp_path / "a" / "tenants.secret")  # kept, should nothing be shared one day
    assert tenants_secret(tmp_path / "c", SharedConfig()) != a


def test_a_tenants_secret_that_does_not_follow_from_the_shared_one_is_refused_with_a_sentence(settings, tmp_path):
    own = tenants_secret(tmp_path, SharedConfig())
    with pytest.raises(ConfigError, match=r"tenants\.secret is not the secret that follows from store\.shared"):
        tenants_secret(tmp_path, settings)
    assert read_secret(tmp_path / "tenants.secret") == own
    other = Path(settings.secret_file).with_name("other.key")
    other.write_text("9" * 64)
    other.chmod(0o600)
    tenants_secret(tmp_path / "b", settings)
    with pytest.raises(ConfigError, match=r"other\.key"):
        tenants_secret(tmp_path / "b", replace(settings, secret_file=str(other)))
