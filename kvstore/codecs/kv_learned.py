"""kv-learned: keys before RoPE and values in a basis learned for their model, entropy coded. 2 to 3.5 bits a value.

A basis (`basis`) turns the K or V of a group of layers into coefficients that are independent of each other and all
as harmful when they are wrong, so one step of one rounds all of them. Their symbols are coded by `rans` under the class
that fits each coefficient in this chunk (`classes`). The same symbols come from what was decoded, so nothing drifts.
Records carry the digest of the basis: without it they are misses (UnknownEncoding). The format: docs/codecs.md.
Values are read alike everywhere: their products are summed in the order of coefficients. Symbols are chosen by products
of the machine's, so values in the middle of two may be coded as either.
Pure, any thread.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from kvstore.codecs import Codec, codec_named, rans
from kvstore.codecs.basis import Basis, Transform, with_digest
from kvstore.codecs.classes import CLASSES, DELTA, chosen, histograms_of, reach
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.nf4_kv import in_halves
from kvstore.codecs.nf4_kv2 import kept_of
from kvstore.codecs.parts import Part, finite, prepared_out, require_finite, require_names, require_part
from kvstore.codecs.receipt import role_in
from kvstore.codecs.rotation import FOUND_BELOW, POSITIONS_MAX
from kvstore.dtypes import LOSSY_ALLOWED, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels import Products, cpu_kernel, host_kernel, products_on
from kvstore.kernels.cpu import CpuKernel, LearnedGroup
from kvstore.kernels.reference_learned import learned_products

TOKENS_MIN, TOKENS_MAX = 8, 1 << 16
BITS_MAX = 6.0
"""A basis of another model costs more; its own never did (3.6 at the finest step measured)."""
_RANK = 4
_FINITE = "kv-learned holds finite values only; keep these raw"
_LARGEST = 32767
_FITS = 0.01
"""Of a step, squared: what values that were decoded in this basis miss their symbols by; fresh ones miss by 0.08."""
_REACHES = torch.tensor([reach(of) for of in range(CLASSES)], dtype=torch.int32)
_LENGTH_NBYTES = 4
_NOTHING = torch.empty(0)


class Coded(NamedTuple):
    """What a tensor's streams say.

    columns: symbols + 128 of the coefficients that have any, uint8 (live, tokens); live: which those are, int64;
    classes: theirs, uint8; escapes: the values of symbols -128, int16, in order.
    """

    columns: rans.Array
    live: rans.Array
    classes: rans.Array
    escapes: rans.Array


class KVLearned:
    """Decodes what `Learned` wrote, by the bases in use in this process."""

    name = "kv-learned"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Never called: only a policy with a basis encodes. Raises CodecError."""
        del x, hints
        raise CodecError(f"kv-learned is written by a policy with a basis, not for {name!r} alone")

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in fresh memory or in `out`.

        Raises UnknownEncoding without the basis, CodecError where parts, attributes, spec and basis do not agree.
        """
        basis, role, kept, position = checked(encoded)
        out = prepared_out(encoded.spec, encoded.parts[""].device, out)
        body = out[:, kept:]
        coded = read_coded(encoded, basis.planes[role], kept)
        kernel, products = cpu_kernel(out), products_on(out)
        if kernel is not None:
            _filled(kernel, basis, role, coded, position + kept, body)
        elif products is None and (kernel := host_kernel()) is not None:  # a device without a compiler
            here = torch.empty(body.shape, dtype=out.dtype)
            _filled(kernel, basis, role, coded, position + kept, here)
            body.copy_(here)
        else:
            values = _values(basis, role, coded, position + kept, products or learned_products, out.device)
            body.copy_(require_finite(encoded.encoding, "", values.to(out.dtype)))
        if kept:
            out[:, :kept].copy_(encoded.parts["kept"].view(out[:, :kept].shape))
        return out

    def check(self, encoded: EncodedTensor) -> None:
        """Raise what `decode` would. A stream shows only at its end whether it is one, so it is decoded."""
        self.decode(encoded)


class Learned:
    """Keys and values of a basis's model by kv-learned, all else by `rest`."""

    name = KVLearned.name
    lossy = True

    def __init__(self, basis: Basis, rest: Codec, others: Sequence[Basis] = ()) -> None:
        """others: bases of the same model; a copy that was decoded from one of them is encoded in that one again."""
        self.basis, self._rest, self._others = basis, rest, tuple(others)

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode one tensor. Raises CodecError if neither can."""
        if not finite(x):
            raise CodecError(_FINITE)
        found: list[tuple[float, EncodedTensor]] = []
        for basis in (self.basis, *(self._others if hints.decoded else ())):
            with suppress(CodecError):
                found.append(_encoded_in(basis, name, x, hints))
        # Nested bases (`coarser`) have values in common: what was decoded is of the one that it lies on best.
        return min(found, key=lambda one: one[0])[1] if found else self._rest.encode(name, x, hints)

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Decode by the name that was stored."""
        return codec_named(encoded.encoding).decode(encoded, out)


def encoded_in(basis: Basis, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
    """Keys or values (layers, tokens, heads, dim) of a basis's model. Raises CodecError for anything else.

    Also for values beyond the basis's range, and for copies decoded from a lossy form that is not of this basis.
    """
    return _encoded_in(basis, name, x, hints)[1]


def _encoded_in(basis: Basis, name: str, x: torch.Tensor, hints: Hints) -> tuple[float, EncodedTensor]:
    """By how much of a step, squared, decoded values lie beside those of this basis, and the tensor."""
    x = x.detach()
    about, role = basis.about, role_in(name, x, hints)
    spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
    if role not in basis.planes or spec.dtype not in LOSSY_ALLOWED or not _is_of(spec.shape, basis):
        raise CodecError(f"kv-learned: {name!r} of {spec} is not K or V of {about.model!r:.80}")
    if hints.token_axis not in (None, -3):
        raise CodecError("kv-learned needs tokens before heads")
    x = x.cpu()
    if not finite(x):
        raise CodecError(_FINITE)
    attrs: dict[str, object] = {"basis": basis.digest, "role": role}
    position = _position(basis, x, hints) if role == "key" else 0
    if role == "key":
        attrs["position"] = position
    kept = _kept(x, "key" if role == "key" else "value", hints, position)
    attrs["kept"] = kept
    y = coefficients(basis, role, x[:, kept:], position + kept)
    main, symbols, classes = written(basis.planes[role], y)
    misfit = _misfit(basis.planes[role], y, symbols, classes) if hints.decoded else 0.0
    if misfit >= _FITS:
        raise CodecError("kv-learned: these were decoded from another lossy form")
    if 8 * main.numel() > BITS_MAX * x[:, kept:].numel():
        raise CodecError(f"kv-learned would need over {BITS_MAX} bits a value: {name!r} is not what its basis is of")
    parts = {"": main, "kept": in_halves(x[:, :kept])} if kept else {"": main}
    return misfit, EncodedTensor(spec, KVLearned.name, parts, attrs)


def coefficients(basis: Basis, role: str, x: torch.Tensor, first: int) -> torch.Tensor:
    """Coefficients in steps: float32 (layers*heads*dim, tokens). x: (layers, tokens, heads, dim); first: position."""
    before = basis.rotation.turned(x, first, back=True) if role == "key" else x.to(torch.float32)
    rows = before.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    transform = basis.planes[role]
    rows = rows - transform.mean[:, None]
    pieces = torch.split(rows, transform.sizes)
    return torch.cat([m @ piece for m, piece in zip(transform.forward, pieces, strict=True)])


def _is_of(shape: tuple[int, ...], basis: Basis) -> bool:
    about = basis.about
    if len(shape) != _RANK or not TOKENS_MIN <= shape[1] <= TOKENS_MAX:
        return False
    return (shape[0], shape[2], shape[3]) == (about.layers, about.heads, about.dim)


def _position(basis: Basis, x: torch.Tensor, hints: Hints) -> int:
    if hints.position is not None and 0 <= hints.position < FOUND_BELOW:
        return hints.position
    if hints.prefix_start:
        return 0
    about, transform = basis.about, basis.planes["key"]
    shape = (about.layers, about.heads, about.dim)
    return basis.rotation.position_of(x, transform.mean.view(shape), transform.spread.view(shape))


def _kept(x: torch.Tensor, part: Part, hints: Hints, position: int) -> int:
    """How many of the first tokens stay in 16 bits: those of a prompt's start."""
    if hints.prefix_start is None and part == "key":
        hints = replace(hints, prefix_start=position == 0)
    return 0 if hints.prefix_start is False else len(kept_of(x, part, hints))


def written(transform: Transform, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The main part: two streams, the first behind its length, and the escapes; and the symbols and classes in it.

    y: coefficients in steps, float32 (coefficients, tokens).
    """
    q = y.round()
    if float(q.abs().max()) > _LARGEST:
        raise CodecError(f"kv-learned holds {_LARGEST} steps, not {float(q.abs().max()):g}")
    q = q.to(torch.int32)
    symbols = torch.where(q.abs() <= -rans.ESCAPE - 1, q, rans.ESCAPE).to(torch.int8)
    classes = chosen(histograms_of(symbols), transform.tables, transform.classes)
    escaped = q.abs() > _REACHES[classes.long()][:, None]
    symbols[escaped] = rans.ESCAPE
    away = (classes.to(torch.int16) - transform.classes.to(torch.int16)).to(torch.int8)
    which = np.full(1, DELTA, np.uint8)
    named = rans.encode(away.numpy()[None], which, transform.tables)
    live = classes > 0
    stream = rans.encode(symbols[live].numpy(), classes[live].numpy(), transform.tables)
    rest = q[escaped].to(torch.int16).numpy().astype("<i2").tobytes()
    whole = b"".join([len(named).to_bytes(_LENGTH_NBYTES, "little"), named,
                      len(stream).to_bytes(_LENGTH_NBYTES, "little"), stream, rest])  # fmt: skip
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8), symbols, classes


def _misfit(transform: Transform, y: torch.Tensor, symbols: torch.Tensor, classes: torch.Tensor) -> float:
    """By how much of a step, squared, coefficients lie beside their values in the mean."""
    missed = (y - _dequantized(transform.values, symbols, classes)).square()
    return float(missed[symbols != rans.ESCAPE].mean())


def _dequantized(values: torch.Tensor, symbols: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    at = symbols.to(torch.int32) - rans.ESCAPE + classes.to(torch.int32)[:, None] * rans.SYMBOLS
    return values.view(-1)[at]


def checked(encoded: EncodedTensor) -> tuple[Basis, str, int, int]:
    """Basis, role, kept tokens and position, after everything but the stream was checked."""
    attrs, spec = encoded.attrs, encoded.spec
    basis = with_digest(attrs.get("basis"))
    role, kept, position = attrs.get("role"), attrs.get("kept"), attrs.get("position", 0)
    if not isinstance(role, str) or role not in basis.planes:
        raise CodecError(f"kv-learned holds key or value, not {role!r:.40}")
    if spec.dtype not in LOSSY_ALLOWED or not _is_of(spec.shape, basis):
        raise CodecError(f"kv-learned: {spec} is not of its basis, {basis.about.model!r:.80}")
    if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept < spec.shape[1]:
        raise CodecError(f"kv-learned keeps 0 to {spec.shape[1] - 1} tokens, not {kept!r:.40}")
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < POSITIONS_MAX:
        raise CodecError(f"kv-learned: a position is 0 to {POSITIONS_MAX - 1}, not {position!r:.40}")
    require_names(encoded, {"", "kept"} if kept else {""})
    if kept:
        part = encoded.parts["kept"]
        if part.dtype not in (torch.float16, torch.bfloat16):
            raise CodecError(f"kv-learned keeps tokens in 16 bits, not in {part.dtype}")
        numel = prod(spec.shape) // spec.shape[1] * kept
        held = require_finite(encoded.encoding, "kept", require_part(encoded, "kept", part.dtype, numel))
        require_finite(encoded.encoding, "kept", held.to(getattr(torch, spec.dtype)))
    return basis, role, kept, position


def read_coded(encoded: EncodedTensor, transform: Transform, kept: int) -> Coded:
    """What a tensor's streams say, all of it checked but how many escapes there are."""
    main = encoded.parts[""]
    data = require_part(encoded, "", torch.uint8, main.numel()).cpu().numpy()
    named, data = _behind_length(data)
    count, tokens = transform.classes.numel(), encoded.spec.shape[1] - kept
    away = rans.decode(named, 1, count, np.full(1, DELTA, np.uint8), transform.tables)[0].astype(np.int16)
    classes = transform.classes.numpy().astype(np.int16) + away
    if int(classes.min()) < 0 or int(classes.max()) >= CLASSES:
        raise CodecError(f"kv-learned: a class is 0 to {CLASSES - 1}")
    stream, data = _behind_length(data)
    live = np.flatnonzero(classes)
    of = classes[live].astype(np.uint8)
    columns = rans.columns(stream, live.size, tokens, of, transform.tables).reshape(live.size, tokens)
    if data.size % 2:
        raise CodecError(f"kv-learned: {data.size} bytes of escapes")
    return Coded(columns, live, of, np.frombuffer(data.tobytes(), "<i2").astype(np.int16))


def _behind_length(data: rans.Array) -> tuple[rans.Array, rans.Array]:
    """A stream that stands behind its length, and what follows."""
    length = int.from_bytes(data[:_LENGTH_NBYTES].tobytes(), "little")
    if data.size < _LENGTH_NBYTES + length:
        raise CodecError(f"kv-learned: a stream of {length} bytes in {data.size}")
    return data[_LENGTH_NBYTES : _LENGTH_NBYTES + length], data[_LENGTH_NBYTES + length :]


def _too_few(escapes: int) -> CodecError:
    return CodecError(f"kv-learned: {escapes} escapes are not as many as its symbols name")


def _filled(kernel: CpuKernel, basis: Basis, role: str, coded: Coded, first: int, out: torch.Tensor) -> None:
    """Values into out (layers, tokens, heads, dim), a group of layers at a time. first: their position."""
    about, transform, rotation = basis.about, basis.planes[role], basis.rotation
    pairs = rotation.angles.shape[1] if role == "key" else 0
    cosine, sine = rotation.frame(first, out.shape[1]) if pairs else (_NOTHING, _NOTHING)
    of = rotation.tables[1].to(torch.int32) if pairs else _NOTHING
    values, start, taken = transform.values, 0, 0
    ends = np.searchsorted(coded.live, np.cumsum(transform.sizes))
    for at, (matrix, end) in enumerate(zip(transform.inverse, ends.tolist(), strict=True)):
        layer, row = basis.starts[at], sum(transform.sizes[:at])
        live = (coded.live[start:end] - row).astype(np.int32)
        group = LearnedGroup(
            min(about.group, about.layers - layer), about.heads, about.dim, out.shape[1], out.stride(0), live.size,
            values.data_ptr(), matrix.data_ptr(), transform.mean[row:].data_ptr(), cosine.data_ptr(), sine.data_ptr(),
            of[layer:].data_ptr(), pairs, basis.rotation.interleaved,
        )  # fmt: skip
        symbols = coded.columns[start:end], live, coded.classes[start:end], coded.escapes[taken:]
        used = kernel.learned_decode(group, *symbols, out[layer:])
        if used is None:
            raise CodecError("kv-learned: too few escapes, or values that are not finite")
        start, taken = end, taken + used
    if taken != coded.escapes.size:
        raise _too_few(coded.escapes.size)


def _values(basis: Basis, role: str, coded: Coded, first: int, products: Products, where: torch.device) -> torch.Tensor:
    """As `_filled`, in plain torch beside the products: float32 (layers, tokens, heads, dim) on a device."""
    about, transform = basis.about, basis.planes[role]
    placed = transform.on(where)
    classes, columns, live = (torch.from_numpy(of).to(where) for of in (coded.classes, coded.columns, coded.live))
    symbols = columns.to(torch.int32) + rans.ESCAPE
    y = _dequantized(placed.values, symbols, classes)
    escaped = symbols == rans.ESCAPE
    if int(escaped.sum()) != coded.escapes.size:
        raise _too_few(coded.escapes.size)
    y[escaped] = torch.from_numpy(coded.escapes).to(where, torch.float32)
    rows = torch.empty(sum(transform.sizes), y.shape[1], device=where)
    ends = [0, *np.searchsorted(coded.live, np.cumsum(transform.sizes)).tolist()]
    for at, (matrix, scale) in enumerate(zip(placed.matrices, placed.scales, strict=True)):
        row, mine = sum(transform.sizes[:at]), slice(ends[at], ends[at + 1])
        live_ = matrix[:, live[mine] - row].to(torch.float32) * scale[:, None]
        products(live_, y[mine], rows[row : row + len(matrix)])
    rows += placed.mean[:, None]
    x = rows.view(about.layers, about.heads, about.dim, -1).permute(0, 3, 1, 2)
    return basis.rotation.turned(x, first, back=False) if role == "key" else x
