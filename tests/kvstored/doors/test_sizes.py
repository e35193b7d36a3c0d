"""Requests and headers over their limits, against a daemon: refused, and another caller does not notice."""

import time

import grpc
import pytest

from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import DaemonProcess, wait_until

TINY_KEYS = b"\x0a\x00" * ((4 << 20) // 2 - 64)
METHODS = ("Cache/Get", "Cache/Match", "Cache/Touch", "Cache/Delete", "Cache/Pin", "Admin/Evict", "Admin/Explain",
           "Admin/Demote", "Admin/Promote", "Admin/Stats", "Admin/Inspect", "Cache/Report")  # fmt: skip


def outcome(daemon: DaemonProcess, method: str, request: bytes, headers: tuple[tuple[str, str], ...] = ()) -> str:
    with grpc.insecure_channel(f"unix:{daemon.socket_path}") as channel:
        call = channel.unary_stream(f"/kvstored.v1.{method}")
        if method != "Cache/Get":
            call = channel.unary_unary(f"/kvstored.v1.{method}")
        try:
            reply = call(request, timeout=60, metadata=headers)
            _ = list(reply) if method == "Cache/Get" else reply
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


@pytest.mark.parametrize("method", METHODS)
def test_two_million_empty_keys_are_refused_in_no_time(shared_daemon: DaemonProcess, method: str) -> None:
    began, name = time.perf_counter(), f"call_mean_s_{method}"
    assert outcome(shared_daemon, method, TINY_KEYS) == "INVALID_ARGUMENT"
    with Client(shared_daemon.address) as client:
        wait_until(lambda: name in client.stats().values)  # a call is counted once its peer has been told
        spent = client.stats().values[name]
    assert spent < 0.1, f"{method} took {spent} s of the daemon, {time.perf_counter() - began} s in all"


def test_as_many_keys_as_a_call_may_name_are_answered(shared_daemon: DaemonProcess) -> None:
    keys = [b"%04d" % n + bytes(252) for n in range(4096)]
    request = pb.MatchRequest(keys=keys, every=True).SerializeToString()
    assert outcome(shared_daemon, "Cache/Match", request) == "OK"


def test_headers_over_the_limit_are_refused_and_usual_ones_are_not(shared_daemon: DaemonProcess) -> None:
    assert outcome(shared_daemon, "Admin/Stats", b"", (("baggage", "b" * 8192),)) == "OK"
    assert outcome(shared_daemon, "Admin/Stats", b"", (("x-filler", "b" * 15_000),)) == "RESOURCE_EXHAUSTED"
