"""Raw tensors whose bytes are still being copied: whoever reads an entry of them waits for the copy, or makes it.

A put is answered before its bytes lie where they are kept. Until then nobody sees them: the first look at a tensor
makes the copy, and what is read, encoded, summed or written afterwards is that copy. So what the sender does to its own
memory later changes nothing, and no two readers see different bytes. Thread-safe.
"""

import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from kvstore.arrays import CheckedSpecs
from kvstore.entries.entry import NO_ATTRS, TENSOR_OVERHEAD_NBYTES, EncodedTensor, untrack_tensors
from kvstore.errors import CodecError


class ArrivingTensors(Mapping[str, EncodedTensor]):
    """The tensors of an entry, by name. copy: makes them in memory that nobody else can write to; called once.

    owner: whose segments on a device the store's copy is to lie in; None: its own.
    """

    __slots__ = ("_copy", "_lock", "_place", "_tensors", "nbytes", "owner", "specs", "value_nbytes")
    device = torch.device("cpu")
    encoding = "raw"

    def __init__(
        self, specs: CheckedSpecs, copy: Callable[[], Mapping[str, torch.Tensor]], owner: int | str | None = None
    ) -> None:
        self.owner = owner
        self.specs = specs
        self.value_nbytes = specs.nbytes
        self.nbytes = self.value_nbytes + sum(len(name) + TENSOR_OVERHEAD_NBYTES for name in specs)
        self._copy: Callable[[], Mapping[str, torch.Tensor]] | None = copy
        self._tensors: Mapping[str, EncodedTensor] | None = None
        self._place: object = None
        self._lock = threading.Lock()

    @property
    def encodings(self) -> list[str]:
        """`Entry.encodings`, without waiting."""
        return ["raw"] * len(self.specs)

    @property
    def receipt(self) -> dict[str, float]:
        """`Entry.receipt`, without waiting."""
        return dict.fromkeys(self.specs, 0.0)

    @property
    def place(self) -> object:
        """Where in shared memory the copy lies (`shm.arena.Place`); None: in ordinary memory."""
        self.arrive()
        return self._place

    def arrive(self) -> Mapping[str, EncodedTensor]:
        """The tensors; the copy is made before this returns. Raises CodecError where it could not be made."""
        tensors = self._tensors
        if tensors is not None:
            return tensors
        with self._lock:
            if self._tensors is None:
                copy, self._copy = self._copy, None
                if copy is None:
                    raise CodecError("the bytes of this entry could not be copied when it was put")
                made = copy()
                self._place = getattr(made, "place", None)
                tensors = {
                    name: EncodedTensor(spec, "raw", {"": made[name]}, NO_ATTRS) for name, spec in self.specs.items()
                }
                untrack_tensors(tensors)
                self._tensors = tensors
            return self._tensors

    def __getitem__(self, name: str) -> EncodedTensor:
        return self.arrive()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
