"""Which calls count towards a caller's share of the interpreter, by each door, and where a call waits for it."""

import os
import time

import numpy as np
import pytest

from kvstored.access.shares import BYTE_S, CALL_S
from kvstored.access.tokens import digest, make_token
from kvstored.doors.lease_connection import LEASE_CALL_S
from kvstored_client import Client
from tests.kvstored.inside import daemon_inside

TOKEN, ADMIN = make_token(), make_token()
ENTRY = f"""[[token]]
name = "worker"
sha256 = "{digest(TOKEN)}"
rights = ["read", "write"]
tenant = "a"
uid = {os.geteuid()}
[[token]]
name = "operator"
sha256 = "{digest(ADMIN)}"
rights = ["read", "admin"]
"""
X = {"x": np.arange(100, dtype=np.uint8)}
KEYS = [b"key %d" % n for n in range(100)]


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    (tmp_path / "t").write_text(TOKEN)
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
    with daemon_inside(tokens=ENTRY, token_on_unix=True) as found:
        yield found


@pytest.fixture
def charged(daemon):
    """What is charged: (caller, seconds). What it answers, `wait_s`, each caller has to wait."""

    class Charged(list):
        wait_s = 0.0

        def __call__(self, caller, seconds):
            self.append((caller, seconds))
            return self.wait_s

    found = Charged()
    daemon.daemon._shares.charge = found
    return found


def calls_of(client):
    return {
        "match": lambda: client.match(KEYS),
        "touch": lambda: client.touch(KEYS),
        "pin": lambda: client.pin(KEYS[0]),
        "unpin": lambda: client.unpin(KEYS[0]),
        "delete": lambda: client.delete(KEYS[0]),
    }


@pytest.mark.parametrize("verb", ["match", "touch", "pin", "unpin", "delete"])
def test_a_verb_over_grpc_is_charged_for_its_call_its_bytes_and_its_work(daemon, charged, verb):
    client = daemon.client(shared_memory=False)
    client.put(KEYS[0], X)
    charged.clear()
    calls_of(client)[verb]()
    (who, for_call), (also, for_work) = charged
    assert who == also == "tenant a"
    assert for_call > CALL_S
    assert for_call < CALL_S + 10_000 * BYTE_S
    assert for_work > 0


def test_a_get_over_grpc_is_charged_for_looking_up_many_keys_and_not_for_its_bytes(daemon, charged):
    client = daemon.client(shared_memory=False)
    client.put(KEYS[0], X)
    charged.clear()
    assert client.get(KEYS[0]) is not None
    assert len(charged) == 1
    charged.clear()
    assert client.get_many(KEYS)[0] is not None
    assert len(charged) >= 2, "the call, and the look at more keys than the event loop looks at"


@pytest.mark.parametrize("verb", ["match", "touch", "pin", "unpin", "delete"])
def test_a_verb_over_the_lease_socket_is_charged_and_its_caller_s_next_call_waits(daemon, charged, verb):
    client = daemon.client()
    client.put(KEYS[0], X)
    charged.clear()
    charged.wait_s = 0.2
    began = time.monotonic()
    calls_of(client)[verb]()
    ((who, seconds),) = charged
    assert (who, seconds > LEASE_CALL_S) == ("tenant a", True)
    client.get(b"absent")
    assert time.monotonic() - began >= 0.2


def test_gets_and_puts_over_the_lease_socket_are_seen_and_not_charged(daemon, charged):
    client = daemon.client()
    client.match(KEYS)
    charged.clear()
    daemon.daemon._shares._seen.clear()
    client.put(KEYS[0], X)
    assert client.get(KEYS[0]) is not None
    assert charged == []
    assert list(daemon.daemon._shares._seen) == ["tenant a"]


def test_a_call_over_grpc_waits_before_it_is_done(daemon, charged):
    client = daemon.client(shared_memory=False)
    client.put(KEYS[0], X)
    (held,) = daemon.store.entries()
    waited = []

    async def sleep(seconds):
        waited.append((seconds, daemon.store.inspect(held.key) is not None))

    daemon.daemon._shares._sleep = sleep
    charged.wait_s = 0.05
    assert client.delete(KEYS[0]) == 1
    assert waited == [(0.05, True)], "when it waits, what it deletes is still there"


def test_an_operator_who_looks_competes_with_nobody(daemon, charged, tmp_path, monkeypatch):
    (tmp_path / "admin").write_text(ADMIN)
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "admin"))
    with Client(f"unix:{daemon.socket_path}", on_error="raise", timeout_s=60) as operator:
        operator.stats()
        assert list(operator.entries()) == []
    assert charged == []
    assert daemon.daemon._shares._seen == {}
