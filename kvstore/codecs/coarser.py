"""The coarser form of what kv-learned holds, for a tier below: made from its symbols, and yet never rounded twice.

A basis whose step is an odd number of a finer one's steps wide, and that is alike in all else (`Basis.times`), has
cells that each consist of whole cells of the finer one. So a symbol of the finer basis says in which coarser cell the
value lay that was put: it over three, rounded, is what that value over three, rounded, was. Half a step is never met:
an odd number has no whole half. `kvstored learn --coarser` makes such a pair. Pure, any thread.
Rejected, with figures in docs/decisions/0018-a-coarser-form-below.md: the high bits of nf4-kv2's codes; a second form
made when the tensors leave hot.
"""

import numpy as np
import torch

from kvstore.codecs import rans
from kvstore.codecs.basis import Basis
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.kv_learned import Coded, KVLearned, checked, encoded_in, read_coded, written
from kvstore.codecs.receipt import Measured, sealed
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.errors import CodecError


def coarser(encoded: EncodedTensor, basis: Basis) -> EncodedTensor:
    """The tensor in a coarser basis that its own nests in. What was kept in 16 bits stays so.

    Raises CodecError where the bases do not nest, UnknownEncoding where its own is not in use.
    """
    finer, role, kept, _position = checked(encoded)
    times = basis.times(finer)
    if not times:
        raise CodecError(f"the basis {basis.digest[:16]} is no coarser form of {finer.digest[:16]}")
    transform = finer.planes[role]
    q = _symbols(read_coded(encoded, transform, kept), sum(transform.sizes))
    main = written(basis.planes[role], q.to(torch.float32) / times)[0]
    attrs = {name: value for name, value in encoded.attrs.items() if name != "relative_error"}
    return EncodedTensor(encoded.spec, encoded.encoding, {**encoded.parts, "": main}, {**attrs, "basis": basis.digest})


def coarser_entry(entry: Entry, basis: Basis) -> Entry:
    """The entry with each tensor of a basis that nests in this one in its coarser form; itself where none is.

    The receipt of each is what the two forms differ by, and the finer one's error on top: no less than the whole.
    """
    found: dict[str, EncodedTensor] = {}
    for name, tensor in entry.tensors.items():
        made = _measured(name, tensor, basis) if tensor.encoding == KVLearned.name else None
        if made is not None:
            found[name] = made
    return entry if not found else Entry(entry.key, {**entry.tensors, **found}, lossy=entry.lossy)


class Coarser:
    """Keys and values in the form that cold holds of them, as a codec: what it does can be measured like any other."""

    name = KVLearned.name
    lossy = True

    def __init__(self, finer: Basis, basis: Basis) -> None:
        self._finer, self._basis = finer, basis

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor in the finer basis, and make that coarser. Raises CodecError as both do."""
        return coarser(encoded_in(self._finer, name, x, hints), self._basis)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """As kv-learned."""
        return KVLearned().decode(encoded, out)


def _measured(name: str, tensor: EncodedTensor, basis: Basis) -> Measured | None:
    """The coarser form with its receipt; None where the tensor is of another basis, or in this one already."""
    try:
        made = coarser(tensor, basis)
        codec = KVLearned()
        told = Hints(role="key" if tensor.attrs.get("role") == "key" else "value")
        return sealed(codec, name, codec.decode(tensor), made, told).after(tensor.relative_error)
    except CodecError:
        return None


def _symbols(coded: Coded, rows: int) -> torch.Tensor:
    """What was rounded to, in steps of its basis: int32 (coefficients, tokens)."""
    q = coded.columns.astype(np.int32) + rans.ESCAPE
    escaped = q == rans.ESCAPE
    if int(escaped.sum()) != coded.escapes.size:
        raise CodecError(f"kv-learned: {coded.escapes.size} escapes are not as many as its symbols name")
    q[escaped] = coded.escapes
    found = torch.zeros(rows, q.shape[1], dtype=torch.int32)
    found[torch.from_numpy(coded.live)] = torch.from_numpy(q)
    return found
