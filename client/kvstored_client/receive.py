"""Reads the frames of a Get into tensors: the client's half of the bulk path, checked frame by frame.

One Receiver serves one call and one thread. It trusts no size in a reply before it was checked.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from kvstore import arrays
from kvstore.errors import InvalidEntry
from kvstore.hit import Hit, TensorInfo
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.frames import BadFrame, Bytes, Frame, Scatter, parse_frame
from kvstored_client.messages import TIER_NAMES, read_specs

Tensors = Mapping[str, Any]


class Receiver:
    """Collects the hits of one Get. hits: by position; corrupt: entries dropped for a wrong checksum."""

    def __init__(self, keys: list[bytes], framework: str, out: Tensors | None = None) -> None:
        self.hits: list[Hit | None] = [None] * len(keys)
        self.corrupt = 0
        self.boot_epoch = 0
        self._keys = keys
        self._framework = framework
        self._out = out
        self._entry: _Incoming | None = None

    def read(self, messages: Iterable[bytes]) -> None:
        """Take all frames. Raises BadFrame for a stream that is not one; what was complete by then is in `hits`."""
        for message in messages:
            frame = parse_frame(message, pb.GetFrame)
            try:
                self._take(frame)
            except (DecodeError, IndexError, InvalidEntry) as error:
                raise BadFrame(str(error)) from None
        if self._entry is not None:
            raise BadFrame("the stream ended inside an entry")

    def _take(self, frame: Frame) -> None:
        if frame.miss is not None:
            self.boot_epoch = pb.GetMiss.FromString(bytes(frame.miss)).boot_epoch
        if frame.header is not None:
            if self._entry is not None:
                raise BadFrame("a header inside an entry")
            header = pb.GetHeader.FromString(bytes(frame.header))
            self.boot_epoch = header.boot_epoch
            self._entry = _Incoming(header, self._framework, self._out)
        if frame.chunk or frame.end is not None:
            if self._entry is None:
                raise BadFrame("bytes before a header")
            self._entry.take(frame.chunk)
        if frame.end is not None and self._entry is not None:
            index = self._entry.header.index
            if self._entry.complete(pb.EntryEnd.FromString(bytes(frame.end)).xxh3):
                self.hits[index] = self._entry.hit(self._keys[index])
            else:
                self.corrupt += 1
            self._entry = None


class _Incoming:
    """One entry on its way in."""

    def __init__(self, header: pb.GetHeader, framework: str, out: Tensors | None) -> None:
        specs = read_specs(header.tensors)
        nbytes = arrays.check_specs(specs)
        if nbytes != header.nbytes:
            raise BadFrame(f"specs of {nbytes} bytes under a header of {header.nbytes}")
        self.header = header
        if out is None:
            self._targets = {name: empty_bytes(spec) for name, spec in specs.items()}
            self.tensors: Tensors = {
                name: arrays.from_bytes(spec, self._targets[name], framework) for name, spec in specs.items()
            }
        else:
            self._targets = {name: writable_bytes(name, spec, out) for name, spec in specs.items()}
            self.tensors = {name: out[name] for name in specs}
        self._scatter = Scatter(list(self._targets.values()))
        self._sum = xxhash.xxh3_64()

    def take(self, chunk: memoryview) -> None:
        self._sum.update(chunk)
        self._scatter.write(chunk)

    def complete(self, xxh3: int) -> bool:
        if self._scatter.filled_nbytes != self._scatter.due_nbytes:
            raise BadFrame(f"an entry ended after {self._scatter.filled_nbytes} of {self._scatter.due_nbytes} bytes")
        return not xxh3 or self._sum.intdigest() == xxh3

    def hit(self, key: bytes) -> Hit:
        head = self.header
        tier = TIER_NAMES.get(head.tier, "unknown")
        return Hit(key, self.tensors, tier, head.encoding, head.lossy, head.age_s)


def empty_bytes(spec: TensorInfo) -> Bytes:
    """Room for a tensor, not cleared."""
    return np.empty(arrays.check_specs({"x": spec}), dtype=np.uint8)


class OutMismatch(InvalidEntry):
    """The tensors given as `out` are not those of the entry."""


def writable_bytes(name: str, spec: TensorInfo, out: Tensors) -> Bytes:
    """The bytes of the caller's own tensor, to be written. Raises OutMismatch unless it is just of this spec."""
    if name not in out:
        raise OutMismatch(f"out has no tensor {name!r}, the entry has")
    info = arrays.describe(name, out[name])
    if info != spec:
        raise OutMismatch(f"out[{name!r}] is {info.dtype} {info.shape}, the entry has {spec.dtype} {spec.shape}")
    data = arrays.as_bytes(out[name])
    if data.size and not (np.shares_memory(data, _memory_of(out[name])) and data.flags.writeable):
        raise OutMismatch(f"out[{name!r}] must be dense, on the CPU and writable")
    return data


def _memory_of(x: Any) -> Any:
    return x.detach().view(-1).numpy() if False else x
