"""A daemon that answers anything at all: each call ends with a right answer, a miss or a KvstoreError, in its time.

Real answers are taken from a real daemon once, and then changed: bytes flipped, cut off, fields replaced, repeated and
left out, by a seed. Over the lease socket there is no checksum, so there only tensors of an entry's own header count.
"""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch  # noqa: F401 - before anything is timed
import xxhash

from kvstore.errors import KvstoreError
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import build_frame
from tests.conftest import environment, wait_until

KEY = b"asked for"
X = np.arange(5000, dtype=np.uint16)
TIMEOUT_S = 5.0
DESCRIPTORS = Path("/proc/self/fd")


def mutated(rng, data):
    """Some other bytes than these, alike enough to get far."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind = rng.randrange(5)
        at = rng.randrange(len(changed)) if changed else 0
        if kind == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randrange(40)]
        else:
            del changed[at : at + rng.randrange(1, 10)]
    return bytes(changed)


HUGE = (0, 1, 7, 63, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def false_shape(rng, item):
    tensor = item.header.tensors[0] if item.header.tensors else item.header.tensors.add(name="x", dtype=1)
    huge = rng.choice(HUGE)
    tensor.shape[:] = rng.choice(([huge], [huge] * 2, [huge] * 9, [huge, 0, huge]))


def false_type(rng, item):
    for tensor in item.header.tensors:
        tensor.dtype = rng.choice((0, 7, 99))


def false_name(rng, item):
    for tensor in item.header.tensors:
        tensor.name = rng.choice(("", "\n", "y", "x" * 500))


def false_place(rng, item):
    item.start = rng.choice(HUGE)
    if rng.random() < 0.5:
        item.segment = rng.choice(HUGE) % 2**32


def false_index(rng, item):
    item.header.index = rng.choice(HUGE) % 2**32


def false_packing(rng, item):
    item.header.packed.add(
        encoding=rng.choice(("raw", "nf4", "nf4-kv2", "nf4-kv", "int8", "?")),
        attrs=rng.choice(("", "[]", "{", "[" * 4000, '{"shape": 1e999}')),
        parts=[pb.TensorSpec(name=rng.choice(("", "a")), dtype=6, shape=[rng.choice(HUGE) % 10_000])],
    )


def false_receipt(rng, item):
    item.header.lossy = True
    item.header.relative_errors.extend([float("nan")] * rng.randrange(3))


FALSE_ITEMS = (false_shape, false_type, false_name, false_place, false_index, false_packing, false_receipt)


def false_numbers(rng, reply):
    reply.lease, reply.complete = rng.choice(HUGE), not reply.complete
    if rng.random() < 0.5:
        reply.number = rng.choice(HUGE)


def false_segments(rng, reply):
    for segment in reply.segments:
        segment.nbytes = rng.choice(HUGE)
    reply.segments.add(number=rng.choice(HUGE) % 2**32, nbytes=rng.choice(HUGE), writable=rng.random() < 0.5)


def false_error(rng, reply):
    reply.error.kind = rng.choice(("", "KvstoreError", "annotations", "UseStream", "__doc__", "RecordCorrupt"))


def false_counts(rng, reply):
    reply.touch.touched = reply.delete.deleted = reply.put.stored = rng.choice(HUGE) % 2**32
    reply.match.held.extend([pb.Held(tier=rng.randrange(5), nbytes=rng.choice(HUGE))] * rng.randrange(4))


def false_items(rng, reply):
    reply.leased[:] = list(reply.leased) * rng.randrange(4)


FALSE_REPLIES = (false_numbers, false_segments, false_error, false_counts, false_items)


def false_reply(rng, reply):
    """A LeaseReply that says what cannot be."""
    items = [pb.Leased.FromString(item) for item in reply.leased]
    for item in items:
        rng.choice(FALSE_ITEMS)(rng, item)
    reply.leased[:] = [item.SerializeToString() for item in items]
    if not items or rng.random() < 0.3:
        rng.choice(FALSE_REPLIES)(rng, reply)
    return reply


class FalseLeaseSocket:
    """Stands before a real daemon's lease socket and changes its answers."""

    def __init__(self, path, real, rng):
        self._real = real
        self._rng = rng
        self.honest = True
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(path)
        self._sock.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._sock.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near):
        with near, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as far, suppress(OSError):
            far.connect(self._real)
            while call := near.recv(1 << 18):
                far.send(call)
                asked = pb.LeaseCall.FromString(call)
                if not asked.ingest_nbytes and not any(
                    map(asked.HasField, ("get", "put", "match", "touch", "delete", "pin"))
                ):
                    continue
                data, fds, _, _ = socket.recv_fds(far, 1 << 18, 16)
                if not data or not self._answer(near, data, fds):
                    return

    def _answer(self, near, data, fds):
        if not self.honest:
            data, fds = self._changed(data, fds)
        try:
            if data is None:
                return False
            socket.send_fds(near, [data], fds) if fds else near.send(data)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _changed(self, data, fds):
        kind = self._rng.random()
        if kind < 0.03:
            return None, fds
        if kind < 0.5:
            return mutated(self._rng, data) or b"\0", fds
        if kind < 0.6:  # other descriptors, more of them, or none
            extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(self._rng.randrange(3))]
            return data, self._rng.choice(([*fds, *extra], [*extra, *fds]))
        return false_reply(self._rng, pb.LeaseReply.FromString(data)).SerializeToString()[: 1 << 18], fds

    def close(self):
        self._sock.close()


def each_call(client, rng):
    """Each verb of the data path, by itself, so that an error of one is not the end of the others."""
    keys = [KEY, b"other"]

    def counts(count):
        assert 0 <= count <= len(keys)

    for call in (
        lambda: client.get(KEY),
        lambda: client.get(KEY, out={"x": np.empty_like(X)}),
        lambda: counts(len(client.get_many(keys))),
        lambda: counts(client.put_many([(key, {"x": X}) for key in keys])),
        lambda: counts(int(client.match(keys))),
        lambda: counts(len(client.locate(keys))),
        lambda: counts(client.touch(keys)),
        lambda: counts(client.delete(b"nobody")),
        lambda: counts(client.pin(b"nobody")),
        lambda: client.empty((rng.randrange(100),), "uint8"),
        lambda: leased(client),
    ):
        began = time.monotonic()
        with suppress(KvstoreError):
            call()
        assert time.monotonic() - began < 6 * TIMEOUT_S


def leased(client):
    with client.lease_many([KEY, b"other"]) as hits:
        assert len(hits) <= 2
        for hit in hits:
            if hit is not None:
                [x.sum() for x in hit.tensors.values()]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_false_answers_over_the_lease_socket_are_misses(shared_daemon, tmp_path_factory, seed, framework):
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("k")
    (directory / "k").symlink_to(shared_daemon.socket_path)
    real = str(shared_daemon.socket_path) + ".lease"
    front = FalseLeaseSocket(str(directory / "k.lease"), real, rng)
    descriptors = len(list(DESCRIPTORS.iterdir()))
    try:
        for round_ in range(12):
            with Client(
                f"unix:{directory}/k", framework=framework, timeout_s=TIMEOUT_S, decode="client", on_error="miss"
            ) as client:
                front.honest = round_ % 3 != 0  # a connection that begins well, or does not
                client.put(KEY, {"x": X})
                front.honest = False
                for _ in range(5):
                    each_call(client, rng)
                    if client._pool is not None:
                        client._pool._not_before = 0.0  # a daemon that begins badly is left alone for a second
    finally:
        front.close()
    wait_until(lambda: len(list(DESCRIPTORS.iterdir())) <= descriptors + 4)


def frames_of(rng):
    """The frames of a get's answer: right, then changed."""
    header = pb.GetHeader(
        index=0,
        tensors=[pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT16, shape=X.shape)],
        nbytes=X.nbytes,
        tier=pb.TIER_HOT,
        encoding="raw",
        boot_epoch=5,
    )
    if rng.random() < 0.4:
        huge = rng.choice((0, 1, 2**31, 2**32, 2**40, 2**63))
        change = rng.randrange(6)
        if change == 0:
            header.tensors[0].shape[:] = [huge]
            header.nbytes = min(2 * huge, 2**64 - 1)
        elif change == 1:
            header.index = huge % 2**32
        elif change == 2:
            header.tensors[0].shape[:] = [huge, 0, huge, huge]
            header.nbytes = 0
        elif change == 3:
            header.tier = 77
        else:
            header.packed.add(
                encoding=rng.choice(("raw", "nf4", "nf4-kv2", "nf4-kv", "int8")),
                parts=[pb.TensorSpec(name=rng.choice(("", "scale")), dtype=6, shape=[X.nbytes])],
                attrs=rng.choice(("", "{}", "[", '{"role": "packed", "token_axis": 99}', '{"role": 1}')),
            )
    data = X.tobytes()
    frame = build_frame(
        header.SerializeToString(),
        [memoryview(data)],
        pb.EntryEnd(xxh3=xxhash.xxh3_64_intdigest(data)).SerializeToString(),
    )
    return [mutated(rng, frame) if rng.random() < 0.7 else frame for _ in range(rng.choice((0, 1, 1, 1, 2)))]


@contextmanager
def false_daemon(rng):
    """A gRPC server that answers everything with something."""

    def unary(request, _):
        kind = rng.randrange(3)
        if kind == 0:
            return rng.randbytes(rng.randrange(60))
        reply = rng.choice(
            (
                pb.MatchReply(held=[pb.Held(tier=9, nbytes=2**63)] * 5),
                pb.TouchReply(touched=2**31),
                pb.StatsReply(values={"uptime_s": float("nan")}, tiers=[pb.TierStats(tier=99)]),
                pb.InspectReply(entry=pb.EntryInfo(tiers=[7, 8], fidelity=42)),
                pb.ExplainReply(explanations=[pb.Explanation(entry=pb.EntryInfo(tiers=[7]))]),
            )
        ).SerializeToString()
        return mutated(rng, reply) if kind == 1 else reply

    def stream(request, _):
        yield from frames_of(rng)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            verb = details.method.rpartition("/")[2]
            if verb in ("Get", "List", "Verify"):
                return grpc.unary_stream_rpc_method_handler(stream)
            if verb == "Put":
                return grpc.stream_unary_rpc_method_handler(lambda frames, context: unary(list(frames), context))
            return grpc.unary_unary_rpc_method_handler(unary)

    patient = [("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Handler()], options=patient)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"tcp:127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_false_answers_over_grpc_are_misses_and_never_other_bytes(seed, framework):
    rng = random.Random(seed)
    with (
        false_daemon(rng) as address,
        Client(address, framework=framework, timeout_s=TIMEOUT_S, decode="client", on_error="miss") as client,
    ):
        for _ in range(40):
            hit = client.get(KEY)
            if hit is not None and "x" in hit.tensors and hit.encoding == "raw":
                assert np.array_equal(np.asarray(hit.tensors["x"]).view(np.uint16), X)
            each_call(client, rng)
            for call in (
                client.stats,
                lambda: client.inspect(KEY),
                lambda: client.explain(KEY),
                lambda: list(client.entries()),
                lambda: list(client.verify()),
                lambda: client.evict(KEY),
            ):
                with suppress(KvstoreError):
                    call()


OUT_OF_DESCRIPTORS = """
import os, resource, sys
from kvstored_client import Client
from kvstore.errors import TierUnavailable
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
kept = []
try:
    while True:
        kept.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
left = int(sys.argv[1])
for fd in kept[:left]:
    os.close(fd)
for address in sys.argv[2:]:
    # One is enough for shared memory, where the miss is no error.
    client = Client(address, shared_memory=not left)
    assert client.get(b"k") is None
    strict = Client(address, on_error="raise", shared_memory=not left)
    try:
        strict.get(b"k")
    except TierUnavailable:
        continue
    raise SystemExit("no error")
for fd in kept[left:]:
    os.close(fd)
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_client_out_of_descriptors_answers_misses(shared_daemon, left):
    """gRPC's OSError came out of it; with one to three left gRPC's start aborted the process."""
    ended = subprocess.run(
        [sys.executable, "-c", OUT_OF_DESCRIPTORS, str(left), *shared_daemon.address.split(",")],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.stdout == "done\n", ended.stderr
