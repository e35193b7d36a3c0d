"""A client made of nothing but generated messages: what another language would write from the proto."""

import select
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events

from kvstored_client.wire._pb import cache_pb2 as pb

CHUNK_NBYTES = 1 << 20


class RawClient:
    """Calls of the services, message by message."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])

    def _unary(self, path: str, request, reply):
        call = self.channel.unary_unary(
            f"/kvstored.v1.{path}", request_serializer=type(request).SerializeToString, response_deserializer=reply
        )
        return call(request, timeout=120)

    def put(self, frames: Iterable[pb.PutFrame]) -> pb.PutReply:
        call = self.channel.stream_unary(
            "/kvstored.v1.Cache/Put",
            request_serializer=pb.PutFrame.SerializeToString,
            response_deserializer=pb.PutReply.FromString,
        )
        return call(iter(frames), timeout=120)

    def get(self, request: pb.GetRequest, timeout: float = 120) -> Iterator[pb.GetFrame]:
        call = self.channel.unary_stream(
            "/kvstored.v1.Cache/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetFrame.FromString,
        )
        return call(request, timeout=timeout)

    def match(self, *keys: bytes) -> pb.MatchReply:
        return self._unary("Cache/Match", pb.MatchRequest(keys=keys), pb.MatchReply.FromString)

    def close(self) -> None:
        self.channel.close()


def header(key: bytes, nbytes: int, *specs: pb.TensorSpec, **options) -> pb.PutFrame:
    """A frame that opens an entry."""
    return pb.PutFrame(header=pb.PutHeader(key=key, nbytes=nbytes, tensors=specs, **options))


def spec(name: str, *shape: int, dtype: int = pb.DTYPE_UINT8) -> pb.TensorSpec:
    """A tensor's spec."""
    return pb.TensorSpec(name=name, shape=shape, dtype=dtype)


def entry_frames(key: bytes, payload: bytes) -> Iterator[pb.PutFrame]:
    """A whole entry of one uint8 tensor, a field a frame."""
    yield header(key, len(payload), spec("x", len(payload)))
    for start in range(0, len(payload), CHUNK_NBYTES):
        yield pb.PutFrame(chunk=payload[start : start + CHUNK_NBYTES])
    yield pb.PutFrame(end=pb.EntryEnd())


class HalfOpenCalls:
    """Calls over one HTTP/2 connection whose messages never come, unless `speak` sends them."""

    def __init__(self, where: Path | tuple[str, int], *metadata: tuple[str, str]) -> None:
        """where: a unix socket's path, or (host, port)."""
        self._sock = socket.socket(socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET)
        self._sock.settimeout(120)
        self._sock.connect(str(where) if isinstance(where, Path) else where)
        self._metadata = metadata
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._flush()
        self.ended: dict[int, dict[str, str]] = {}

    def open(self, path: str, count: int = 1) -> list[int]:
        """Begin calls. Returns their streams."""
        streams = []
        for _ in range(count):
            stream = self._h2.get_next_available_stream_id()
            head = [(":method", "POST"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
            head += [("content-type", "application/grpc"), ("te", "trailers"), *self._metadata]
            self._h2.send_headers(stream, head)
            streams.append(stream)
        self._flush()
        return streams

    def speak(self, stream: int, message: bytes) -> None:
        """Send a call's message and end its side."""
        self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        self._flush()

    def wait_for(self, stream: int) -> dict[str, str]:
        """The trailers of a call, once it has ended."""
        while stream not in self.ended:
            self.take()
        return self.ended[stream]

    def take_all(self) -> int:
        """Read what has come so far, and answer it. Returns how many calls have ended."""
        while select.select([self._sock], [], [], 0)[0]:
            self.take()
        return len(self.ended)

    def take(self) -> None:
        """Read what has come."""
        data = self._sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the daemon hung up")
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                said = {_text(name): _text(value) for name, value in event.headers}
                if "grpc-status" in said:
                    self.ended[event.stream_id] = said
        self._flush()

    def close(self) -> None:
        self._sock.close()

    def _flush(self) -> None:
        self._sock.sendall(self._h2.data_to_send())


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
