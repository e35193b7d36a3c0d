"""A client made of nothing but generated messages: what another language would write from the proto."""

from collections.abc import Iterable, Iterator

import grpc

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
