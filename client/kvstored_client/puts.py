"""Cuts an entry into the frames of a Put. Checks everything that can be refused before anything is sent."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore import arrays
from kvstore.errors import InvalidEntry
from kvstore.hit import Fidelity, Priority
from kvstore.keys import check_key, check_namespace
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import CHUNK_NBYTES, Gather, cut_frames
from kvstored_client.wire.messages import fidelity_number, priority_number, tensor_specs


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How entries are kept; the meaning is that of `Store.put`. Raises InvalidEntry for what no store accepts."""

    ttl_s: float | None = None
    sliding: bool = True
    pin: bool = False
    fidelity: Fidelity = "auto"
    priority: Priority = "normal"
    namespace: str = ""

    def __post_init__(self) -> None:
        ttl = self.ttl_s
        if ttl is not None and not (math.isfinite(ttl) and ttl > 0):
            raise InvalidEntry(f"ttl_s must be over 0 and finite, got {ttl!r}")
        fidelity_number(self.fidelity)
        priority_number(self.priority)
        check_namespace(self.namespace)

    @property
    def wire_ttl_s(self) -> float:
        """Seconds to live as the proto has them: 0 stands for the store's default."""
        return self.ttl_s or 0.0


class Outgoing:
    """One entry to send. Reads the caller's tensors while it sends, so they must not change meanwhile."""

    def __init__(
        self,
        key: bytes,
        tensors: Mapping[str, Any],
        options: PutOptions,
        parent: bytes | None = None,
        *,
        root: bool = False,
    ) -> None:
        if not isinstance(tensors, Mapping):
            raise InvalidEntry(f"tensors are a mapping of names to tensors, got {type(tensors).__name__}")
        tensors = dict(tensors)  # asked once: a mapping that makes its tensors may make others the second time
        specs = {name: arrays.describe(name, x) for name, x in tensors.items()}
        self.nbytes = arrays.check_specs(specs)
        self.key = check_key(key)
        self.tensors = tensors
        self.header = pb.PutHeader(
            key=self.key,
            tensors=tensor_specs(specs),
            nbytes=self.nbytes,
            ttl_s=options.wire_ttl_s,
            absolute_ttl=not options.sliding,
            pin=options.pin,
            fidelity=fidelity_number(options.fidelity),
            parent=b"" if parent is None else check_key(parent),
            priority=priority_number(options.priority),
            root=root and parent is None,
            namespace=options.namespace,
        )

    def single_frame(self) -> bytes | None:
        """The whole entry as one frame; None if it needs more than one."""
        return next(self.frames()) if self.nbytes <= CHUNK_NBYTES else None

    def frames(self) -> Iterator[bytes]:
        """The entry's frames in order."""
        # Dense bytes only now, and of this entry only: a strided tensor is copied here, not for the whole batch.
        payload = Gather([arrays.as_bytes(x) for x in self.tensors.values()])
        return cut_frames(self.header.SerializeToString(), payload)
