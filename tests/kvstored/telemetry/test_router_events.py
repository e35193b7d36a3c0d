"""Events for routers: a SUB socket is told what a daemon holds, as vLLM's own publisher writes it."""

import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from click.testing import CliRunner

from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.errors import ConfigError
from kvstore.metadata.block_events import CLEARED, BlockEvents, KeyRemoved, KeyStored
from kvstore.store import Store
from kvstored.cli import cli
from kvstored.cli.top import screen
from kvstored.settings import ServerSettings
from kvstored.telemetry.router_events import END, RouterEvents, open_events, told
from tests.conftest import free_port, wait_until
from tests.kvstored.conftest import running_daemon

CHUNK = np.ones((2, 256, 2, 8), np.float32)
Seen = list[tuple[str, bytes]]


class Base(msgspec.Struct, omit_defaults=True, tag=True):
    """The classes of vLLM 0.32's vllm/distributed/kv_events.py."""


class BlockStored(Base):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(Base):
    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(Base):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    """A router's side. seen: (what, key) in order."""

    def __init__(self, endpoint: str, topic: bytes = b"") -> None:
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.subscribe(topic)
        self.socket.connect(endpoint)
        self.numbers: list[int] = []
        self.events: list[Any] = []

    @property
    def seen(self) -> Seen:
        return [(type(e).__name__, key) for e in self.events for key in getattr(e, "block_hashes", [b""])]

    def take(self) -> "Subscriber":
        while self.socket.poll(20):
            topic, number, payload = self.socket.recv_multipart()
            assert topic == b"kv@host"
            self.numbers.append(int.from_bytes(number, "big"))
            self.events += msgspec.msgpack.decode(payload, type=KVEventBatch).events
        return self


@pytest.fixture
def subscribed(tmp_path: Path):
    made: list[Subscriber] = []

    def subscribe(endpoint: str, topic: bytes = b"kv@host") -> Subscriber:
        made.append(Subscriber(endpoint, topic))
        return made[-1]

    yield subscribe
    for each in made:
        each.socket.close(linger=0)


def test_a_router_is_told_of_a_put_an_eviction_and_a_delete_of_a_daemon(subscribed):
    room = 'ttl_s = 600\npromote_after = 0\n[store.hot]\ncapacity_nbytes = "1MiB"\n[store.warm]\ncapacity_nbytes = 0\n'
    with running_daemon(
        'events_endpoint = "ipc://{dir}/e.sock"\nevents_replay_endpoint = "ipc://{dir}/r.sock"\n'
        'events_topic = "kv@host"',
        room + '[store.cold]\ncapacity_nbytes = "1MiB"\n',
    ) as daemon:
        endpoint = f"ipc://{daemon.directory}/e.sock"
        router = subscribed(endpoint)
        daemon.start()
        assert (daemon.directory / "e.sock").stat().st_mode & 0o777 == 0o660
        client = daemon.client(framework="numpy")

        def put(key: bytes, parent: bytes | None = None) -> None:
            client.put(key, {"kv": CHUNK}, parent=parent)

        # ZMQ connects when it likes: what is put until then is only in the replay.
        wait_until(lambda: (put(b"early"), router.take().seen)[1], "the router is subscribed")
        router.events.clear()
        put(b"first")
        put(b"second", b"first")
        wait_until(lambda: ("BlockStored", b"second") in router.take().seen)
        second = next(e for e in router.events if b"second" in e.block_hashes)
        assert (second.parent_block_hash, second.block_size, second.token_ids) == (b"first", 256, [])
        assert second.medium == "STORAGE"
        client.delete(b"first")
        wait_until(lambda: ("BlockRemoved", b"first") in router.take().seen)
        assert ("BlockRemoved", b"second") in router.seen, "what continued it has left, too"
        for n in range(300):
            client.put(b"big %d" % n, {"x": np.random.default_rng(n).standard_normal(16_000).astype(np.float32)})
        wait_until(lambda: ("BlockRemoved", b"big 0") in router.take().seen, "evicted")
        keys = [b"big 0", b"big 299", b"second"]
        held = {key for key, found in zip(keys, client.locate(keys), strict=True) if found is not None}
        wait_until(lambda: believed(router.take().seen) & set(keys) == held)
        assert router.numbers == list(range(router.numbers[0], router.numbers[-1] + 1)), "no gap"
        values = client.stats().values
        assert values["block_events_published"] > 300 > values["block_events_dropped"] == 0
        assert f"events for routers: {values['block_events_published']:,.0f} published, 0 dropped" in screen(
            None, client.stats(), 1.0
        )
        replayed = replay(f"ipc://{daemon.directory}/r.sock", 0)
        assert [n for n, _ in replayed] == list(range(len(replayed)))
        assert type(replayed[0][1].events[0]).__name__ == "AllBlocksCleared"
        assert replay(f"ipc://{daemon.directory}/r.sock", 10**6) == []
        assert daemon.stop() == 0
        wait_until(lambda: router.take().seen[-1] == ("AllBlocksCleared", b""), "a daemon that stops holds nothing")
        assert "Traceback" not in daemon.log


def believed(seen: Seen) -> set[bytes]:
    """The keys that a router takes for held."""
    found: set[bytes] = set()
    for what, key in seen:
        if what == "AllBlocksCleared":
            found.clear()
        elif what == "BlockStored":
            found.add(key)
        else:
            found.discard(key)
    return found


def replay(endpoint: str, begin: int) -> list[tuple[int, KVEventBatch]]:
    """What a router gets that asks for the messages from a number on."""
    found: list[tuple[int, KVEventBatch]] = []
    with zmq.Context.instance().socket(zmq.DEALER) as asking:
        asking.linger = 0
        asking.connect(endpoint)
        asking.send_multipart((b"", begin.to_bytes(8, "big")))
        while asking.poll(30_000):
            _, topic, number, payload = asking.recv_multipart()
            if number == END:
                return found
            assert topic == b"kv@host"
            found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload, type=KVEventBatch)))
    pytest.fail("no end of the replay")


def test_events_have_the_bytes_that_vllms_publisher_gives_them():
    events = [CLEARED, KeyStored(b"a", None, 256), KeyStored(b"b", b"a", 7), KeyRemoved(b"b"), KeyRemoved(b"a")]
    theirs = KVEventBatch(1.5, [
        AllBlocksCleared(),
        BlockStored([b"a"], None, [], 256, None, "STORAGE", None),
        BlockStored([b"b"], b"a", [], 7, None, "STORAGE", None),
        BlockRemoved([b"b", b"a"], "STORAGE"),
    ], 0)  # fmt: skip
    assert msgspec.msgpack.encode([1.5, told(events), 0]) == msgspec.msgpack.encode(theirs)


def test_who_has_every_event_believes_in_no_key_that_is_not_held_however_many_were_dropped():
    with Store.open(StoreConfig(hot=HotConfig(1 << 20), warm=WarmConfig(0)), background=False) as store:
        store._r.events = events = BlockEvents(at_most=8)
        seen: Seen = []
        rng = np.random.default_rng(3)
        for turn in range(400):
            key = b"%d" % rng.integers(30)
            if rng.random() < 0.5:
                store.delete(key)
            else:
                store.put(key, {"x": np.zeros(int(rng.integers(1, 40_000)), np.float32)})
            if rng.random() < 0.1 or turn == 399:
                seen += [(type(e).__name__, getattr(e, "key", b"")) for e in events.take(100)]
                names = {"KeyStored": "BlockStored", "KeyRemoved": "BlockRemoved", "Cleared": "AllBlocksCleared"}
                held = {key for key in (b"%d" % n for n in range(30)) if store.locate([key])[0] is not None}
                assert believed([(names[what], key) for what, key in seen]) <= held
        assert events.dropped > 50
        assert any(what == "Cleared" for what, _ in seen[1:])


def test_a_put_waits_for_no_publisher_and_what_does_not_fit_is_counted():
    with Store.open(StoreConfig(hot=HotConfig(1 << 20), warm=WarmConfig(0)), background=False) as store:
        store._r.events = BlockEvents(at_most=2)
        for n in range(10):
            assert store.put(b"%d" % n, {"x": np.zeros(4)})
        assert store._r.events.dropped == 9
        assert len(store._r.events.take(100)) == 2


def test_a_chain_is_told_root_first_and_a_refused_chunk_not_at_all():
    with Store.open(StoreConfig(hot=HotConfig(1 << 20), warm=WarmConfig(0)), background=False) as store:
        events = store.block_events()
        assert store.put_many([(b"%d" % n, {"x": np.zeros(4)}) for n in range(4)], chain=True) == 4
        assert store.put(b"stray", {"x": np.zeros(4)}, parent=b"nowhere") is False
        assert [(e.key, e.parent) for e in events.take(100)[1:]] == [
            (b"0", None), (b"1", b"0"), (b"2", b"1"), (b"3", b"2"),
        ]  # fmt: skip


def test_a_publisher_publishes_nothing_where_none_subscribes_and_ends(tmp_path):
    blocks = BlockEvents()
    found = RouterEvents(blocks, ServerSettings(events_endpoint=f"ipc://{tmp_path}/e"))
    with pytest.raises(ConfigError, match="another kvstored"):
        RouterEvents(blocks, ServerSettings(events_endpoint=f"ipc://{tmp_path}/e"))
    found.start()
    blocks.stored(b"a", None, 1)
    wait_until(lambda: found.gauges()["block_events_published"] == 2)
    found.close()
    found.close()
    assert not [t for t in threading.enumerate() if t.name == "kvstored-events"]
    again = RouterEvents(blocks, ServerSettings(events_endpoint=f"ipc://{tmp_path}/e"))
    again.close()


def test_a_port_that_is_taken_is_said():
    port = free_port()
    blocks, settings = BlockEvents(), ServerSettings(events_endpoint=f"tcp://localhost:{port}")
    first = RouterEvents(blocks, settings)
    try:
        with pytest.raises(ConfigError, match=f"cannot publish on tcp://localhost:{port}: .*server.events_endpoint"):
            RouterEvents(blocks, settings)
    finally:
        first.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"events_endpoint": "tcp://0.0.0.0:5557"}, r"on the loopback, got .*server.insecure_events"),
        ({"events_endpoint": "tcp://*:5557"}, r"server.insecure_events = true"),
        ({"events_endpoint": "127.0.0.1:5557"}, r"must be ipc:///PATH"),
        ({"events_endpoint": "tcp://127.0.0.1:0"}, r"must be ipc:///PATH"),
        ({"events_endpoint": "ipc://@abstract"}, r"must be ipc:///PATH"),
        ({"events_endpoint": "ipc:///" + 107 * "a"}, r"at most 107 bytes"),
        ({"events_replay_endpoint": "tcp://127.0.0.1:5558"}, r"events_replay_endpoint is set and .*events_endpoint is"),
        ({"events_topic": "kv"}, r"events_topic is set and"),
        ({"events_endpoint": "tcp://[::1]:5557", "events_replay_endpoint": "tcp://host:1"}, r"events_replay_endpoint"),
    ],
)
def test_an_endpoint_that_strangers_could_reach_or_that_is_none_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServerSettings(**settings)


def test_an_endpoint_beyond_the_loopback_is_taken_where_that_is_said():
    assert ServerSettings(events_endpoint="tcp://*:5557", insecure_events=True).events_endpoint == "tcp://*:5557"


@pytest.mark.parametrize("missing", ["zmq", "msgspec.msgpack"])
def test_libraries_that_are_missing_are_said_with_exit_code_2(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstored\[events\]'"):
        open_events(None, ServerSettings(events_endpoint=f"ipc://{tmp_path}/e"))
    assert open_events(None, ServerSettings()) is None
    file = tmp_path / "k.toml"
    file.write_text(f'[server]\nevents_endpoint = "ipc://{tmp_path}/e"\n')
    done = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert (done.exit_code, "kvstored[events]" in done.output) == (2, True), done.output
