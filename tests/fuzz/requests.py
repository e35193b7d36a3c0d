"""Fuzzed requests through both doors of a running daemon, while another client checks its own values.

A third of them are messages with anything in their fields, a third those with bytes changed, a third random bytes. The
fuzzing caller is one tenant, the checking client another; a caller with a wrong token and one without any are among
them. What must hold: no answer is an internal error, the daemon lives and logs no error, the other's values are there
and right, and memory and descriptors do not grow.
"""

import asyncio
import os
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from kvstore import encode
from kvstore.arrays import as_bytes
from kvstore.options import PutOptions
from kvstored.access.tokens import digest, make_token
from kvstored_client import Client
from kvstored_client.puts import outgoing
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import put_header
from tests.conftest import DaemonProcess, wait_until

from .mutation import message, mutated

TOKENS = {"fuzz": make_token(), "control": make_token(), "operator": make_token(), "nobody": make_token()}
STORE = """ttl_s = 600
[store.hot]
capacity_nbytes = "32MiB"
[store.warm]
capacity_nbytes = "16MiB"
[store.cold]
capacity_nbytes = "64MiB"
"""
METHODS: dict[str, type] = {
    "Cache/Put": pb.PutFrame, "Cache/Get": pb.GetRequest, "Cache/Match": pb.MatchRequest,
    "Cache/Touch": pb.TouchRequest, "Cache/Delete": pb.DeleteRequest, "Cache/Pin": pb.PinRequest,
    "Cache/Report": pb.ReportRequest, "Admin/Stats": pb.StatsRequest, "Admin/List": pb.ListRequest,
    "Admin/Inspect": pb.InspectRequest, "Admin/Explain": pb.ExplainRequest, "Admin/Evict": pb.EvictRequest,
    "Admin/Demote": pb.DemoteRequest, "Admin/Promote": pb.PromoteRequest, "Admin/Drain": pb.DrainRequest,
    "Admin/Settings": pb.SettingsRequest, "Admin/Configure": pb.ConfigureRequest,
    "Admin/CheckShared": pb.CheckSharedRequest, "Admin/FlushShared": pb.FlushSharedRequest,
    "Cache/Unknown": pb.GetRequest,
}  # fmt: skip
LOOKS = ("Admin/Stats", "Admin/List", "Admin/Inspect", "Admin/Explain", "Admin/Settings")
"""What an operator may call here: the others would rightly evict what the control client checks."""
POOL = [b"key %d" % i for i in range(64)]
CONTROL = {b"control %d" % i: np.random.default_rng(i).integers(0, 256, 20_000, np.uint8) for i in range(8)}
IN_FLIGHT = 32


def _packed(codec: str) -> tuple[pb.PutHeader, bytes]:
    """The header and the bytes of an entry that its client has encoded."""
    numbers = np.random.default_rng(1).standard_normal((2, 33, 2, 32), dtype=np.float32)
    put = (POOL[0], encode({"k": numbers, "n": np.arange(5)}, codec=codec), None)
    entry = outgoing([put], PutOptions(ttl_s=60))[0]
    header = pb.PutHeader.FromString(put_header(entry.key, entry.parent, entry.described))
    return header, b"".join(as_bytes(x).tobytes() for x in entry.tensors.values())


PACKED = [_packed(codec) for codec in ("auto", "nf4", "nf4-kv", "int8")]
_SURPRISES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


@dataclass
class Report:
    """sent: requests, by door and kind. answers: statuses and error kinds, by door. surprises: what must not be."""

    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    checks: int = 0


def configure(daemon: DaemonProcess) -> None:
    """The tokens file and small tiers: the fuzzing caller is this user on the lease socket."""
    config = daemon.config.read_text().replace("{dir}", str(daemon.directory)).replace("[store]\n", f"[store]\n{STORE}")
    daemon.config.write_text(config)
    text = ""
    for name, rights in {"fuzz": '["read", "write"]', "control": '["read", "write"]', "operator": '["admin"]'}.items():
        tenant = "" if name == "operator" else f'tenant = "{name}"\n'
        uid = f"uid = {os.geteuid()}\n" if name == "fuzz" else ""
        text += f'[[token]]\nname = "{name}"\nsha256 = "{digest(TOKENS[name])}"\nrights = {rights}\n{tenant}{uid}'
    (daemon.directory / "tokens.toml").write_text(text)
    (daemon.directory / "tokens.toml").chmod(0o600)


def make_request(kind: type, rng: random.Random) -> tuple[str, bytes]:
    """(how it was made, its bytes)."""
    how = rng.choice(("fields", "changed", "bytes"))
    if how == "bytes":
        return how, rng.randbytes(rng.choice((0, 1, 3, 8, 40, 300)))
    data = message(kind(), rng, POOL).SerializeToString()
    return how, data if how == "fields" else mutated(data, rng)


class LeaseDoor:
    """One connection after the other to the lease socket; some packets, then one whose answer is waited for."""

    def __init__(self, path: Path, rng: random.Random, report: Report) -> None:
        self._path = str(path)
        self._rng = rng
        self._report = report
        self._sock: socket.socket | None = None
        self._segment = 0

    def send(self, count: int) -> None:
        """So many packets, and their answers."""
        while count > 0:
            if self._sock is None or self._rng.random() < 0.01:
                self._connect()
            # Of a packet that ends the connection, those behind it are lost: so few at once.
            some = min(count, self._rng.choice((1, 4, 16)))
            try:
                for _ in range(some):
                    how, data = self._packet()
                    self._sock.send(data)
                    self._report.sent[f"lease {how}"] += 1
                    count -= 1
                self._answers(1 << 60, pb.LeaseCall(match=pb.MatchRequest(keys=[b"sync"])))
            except (BrokenPipeError, ConnectionResetError):
                self._report.answers["lease hung up"] += 1
                self._connect()

    def _packet(self) -> tuple[str, bytes]:
        if self._rng.random() < 0.3:
            data = valid_call(self._rng, self._segment).SerializeToString()
            return ("valid", data) if self._rng.random() < 0.5 else ("valid changed", mutated(data, self._rng))
        return make_request(pb.LeaseCall, self._rng)

    def _connect(self) -> None:
        self.close()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(60)
        self._sock.connect(self._path)
        self._segment = 0
        self._answers(1 << 61, pb.LeaseCall(ingest_nbytes=1 << 20))

    def _answers(self, number: int, call: pb.LeaseCall) -> None:
        """Send a call under a number that is no other's, and take what comes, up to its answer."""
        call.number = number
        self._sock.send(call.SerializeToString())
        for _ in range(1000):
            data, descriptors, _, _ = socket.recv_fds(self._sock, 256 << 10, 64)
            for descriptor in descriptors:
                os.close(descriptor)
            if not data:
                raise ConnectionResetError
            reply = pb.LeaseReply.FromString(data)
            self._segment = max([self._segment, *(segment.number for segment in reply.segments if segment.writable)])
            kind = reply.error.kind or "answer"
            self._report.answers[f"lease {kind}"] += 1
            if kind not in _REFUSALS:
                self._report.surprises.append(f"lease: {kind}: {reply.error.message:.200}")
            if reply.number == number:
                return
        self._report.surprises.append("lease: 1000 packets and no answer to the last call")

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


def valid_call(rng: random.Random, segment: int) -> pb.LeaseCall:
    """A call that a client makes."""
    keys = rng.choices(POOL, k=rng.choice((1, 1, 3)))
    spec = pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT8, shape=[100])
    header = pb.PutHeader(key=keys[0], tensors=[spec], nbytes=100)
    if len(keys) > 1:
        header.parent = keys[1]
    place = pb.TensorPlace(segment=segment, start=64 * rng.randrange(1000))
    entry = pb.IngestedEntry(header=header, places=[place])
    packed = rng.choice(PACKED)[0]
    packed = pb.IngestedEntry(header=packed, places=[place] * sum(len(x.parts) for x in packed.packed))
    packed.header.key = keys[0]
    return rng.choice((
        pb.LeaseCall(put=pb.LeasePut(entries=[packed], copy_later=rng.random() < 0.5)),
        pb.LeaseCall(put=pb.LeasePut(entries=[entry], copy_later=rng.random() < 0.5)),
        pb.LeaseCall(get=pb.GetRequest(keys=keys)), pb.LeaseCall(match=pb.MatchRequest(keys=keys)),
        pb.LeaseCall(touch=pb.TouchRequest(keys=keys, ttl_s=60)), pb.LeaseCall(delete=pb.DeleteRequest(keys=keys[:1])),
        pb.LeaseCall(pin=pb.PinRequest(keys=keys, pinned=rng.random() < 0.5)),
        pb.LeaseCall(release=[rng.randrange(100)], get=pb.GetRequest(keys=keys)),
    ))  # fmt: skip


def valid_frame(rng: random.Random) -> bytes:
    """An entry that a client puts, in one frame: every other one encoded."""
    if rng.random() < 0.5:
        header, payload = rng.choice(PACKED)
        header = pb.PutHeader.FromString(header.SerializeToString())
        header.key = rng.choice(POOL)
        return pb.PutFrame(header=header, chunk=payload, end=pb.EntryEnd()).SerializeToString()
    spec = pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT8, shape=[100])
    header = pb.PutHeader(key=rng.choice(POOL), tensors=[spec], nbytes=100, ttl_s=60)
    return pb.PutFrame(header=header, chunk=rng.randbytes(100), end=pb.EntryEnd()).SerializeToString()


_REFUSALS = {
    "answer", "UseStream", "InvalidEntry", "EntryTooLarge", "OverQuota", "PermissionDenied", "TierUnavailable",
}  # fmt: skip


class StreamDoor:
    """gRPC calls as bytes, some at a time, by callers with several tokens."""

    def __init__(self, target: str, rng: random.Random, report: Report) -> None:
        self._target = target
        self._rng = rng
        self._report = report

    async def send(self, count: int) -> None:
        """So many calls."""
        async with grpc.aio.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            share = [count // IN_FLIGHT + (i < count % IN_FLIGHT) for i in range(IN_FLIGHT)]
            await asyncio.gather(*(self._calls(channel, n) for n in share))

    async def _calls(self, channel: grpc.aio.Channel, count: int) -> None:
        for _ in range(count):
            await self._call(channel)

    async def _call(self, channel: grpc.aio.Channel) -> None:
        method = self._rng.choice(list(METHODS))
        how, data = make_request(METHODS[method], self._rng)
        if method == "Cache/Put" and self._rng.random() < 0.5:
            how, data = "valid changed", mutated(valid_frame(self._rng), self._rng)
        who = self._rng.choice(("fuzz",) * 8 + ("nobody", ""))
        if method in LOOKS and self._rng.random() < 0.5:
            who = "operator"
        token = (("authorization", f"Bearer {TOKENS[who]}"),) if who else ()
        self._report.sent[f"grpc {how}"] += 1
        # On the wire a stream of one message is a call of one message.
        call = channel.unary_stream(f"/kvstored.v1.{method}")(data, metadata=token, timeout=120)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            self._report.answers[f"grpc {error.code().name}"] += 1
            if error.code() in _SURPRISES:
                self._report.surprises.append(f"{method} {data.hex():.400}: {error.code().name} {error.details():.200}")
        else:
            self._report.answers["grpc OK"] += 1


def raw_bytes(target: Path, rng: random.Random, report: Report) -> None:
    """A connection to the gRPC socket that does not speak HTTP/2, or stops doing so."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.connect(str(target))
        data = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
        sock.send(mutated(data, rng) if rng.random() < 0.5 else data + rng.randbytes(rng.randrange(200)))
        select.select([sock], [], [], 0.01)
    report.sent["grpc socket"] += 1


def descriptors_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - counted, not looked at


def run(daemon: DaemonProcess, count: int, seed: int, *, tell: Callable[[str], None] = lambda _: None) -> Report:
    """Send `count` requests to a daemon that `configure` prepared and that is up: nine of ten to the lease door."""
    rng, report = random.Random(seed), Report()
    unix = daemon.address.split(",")[0]
    lease = LeaseDoor(Path(f"{daemon.socket_path}.lease"), rng, report)
    control = control_client(daemon, unix)
    sent, began = 0, time.monotonic()
    for part in parts(count):
        lease.send(part - part // 10)
        asyncio.run(StreamDoor(unix, rng, report).send(part // 10))
        raw_bytes(daemon.socket_path, rng, report)
        for key, x in CONTROL.items():
            hit = control.get(key)
            if hit is None or hit.tensors["x"].tobytes() != x.tobytes():
                report.surprises.append(f"the control client: {key!r} is {'missing' if hit is None else 'wrong'}")
            report.checks += 1
        sent += part
        report.samples.append((sent, daemon.rss_nbytes(), descriptors_of(daemon.pid)))
        tell(f"{sent} requests, {time.monotonic() - began:.0f} s, RSS {daemon.rss_nbytes() >> 20} MiB, "
             f"{descriptors_of(daemon.pid)} descriptors, surprises {len(report.surprises)}")  # fmt: skip
    lease.close()
    control.close()
    return report


def control_client(daemon: DaemonProcess, address: str) -> Client:
    """A client of another tenant, with its values put. It has read its token once it has answered."""
    token = daemon.directory / "control.token"
    token.write_text(TOKENS["control"])
    token.chmod(0o600)
    before = os.environ.get("KVSTORED_TOKEN_FILE")
    os.environ["KVSTORED_TOKEN_FILE"] = str(token)
    try:
        client = Client(address, framework="numpy", on_error="raise", timeout_s=60, shared_memory=False)
        for key, x in CONTROL.items():
            assert client.put(key, {"x": x}, fidelity="exact", pin=True)
    finally:
        del os.environ["KVSTORED_TOKEN_FILE"]
        if before is not None:
            os.environ["KVSTORED_TOKEN_FILE"] = before
    return client


def parts(count: int) -> Iterator[int]:
    """Some forty equal parts; fewer of a small count."""
    size = max(count // 40, min(count, 300))
    for start in range(0, count, size):
        yield min(size, count - start)


def errors_in(log: str) -> list[str]:
    """Lines of a daemon's log that say of a defect."""
    return [line for line in log.splitlines() if any(word in line for word in ("Traceback", "ERROR", "CRITICAL"))]


def start(daemon: DaemonProcess) -> None:
    """Start a daemon that asks for tokens, and wait until its socket is there."""
    daemon.start(wait=False)
    wait_until(lambda: Path(f"{daemon.socket_path}.lease").exists() or daemon.process.poll() is not None)
    assert daemon.process is not None
    assert daemon.process.poll() is None, daemon.log
