"""Reads the frames of a Get into tensors: the client's half of the bulk path, checked frame by frame.

One Receiver serves one call and one thread. It trusts no size in a reply before it was checked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import xxhash

from kvstore.errors import CodecError, KvstoreError, OutMismatch, RecordCorrupt
from kvstore.hit import Hit
from kvstored_client.buffers import Out, Target, Tensors, check_out
from kvstored_client.decoding import Packed, Parts, Unpacking, shape_of
from kvstored_client.interrupts import damage
from kvstored_client.stream.transport import CACHE, Transport
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, Frame, Scatter, parse_frame
from kvstored_client.wire.messages import TIER_NAMES, read_receipt

Fill = Callable[[Sequence[tuple[Any, Any]]], None]


class Receiver:
    """Collects the hits of one Get. hits: by position; corrupt: entries dropped for a wrong checksum."""

    def __init__(
        self,
        keys: Sequence[bytes],
        framework: str,
        out: Out = None,
        hits: list[Hit | None] | None = None,
        *,
        packed: bool = False,
        fill: Fill | None = None,
    ) -> None:
        """packed: what comes encoded is to stay so. fill: decodes it into `out`, instead of the host."""
        self.hits: list[Hit | None] = [None] * len(keys) if hits is None else hits
        self.corrupt = 0
        self.boot_epoch = 0
        self._keys = keys
        self._framework = framework
        self._packed = packed
        self._fill = fill
        self._out = out
        self._entry: _Incoming | None = None

    def read_from(self, transport: Transport, request: pb.GetRequest) -> None:
        """Make the call and take its answer. Raises KvstoreError; what was complete by then is in `hits`."""
        with self.reading(transport), closing(transport.stream_in(CACHE + "Get", request)) as messages:
            for message in messages:
                self.take(message)

    @contextmanager
    def reading(self, transport: Transport) -> Iterator[None]:
        """While the messages of a call are taken. Raises RecordCorrupt at its end for a damaged stream or entry."""
        try:
            with self.whole():
                yield
        except BadFrame as error:
            raise RecordCorrupt(f"{transport.address} sent a damaged stream: {error}") from None
        finally:
            transport.saw_epoch(self.boot_epoch)
        if self.corrupt:
            raise RecordCorrupt(f"{self.corrupt} entries from {transport.address} failed their checksum")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While all frames of a stream are taken. Raises BadFrame at its end for one that ended inside an entry.

        Whatever it ends with, nothing writes to `out` any more.
        """
        try:
            yield
            if self._entry is not None:
                raise BadFrame("the stream ended inside an entry")
        finally:
            if self._entry is not None:
                self._entry.call_off()

    def read(self, messages: Iterable[bytes]) -> None:
        """Take all frames. Raises OutMismatch, and BadFrame for a stream that is not one."""
        with self.whole():
            for message in messages:
                self.take(message)

    def take(self, message: bytes) -> None:
        """The next frame. Raises OutMismatch, BadFrame."""
        try:
            self._take(parse_frame(message, pb.GetFrame))
        except (OutMismatch, BadFrame):
            raise
        except Exception as error:
            damaged = damage(error, "a frame")
            if damaged is error and not isinstance(error, KvstoreError):
                raise
            raise BadFrame(str(damaged)) from None

    def _take(self, frame: Frame) -> None:
        if frame.miss is not None:
            self.boot_epoch = pb.GetMiss.FromString(bytes(frame.miss)).boot_epoch
        if frame.header is not None:
            if self._entry is not None:
                raise BadFrame("a header inside an entry")
            header = pb.GetHeader.FromString(bytes(frame.header))
            self.boot_epoch = header.boot_epoch
            if header.index >= len(self._keys):
                raise BadFrame(f"an entry for key {header.index} of {len(self._keys)}")
            out = None if self._out is None else self._out[header.index]
            self._entry = _Incoming(header, self._framework, out, packed=self._packed, fill=self._fill)
        if frame.chunk or frame.end is not None:
            if self._entry is None:
                raise BadFrame("bytes before a header")
            self._entry.fill(frame.chunk)
            self._entry.sum.update(frame.chunk)
        if frame.end is not None and self._entry is not None:
            index = self._entry.header.index
            if self._entry.complete(pb.EntryEnd.FromString(bytes(frame.end)).xxh3):
                self.hits[index] = self._entry.hit(self._keys[index])
            else:
                self.corrupt += 1
            self._entry = None


class _Incoming:
    """One entry on its way in: into fresh memory, or into the caller's own tensors.

    fill: takes its next bytes, which `sum` is of.
    """

    def __init__(
        self, header: pb.GetHeader, framework: str, out: Tensors | None, *, packed: bool, fill: Fill | None
    ) -> None:
        shape = shape_of(header)
        if shape.nbytes != header.nbytes:
            raise BadFrame(f"specs of {shape.nbytes} bytes under a header of {header.nbytes}")
        self.header = header
        self._unpacking: Unpacking | None = None
        self._out = out if header.packed else None
        self._decode = fill
        if out is not None:
            check_out(shape.specs, out)
        encoded = Packed(header, shape) if header.packed else None
        if encoded is not None and (packed or fill is not None):
            self._target: Target = Parts(encoded, framework)
        else:
            self._target = Target(shape.specs, shape.sizes, framework, out)
            if encoded is not None:
                self._unpacking = Unpacking(encoded, self._target.bytes)
        self._scatter: Scatter | None = None
        if self._unpacking is not None:
            self.fill = self._unpacking.take
        else:
            self._scatter = Scatter(list(self._target.bytes.values()))
            self.fill = self._scatter.write
        self.sum = xxhash.xxh3_64()

    def call_off(self) -> None:
        """Return once nothing is being decoded."""
        if self._unpacking is not None:
            self._unpacking.call_off()

    def complete(self, xxh3: int) -> bool:
        """Whether all bytes came, and are those that were sent. Raises BadFrame for too few."""
        damaged = False
        if self._unpacking is not None:
            try:
                if not self._unpacking.over:
                    self._unpacking.finish()
            except CodecError:
                damaged = True
        elif self._scatter is not None and self._scatter.filled_nbytes != self._scatter.due_nbytes:
            raise BadFrame(f"an entry ended after {self._scatter.filled_nbytes} of {self._scatter.due_nbytes} bytes")
        if damaged or (xxh3 and self.sum.intdigest() != xxh3):
            return False
        try:
            if self._target.unfinished:
                self._target.finish()
            if self._decode is not None and self._out is not None:
                held, self._target.tensors = self._target.tensors, dict(self._out)
                self._decode([(x, held[name]) for name, x in self._out.items()])
        except (CodecError, RecordCorrupt):  # packed parts that no codec wrote
            return False
        return True

    def hit(self, key: bytes) -> Hit:
        head = self.header
        tier = TIER_NAMES.get(head.tier, "unknown")
        return Hit(key, self._target.tensors, tier, head.encoding, head.lossy, head.age_s, read_receipt(head))
