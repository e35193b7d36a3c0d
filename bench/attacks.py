"""What an attacker does to a daemon, each part in a process of its own: started by bench/abuse.py, never by hand.

    python bench/attacks.py PART < the target, as one line of JSON

A part prepares what it needs, prints a line when the attack goes on, and ends when its standard input does. To add an
attack write a function of (Target) that returns the step to repeat, and name it in ATTACKS. Steps are repeated without
a pause, in as many threads as the part asks for.
"""

import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]

import grpc  # noqa: E402 - after the path
import h2.config  # noqa: E402
import h2.connection  # noqa: E402
import h2.exceptions  # noqa: E402
import numpy as np  # noqa: E402

from kvstored_client import Client  # noqa: E402
from kvstored_client.wire._pb import cache_pb2 as pb  # noqa: E402
from kvstored_client.wire.requests import MAX_NBYTES  # noqa: E402

ATTACKER_UID, STRANGER_UID = 64_001, 64_002
"""Users of the lease socket: one with an entry in the tokens file, one without."""
CONNECTIONS, STREAMS = 3, 110
"""As in the report that the first attacks were taken from: 330 calls."""
KEYS_MAX = 4096
CHILDREN = 60_000
DESCRIPTORS = 1024
SEGMENTS = 100

Step = Callable[[], None]


@dataclass(frozen=True)
class Target:
    """The daemon, and the two texts of its tokens file that the operator's part takes in turns."""

    socket_path: str
    port: int
    metrics_port: int
    pid: int
    token: str
    tokens_file: str
    with_attacker: str
    without_attacker: str

    def client(self, *, shared_memory: bool) -> Client:
        """The attacker as a usual client."""
        return Client(f"unix:{self.socket_path}", framework="numpy", shared_memory=shared_memory, timeout_s=60)

    def channel(self, number: int = 0) -> grpc.Channel:
        """A connection over TCP, where nobody is known by a socket's permissions."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1), ("number", number)]
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options)

    def lease(self) -> socket.socket:
        """A connection to the lease socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(5)
        sock.connect(f"{self.socket_path}.lease")
        return sock


class HalfOpen:
    """One HTTP/2 connection with calls whose messages do not come, or are empty."""

    def __init__(self, target: Target, token: str = "") -> None:
        self.sock = socket.create_connection(("127.0.0.1", target.port), 10)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._token = token
        self._lock = threading.Lock()
        threading.Thread(target=self._answer_pings, daemon=True).start()

    def call(self, path: str, message: bytes | None) -> None:
        """Begin a call; its message follows where there is one."""
        head = [(":method", "POST"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        head += [("content-type", "application/grpc"), ("te", "trailers")]
        head += [("authorization", f"Bearer {self._token}")] if self._token else []
        with self._lock, suppress(OSError, h2.exceptions.ProtocolError):
            stream = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream, head)
            if message is not None:
                self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
            self.sock.sendall(self._h2.data_to_send())

    def _answer_pings(self) -> None:
        with suppress(OSError, h2.exceptions.ProtocolError):
            while data := self.sock.recv(1 << 16):
                with self._lock:
                    self._h2.receive_data(data)
                    self.sock.sendall(self._h2.data_to_send())


def _half_open(target: Target, path: str, token: str = "", message: bytes | None = None) -> Step:
    peers = [HalfOpen(target, token) for _ in range(CONNECTIONS)]

    def step() -> None:
        for peer in peers:
            for _ in range(STREAMS):
                peer.call(path, message)
        time.sleep(1.0)

    return step


def silent_calls(target: Target) -> Step:
    """Calls without a token whose messages never come."""
    return _half_open(target, "/kvstored.v1.Cache/Match")


def silent_tenant(target: Target) -> Step:
    """The same by a tenant that may call."""
    return _half_open(target, "/kvstored.v1.Cache/Match", target.token)


def watches(target: Target) -> Step:
    """Health watches without a token."""
    return _half_open(target, "/grpc.health.v1.Health/Watch", message=b"")


def _flood(connect: Callable[[], socket.socket], at_most: int) -> Step:
    """Connections that say nothing, always so many; the oldest ones are closed for new ones."""
    peers: list[socket.socket] = []

    def step() -> None:
        for _ in range(at_most // 4):
            with suppress(OSError):
                peers.append(connect())
        while len(peers) > at_most:
            peers.pop(0).close()
        time.sleep(0.5)

    return step


def tcp_flood(target: Target) -> Step:
    """More connections over TCP than the daemon has descriptors."""
    return _flood(lambda: socket.create_connection(("127.0.0.1", target.port), 1), DESCRIPTORS)


def metrics_flood(target: Target) -> Step:
    """The same at the metrics port."""
    return _flood(lambda: socket.create_connection(("127.0.0.1", target.metrics_port), 1), DESCRIPTORS)


def lease_flood(target: Target) -> Step:
    """As many connections to the lease socket as it has places for one user, and more."""
    return _flood(target.lease, 256)


def _calls(target: Target, path: str, request: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> Step:
    """One call after the other over a connection of the thread's own, whatever is answered."""
    mine = threading.local()
    numbers = itertools.count()

    def step() -> None:
        if not hasattr(mine, "call"):
            mine.call = target.channel(next(numbers)).unary_unary(path)
        try:
            mine.call(request, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
                time.sleep(0.01)

    return step


def _bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


def unpin_root(target: Target) -> Step:
    """A root with very many children, let go as often as a call names keys."""
    client = target.client(shared_memory=True)
    one = {"x": np.zeros(1, np.uint8)}
    root = b"root"
    client.put(root, one)
    for first in range(0, CHILDREN, KEYS_MAX):
        client.put_many([(b"%d" % i, one) for i in range(first, min(first + KEYS_MAX, CHILDREN))], parent=root)
    return _calls(target, "/kvstored.v1.Cache/Pin", pb.PinRequest(keys=[root] * KEYS_MAX).SerializeToString(),
                  (_bearer(target.token),))  # fmt: skip


def long_deletes(target: Target) -> Step:
    """A chain of thousands of chunks, put and forgotten by its root."""
    client = target.client(shared_memory=True)
    chain = [(b"chunk %d" % i, {"x": np.zeros(1, np.uint8)}) for i in range(KEYS_MAX)]

    def step() -> None:
        client.put_many(chain, chain=True)
        client.delete(chain[0][0])

    return step


def shrinking_ttls(target: Target) -> Step:
    """Touches that make each deadline earlier."""
    client = target.client(shared_memory=True)
    keys = [b"touched %d" % i for i in range(KEYS_MAX)]
    client.put_many([(key, {"x": np.zeros(1, np.uint8)}) for key in keys])
    ttls = itertools.count(86_400, -0.02)
    return lambda: _nothing(client.touch(keys, ttl_s=next(ttls)))


def tiny_keys(target: Target) -> Step:
    """Requests of 4 MiB of empty keys."""
    return _calls(target, "/kvstored.v1.Cache/Match", b"\x0a\x00" * ((4 << 20) // 2 - 64), (_bearer(target.token),))


def most_tiny_keys(target: Target) -> Step:
    """As large as a request may be, and full of empty keys."""
    request = b"\x0a\x00" * (MAX_NBYTES[pb.MatchRequest] // 2)
    return _calls(target, "/kvstored.v1.Cache/Match", request, (_bearer(target.token),))


def ingest_held(target: Target) -> Step:
    """Shared memory for puts, asked for again and again, and kept."""
    ask = pb.LeaseCall(ingest_nbytes=64 << 20).SerializeToString()
    held = [target.lease() for _ in range(16)]

    def step() -> None:
        for at, sock in enumerate(held):
            try:
                sock.send(ask)
                _, fds, _, _ = socket.recv_fds(sock, 1 << 18, 64)
                for fd in fds:
                    os.close(fd)
            except OSError:
                sock.close()
                held[at] = target.lease()
        time.sleep(0.01)

    return step


def leases_held(target: Target) -> Step:
    """Gets whose leases are never given back."""
    client = target.client(shared_memory=True)
    keys = [b"leased %d" % i for i in range(64)]
    client.put_many([(key, {"x": np.zeros(4096, np.uint8)}) for key in keys])
    sock = target.lease()
    ask = pb.LeaseCall(get=pb.GetRequest(keys=keys)).SerializeToString()

    def step() -> None:
        sock.send(ask)
        for fd in socket.recv_fds(sock, 1 << 18, 64)[1]:
            os.close(fd)

    return step


def pins(target: Target) -> Step:
    """As much of hot pinned as one tenant gets, and more asked for."""
    client = target.client(shared_memory=True)
    numbers = itertools.count()
    return lambda: _nothing(client.put(b"pinned %d" % next(numbers), {"x": np.zeros(256 << 10, np.uint8)}, pin=True))


def many_segments(target: Target) -> Step:
    """Answers over more segments than a packet brings, each time to a client that has none of them yet."""
    keys = [b"segment %d" % i for i in range(SEGMENTS)]
    with target.client(shared_memory=True) as client:
        for key in keys:
            client.put(key, {"x": np.zeros(600 << 10, np.uint8)}, fidelity="exact")

    def step() -> None:
        with target.client(shared_memory=True) as fresh, fresh.lease_many(keys):
            pass

    return step


def metrics_drip(target: Target) -> Step:
    """Requests at the metrics port that come a byte at a time."""
    peers: list[socket.socket] = []

    def step() -> None:
        while len(peers) < 32:
            with suppress(OSError):
                peers.append(socket.create_connection(("127.0.0.1", target.metrics_port), 1))
        for peer in list(peers):
            try:
                peer.send(b"G")
            except OSError:
                peer.close()
                peers.remove(peer)
        time.sleep(0.2)

    return step


def large_headers(target: Target) -> Step:
    """Calls with as many headers as the daemon takes, and without a token."""
    return _calls(target, "/kvstored.v1.Cache/Match", b"", tuple((f"x-{i}", "y" * 90) for i in range(64)))


def too_large_headers(target: Target) -> Step:
    """Calls with more."""
    return _calls(target, "/kvstored.v1.Cache/Match", b"", tuple((f"x-{i}", "y" * 90) for i in range(256)))


def wrong_tokens(target: Target) -> Step:
    """Calls with a token that nobody has."""
    return _calls(target, "/kvstored.v1.Cache/Match", b"", (_bearer("kvd_" + "x" * 43),))


def refused_user(target: Target) -> Step:
    """A user without an entry, who connects to the lease socket again and again, and calls."""
    ask = pb.LeaseCall(get=pb.GetRequest(keys=[b"k"])).SerializeToString()

    def step() -> None:
        with suppress(OSError), target.lease() as sock:
            sock.send(ask)
            sock.recv(1 << 16)

    return step


def lease_hammer(target: Target) -> Step:
    """A user with an entry that comes and goes, who calls without a pause and connects again at once."""
    ask = pb.LeaseCall(match=pb.MatchRequest(keys=[b"k"])).SerializeToString()
    held: list[socket.socket] = []

    def step() -> None:
        try:
            if not held:
                held.append(target.lease())
            held[0].send(ask)
            if not held[0].recv(1 << 16):
                raise ConnectionResetError
        except OSError:
            while held:
                held.pop().close()

    return step


def audited_deletes(target: Target) -> Step:
    """Deletes of what is not there, each with a line in the audit log."""
    client = target.client(shared_memory=True)
    return lambda: _nothing(client.delete(b"nothing"))


def reloads(target: Target) -> Step:
    """The operator: the attacker's token comes and goes."""
    texts = itertools.cycle([target.without_attacker, target.with_attacker])

    def step() -> None:
        Path(target.tokens_file).write_text(next(texts))
        os.kill(target.pid, signal.SIGHUP)
        time.sleep(1.0)

    return step


def spin(_: Target) -> Step:
    """Nothing to do with the daemon: a process that is as busy. What it costs the victim is the scheduler's."""
    return lambda: None


def busy_tenant(target: Target) -> Step:
    """A tenant that does nothing wrong, all the time."""
    client = target.client(shared_memory=False)
    client.put(b"own", {"x": np.zeros(4096, np.uint8)})
    return lambda: _nothing(client.get(b"own"))


def _nothing(_: object) -> None:
    return


@dataclass(frozen=True)
class Part:
    """A function of this module, how many threads repeat its step, and as which user; None: the daemon's."""

    make: Callable[[Target], Step]
    threads: int = 1
    uid: int | None = None


def _local(make: Callable[[Target], Step], threads: int = 1, uid: int = ATTACKER_UID) -> Part:
    return Part(make, threads, uid)


ATTACKS: dict[str, tuple[Part, ...]] = {
    "spin": (Part(spin),),
    "busy_tenant": (_local(busy_tenant),),
    "silent_calls": (Part(silent_calls),),
    "silent_tenant": (Part(silent_tenant),),
    "watches": (Part(watches),),
    "connection_flood": (Part(tcp_flood), Part(metrics_flood), _local(lease_flood)),
    "unpin_root": (_local(unpin_root, 4),),
    "long_deletes": (_local(long_deletes),),
    "revoked_caller": (Part(reloads), Part(silent_tenant), _local(lease_hammer)),
    "many_segments": (_local(many_segments),),
    "shrinking_ttls": (_local(shrinking_ttls),),
    "tiny_keys": (Part(tiny_keys, 2), Part(most_tiny_keys, 2)),
    "ingest_held": (_local(ingest_held),),
    "leases_held": (_local(leases_held),),
    "pins": (_local(pins),),
    "metrics_drip": (Part(metrics_drip),),
    "large_headers": (Part(large_headers, 4), Part(too_large_headers, 4)),
    "refused_user": (_local(refused_user, 4, STRANGER_UID),),
    "wrong_tokens": (Part(wrong_tokens, 16),),
    "audited_deletes": (_local(audited_deletes),),
}
"""By name: the parts that go on at once. The first two are no attacks: what others on the machine, and another tenant's
usual calls, cost."""


def main() -> int:
    """One part, until the standard input ends."""
    make, threads, uid = next(
        (part.make, part.threads, part.uid)
        for parts in ATTACKS.values() for part in parts if part.make.__name__ == sys.argv[1]
    )  # fmt: skip
    target = Target(**json.loads(sys.stdin.readline()))
    if uid is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setuid(uid)  # the group stays: it may use the sockets
    with tempfile.NamedTemporaryFile("w", suffix=".token") as file:  # clients read it whenever they are made
        file.write(target.token)
        file.flush()
        os.environ["KVSTORED_TOKEN_FILE"] = file.name
        step = make(target)

        def run() -> None:
            try:
                while True:
                    step()
            except BaseException:  # noqa: BLE001 - told, and the end
                traceback.print_exc()
                os._exit(1)  # an attack that is none is not to be counted

        for _ in range(threads):
            threading.Thread(target=run, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()
        os._exit(0)  # whatever its threads wait for


if __name__ == "__main__":
    sys.exit(main())
