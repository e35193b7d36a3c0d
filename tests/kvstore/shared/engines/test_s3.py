"""S3 beyond the contract: where objects lie, a server that hangs, refuses or is not there."""

import asyncio
import socket
import threading

import obstore
import pytest
from obstore.store import MemoryStore

from kvstore.clock import SystemClock
from kvstore.shared import SharedUnavailable, s3
from kvstore.shared.addresses import S3Url
from kvstore.shared.guarded import Guarded
from kvstore.shared.names import PREFIX

TIMEOUT_S = 20.0
KEYS = {"access_key_id": "a", "secret_access_key": "b"}


class Silent:
    """Accepts connections and never answers."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                self.open.append(self._server.accept()[0])
            except OSError:
                return

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self.open:
            connection.close()


@pytest.fixture
def silent():
    server = Silent()
    yield server
    server.close()


@pytest.fixture
def memory():
    store = MemoryStore()
    engine = s3.S3(store, S3Url("bucket", "kv/of-us"))
    yield engine, store
    engine.close()


def test_an_object_lies_under_the_prefix_by_the_first_two_digits_of_its_name(memory):
    engine, store = memory
    digits = "ab" + "0" * 62
    engine.put([(PREFIX + digits, [b"x", b"y"]), (PREFIX + "epochs", [b"z"])], 60, TIMEOUT_S)
    found = {entry["path"]: entry["size"] for page in obstore.list(store) for entry in page}
    assert found == {f"kv/of-us/v1/ab/{digits}": 2, "kv/of-us/v1/other/epochs": 1}


def test_of_a_bucket_without_a_prefix_the_objects_lie_at_its_top():
    store = MemoryStore()
    engine = s3.S3(store, S3Url("bucket", ""))
    engine.put([(PREFIX + "0" * 64, [b"x"])], 60, TIMEOUT_S)
    assert [entry["path"] for page in obstore.list(store) for entry in page] == ["v1/00/" + "0" * 64]
    engine.close()


def test_never_more_requests_are_under_way_than_its_bound(memory, monkeypatch):
    engine, _ = memory
    now, most = [0], [0]

    async def slow(store, path, *, start, end):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.001)
        now[0] -= 1
        raise FileNotFoundError

    monkeypatch.setattr(obstore, "get_range_async", slow)
    assert engine.heads([f"{n}" for n in range(300)], TIMEOUT_S) == [None] * 300
    assert most[0] == s3.REQUESTS_MAX


def test_what_had_arrived_when_the_time_was_up_is_kept_and_the_rest_is_cancelled(memory, monkeypatch):
    engine, _ = memory
    engine.put([("a", [b"x" * 100]), ("b", [b"y" * 100])], 60, TIMEOUT_S)
    real, cancelled = obstore.get_range_async, threading.Event()

    async def sometimes(store, path, *, start, end):
        if path.endswith("/b"):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return await real(store, path, start=start, end=end)

    monkeypatch.setattr(obstore, "get_range_async", sometimes)
    assert engine.get(["a", "b", "c"], [100, 100, 100], 0.3) == [b"x" * 100, None, None]
    assert cancelled.wait(10)


def test_a_server_that_hangs_costs_its_deadline_and_then_nothing(silent):
    url = S3Url("bucket", "", silent.endpoint, "us-east-1")
    engine = Guarded(s3.S3(s3.connect(url, KEYS), url), SystemClock())
    with pytest.raises(SharedUnavailable) as caught:
        engine.heads(["a", "b"], 0.2)
    assert caught.value.reason == "timeout"
    for _ in range(20):
        with pytest.raises(SharedUnavailable) as caught:
            engine.get(["a"], [5], 60.0)
        assert caught.value.reason == "barred"
    engine.close()


def test_a_call_in_progress_ends_when_the_engine_is_closed(silent):
    url = S3Url("bucket", "", silent.endpoint, "us-east-1")
    engine = s3.S3(s3.connect(url, KEYS), url)
    reasons = []

    def ask():
        try:
            engine.heads(["a"], 60.0)
        except SharedUnavailable as error:
            reasons.append(error.reason)

    thread = threading.Thread(target=ask)
    thread.start()
    while not silent.open:
        threading.Event().wait(0.005)
    engine.close()
    thread.join(20)
    assert reasons == ["closed"]
    with pytest.raises(SharedUnavailable):
        engine.heads(["a"], 1.0)


def test_nobody_there_wrong_keys_and_a_bucket_that_is_not_there_are_told_apart(s3_server):
    s3_server.wait_for("kvstored-tests")
    for endpoint, keys, bucket, reasons in (
        ("http://127.0.0.1:1", KEYS, "kvstored-tests", {"unreachable"}),
        (s3_server.endpoint, KEYS, "kvstored-tests", {"denied", "unreachable"}),
    ):
        url = S3Url(bucket, "", endpoint, "us-east-1")
        engine = s3.S3(s3.connect(url, keys), url)
        with pytest.raises(SharedUnavailable) as caught:
            engine.put([("a", [b"x"])], 60, TIMEOUT_S)
        assert caught.value.reason in reasons
        assert "secret" not in str(caught.value)
        engine.close()
