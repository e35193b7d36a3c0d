"""Memory that an entry's bytes are written to or read from: the caller's own tensors, fresh ones, foreign bytes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvstore import arrays
from kvstore.device.copies import Batch, Runs
from kvstore.errors import OutMismatch
from kvstore.hit import TensorInfo
from kvstored_client.device import settle_stream
from kvstored_client.wire.frames import Bytes

Tensors = Mapping[str, Any]


Out = Sequence[Tensors | None] | None
"""For each key the tensors to fill, or None for fresh ones."""


class Target:
    """Where an entry's tensors go. bytes: what to fill, by name; tensors: what the caller gets after `finish`.

    unfinished: `finish` has something to do.
    """

    unfinished = False

    def __init__(
        self,
        specs: Mapping[str, TensorInfo],
        sizes: Iterable[int],
        framework: str,
        out: Tensors | None,
        batch: Batch | None = None,
    ) -> None:
        """sizes: the bytes of each. out: the caller's own tensors, or None for fresh ones. Raises OutMismatch.

        batch: takes tensors on a GPU, which are then in `direct` and have no bytes here.
        """
        self.direct: dict[str, Any] = {}
        self.aside: dict[str, Any] = {}
        self.bytes: dict[str, Bytes]
        self.tensors: dict[str, Any]
        if out is None:
            self.bytes, self.tensors = arrays.fresh(specs, sizes, framework)
            return
        check_out(specs, out)
        self.bytes, self.tensors = {}, {}
        for (name, spec), nbytes in zip(specs.items(), sizes, strict=True):
            given = self.tensors[name] = out[name]
            if batch is not None and Runs.of(given) is not None:
                self.direct[name] = given
                continue
            direct = arrays.bytes_in_place(given)
            if direct is None:  # on another device, or strided: filled through a tensor aside
                direct = np.empty(nbytes, dtype=np.uint8)
                self.aside[name] = arrays.from_bytes(spec, direct, "torch")
                self.unfinished = True
            self.bytes[name] = direct

    def finish(self) -> None:
        """All bytes are filled: those tensors that could not be filled directly get them now."""
        for name, fresh in self.aside.items():
            given = self.tensors[name]
            given.copy_(fresh)
            if given.is_cuda:
                settle_stream(given.device)  # this may be another thread than the caller's, with another stream


def check_out(specs: Mapping[str, TensorInfo], out: Tensors) -> None:
    """Raise OutMismatch unless `out` holds exactly these tensors, each of them writable."""
    given = dict(arrays.describe_all(out))
    if given != specs:
        raise OutMismatch(f"out must hold exactly the entry's tensors {dict(specs)}, got {given}")
    for name, x in out.items():
        if isinstance(x, np.ndarray) and not (x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative):
            raise OutMismatch(f"out[{name!r}]: a numpy array must be C-contiguous, writeable and of native byte order")


class Window:
    """A run of somebody's bytes. It keeps `owner` for as long as any array or tensor over it is.

    writable: for torch also what is not. It warns of a read-only array and offers no read-only tensor, so it is told
    nothing: writing to what is mapped for reading ends the process, as the documentation of `lease` says.
    """

    __slots__ = ("__array_interface__", "__weakref__", "_owner")

    def __init__(self, address: int, nbytes: int, owner: object, *, writable: bool) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "data": (address, not writable),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    @property
    def array(self) -> Bytes:
        """The bytes. All that is made of the array keeps the window."""
        return np.asarray(self)
