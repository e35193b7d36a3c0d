"""The compiled CPU kernel through ctypes: same bytes as the torch reference, without Python's lock.

The kernel is another distribution (`kernel/`); if it is not installed, or has another ABI, `LIBRARY` is
None and the reference is used. Of another ABI there is a warning in the log: it was meant to be used.
Invariant: every length passed to C is computed here from the tensor that owns the memory, so the kernel
never reads outside it. Any thread.
"""

import ctypes
import importlib
import logging
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.kernels.tables import table

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

ABI = 7
THREADED_NBYTES = 4 << 20
"""Below it one thread is faster: starting another takes about 30 us, as long as 1 MiB."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, NOT_FINITE = 0, 1


class Rows(ctypes.Structure):
    """`kvk_rows` of kernel/src/kvstored_kernel.h: slabs of tokens x inner x d values, `stride` apart."""

    _fields_ = (
        ("outer", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("size", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("groups", ctypes.c_int32),
    )


class Along(ctypes.Structure):
    """`kvk_along` of kernel/src/kvstored_kernel.h: which tokens means are taken of, and what lacks them."""

    _fields_ = (
        ("first", ctypes.c_int64),
        ("every", ctypes.c_int64),
        ("sure", ctypes.c_float),
        ("most", ctypes.c_float),
    )


class Phases(ctypes.Structure):
    """`kvk_phases` of kernel/src/kvstored_kernel.h: what is looked at, and what shows that a pair turns."""

    _fields_ = (
        ("sampled", ctypes.c_int32),
        ("lags", ctypes.c_int32 * 3),
        ("whole", ctypes.c_double),
        ("seen", ctypes.c_double),
        ("worth", ctypes.c_double),
    )


class Rotary(NamedTuple):
    """Which channels of a row turn in pairs: the first `channels`, neighbours or half of them apart."""

    channels: int
    interleaved: bool


STILL = Rotary(0, interleaved=False)


class Turns(NamedTuple):
    """Means that turn. tangents: float32 (outer, pairs), tan(w/2) of the angle w that a pair turns by a token.

    turning: uint8 (outer, inner, ceil(pairs/8)), a bit for each pair of each head, low bits first.
    """

    rotary: Rotary
    tangents: torch.Tensor
    turning: torch.Tensor


class LearnedGroup(ctypes.Structure):
    """`kvk_learned` of kernel/src/kvstored_kernel.h: a group of layers of kv-learned, and where its values go."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "heads", "d", "tokens", "stride", "live")),
        *((name, ctypes.c_void_p) for name in ("values", "matrix", "mean", "cosine", "sine", "of")),
        ("pairs", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
    )


class _Turns(ctypes.Structure):
    """`kvk_turns` of kernel/src/kvstored_kernel.h."""

    _fields_ = (
        ("tangents", ctypes.c_void_p),
        ("turning", ctypes.c_void_p),
        ("rotary", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
    )


def installed() -> tuple[ctypes.CDLL | None, int]:
    """The library that is installed, whatever its ABI, and that number; 0 for one that does not tell it."""
    try:
        path: str = importlib.import_module("kvstored_kernel").LIBRARY_PATH
        library = ctypes.CDLL(path)
    except (ImportError, OSError):
        return None, 0
    tell = getattr(library, "kvk_abi", None)
    return library, 0 if tell is None else int(tell())


def _opened() -> ctypes.CDLL | None:
    library, abi = installed()
    if library is None:
        return None
    if abi != ABI:
        log.warning(
            "codec kernel not used abi=%s needed=%s effect=slower codecs, in plain torch "
            "do=install the kernel of this version (make kernel)", abi, ABI,
        )  # fmt: skip
        return None
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    rows = ctypes.POINTER(Rows)
    library.kvk_nf4_encode.argtypes = (i, i, i, p, n, p, p, p)
    library.kvk_nf4_decode.argtypes = (i, i, i, p, p, n, p)
    library.kvk_nf4_scales.argtypes = (i, i, p, n, ctypes.c_float, p, p, p, p, p, p)
    library.kvk_kv_means.argtypes = (i, i, i, p, rows, p, p, p, i, i, p)
    library.kvk_kv_expand.argtypes = (rows, p, p, p)
    library.kvk_kv_content.argtypes = (i, i, i, p, rows, i, p, p)
    library.kvk_kv_missed.argtypes = (rows, p, p)
    library.kvk_kv_along.argtypes = (i, i, i, p, rows, ctypes.POINTER(Along), p, p)
    library.kvk_kv_distance.argtypes = (i, i, i, p, p, rows, p)
    turns = ctypes.POINTER(_Turns)
    library.kvk_kv_phases.argtypes = (i, i, i, p, rows, turns, ctypes.POINTER(Phases), p, p, p, p)
    library.kvk_kv_sums.argtypes = (i, i, i, p, rows, turns, p, p, p, p)
    library.kvk_kv_code_means.argtypes = (i, i, rows, turns, p, p, p, p, p)
    library.kvk_kv_expand_eights.argtypes = (rows, p, p, p)
    library.kvk_kv_encode.argtypes = (i, i, i, p, rows, p, turns, p, p, p, p)
    library.kvk_kv_decode.argtypes = (i, i, i, p, p, p, p, turns, rows, p)
    library.kvk_rans_decode.argtypes = (i, p, n, n, n, p, n, p, n, p)
    library.kvk_rans_encode.argtypes = (p, n, n, p, n, p, p, n, p, ctypes.POINTER(n))
    learned = ctypes.POINTER(LearnedGroup)
    library.kvk_learned_decode.argtypes = (i, i, learned, p, p, p, p, n, p, ctypes.POINTER(n))
    return library


LIBRARY = _opened()
ISAS = ("portable", "avx2", "avx512", "avx512vbmi")


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """The kernel at one instruction set (an index into ISAS, at most what the machine has)."""

    library: ctypes.CDLL
    isa: int

    def nf4_encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`reference.quantize`, or None where a value is not finite. x: flat, contiguous, on the CPU."""
        n = x.numel()
        codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cpu")
        absmax = torch.empty((n + 63) // 64, dtype=torch.float32, device="cpu")
        sums = torch.empty(3, absmax.numel(), dtype=torch.int32, device="cpu")
        out = (codes.data_ptr(), absmax.data_ptr(), sums.data_ptr())
        status = self.library.kvk_nf4_encode(self.isa, _threads(x), DTYPES[x.dtype], x.data_ptr(), n, *out)
        return None if _checked(status) == NOT_FINITE else (codes, absmax, sums)

    def nf4_decode(self, codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        """`reference.dequantize` into out, flat and contiguous, whose lengths the caller has checked."""
        _checked(
            self.library.kvk_nf4_decode(
                self.isa,
                _threads(out),
                DTYPES[out.dtype],
                codes.data_ptr(),
                absmax.data_ptr(),
                out.numel(),
                out.data_ptr(),
            )
        )

    def nf4_scales(
        self, absmax: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
        """`reference.quantize_scales` of float32 (b,), and of each group (squared error, energy), float64 (groups, 2).

        sums: as `nf4_encode` returns them. The squares are those of `reference.squares`.
        """
        b, offset = absmax.numel(), float(absmax.mean())
        codes = torch.empty(b, dtype=torch.uint8, device="cpu")
        nested = torch.empty((b + 255) // 256, dtype=torch.float32, device="cpu")
        squares = torch.empty(nested.numel(), 2, dtype=torch.float64, device="cpu")
        tables = (table("scale_lut", absmax.device), table("scale_map", absmax.device), sums)
        where = (t.data_ptr() for t in (*tables, codes, nested, squares))
        threads = torch.get_num_threads() if b >= THREADED_NBYTES >> 6 else 1
        _checked(self.library.kvk_nf4_scales(self.isa, threads, absmax.data_ptr(), b, offset, *where))
        return codes, nested, offset, squares

    def kv_means(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`reference_kv.group_means` of rows of x, the decoded means of each group, and with a rotary `kv_content`."""
        shape = (rows.outer, rows.groups, rows.inner)
        codes = torch.empty(*shape, rows.d, dtype=torch.int8, device="cpu")
        scales = torch.empty(shape, dtype=torch.float32, device="cpu")
        means = torch.empty(*shape, rows.d, dtype=torch.float32, device="cpu")
        content = None if rotary is None else torch.empty(*shape, 2, dtype=torch.float64, device="cpu")
        where = (codes.data_ptr(), scales.data_ptr(), means.data_ptr(), *(rotary or STILL), _place(content))
        _checked(self.library.kvk_kv_means(self.isa, _threads(x), DTYPES[x.dtype], x.data_ptr(), rows, *where))
        return codes, scales, means, None if content is None else content.sum(dim=1)

    def kv_content(self, x: torch.Tensor, rows: Rows, *rotaries: Rotary) -> torch.Tensor:
        """`reference_content.energies` of rows of x for each pairing. Returns float64 (pairings, outer, inner, 2)."""
        groups = max(1, (rows.tokens + 32) // 64)
        content = torch.empty(len(rotaries), rows.outer, groups, rows.inner, 2, dtype=torch.float64, device="cpu")
        told = (ctypes.c_int32 * (2 * len(rotaries)))(*(number for rotary in rotaries for number in rotary))
        where = (x.data_ptr(), rows, len(rotaries), told, content.data_ptr())
        _checked(self.library.kvk_kv_content(self.isa, _threads(x), DTYPES[x.dtype], *where))
        return content.sum(dim=2)

    def kv_missed(self, rows: Rows, error: torch.Tensor) -> torch.Tensor:
        """`reference_content.missed`."""
        missed = torch.empty(rows.outer, rows.inner, dtype=torch.float64, device="cpu")
        _checked(self.library.kvk_kv_missed(rows, error.data_ptr(), missed.data_ptr()))
        return missed

    def kv_along(self, x: torch.Tensor, rows: Rows, how: Along) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_along`."""
        distance, lacking = torch.empty(2, rows.outer, rows.tokens, dtype=torch.float32, device="cpu")
        where = (x.data_ptr(), rows, how, distance.data_ptr(), lacking.data_ptr())
        _checked(self.library.kvk_kv_along(self.isa, _threads(x), DTYPES[x.dtype], *where))
        return distance, lacking

    def kv_distance(self, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Squared distance of two tensors of one type, head by head. Returns float64 (outer, inner)."""
        squares = torch.empty(rows.outer, rows.inner, dtype=torch.float64, device="cpu")
        where = (x.data_ptr(), y.data_ptr(), rows, squares.data_ptr())
        _checked(self.library.kvk_kv_distance(self.isa, _threads(x), DTYPES[x.dtype], *where))
        return squares

    def kv_expand(self, rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Decoded means of each group. codes: int8 (outer, groups, inner, d). Returns float32, that shape."""
        means = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        _checked(self.library.kvk_kv_expand(rows, codes.data_ptr(), scales.data_ptr(), means.data_ptr()))
        return means

    def kv_phases(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary, how: Phases
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_phases`."""
        pairs = rotary.channels // 2
        power = torch.empty(rows.outer, rows.inner, dtype=torch.float64, device="cpu")
        pooled = torch.empty(rows.outer, pairs, len(how.lags), 2, dtype=torch.float64, device="cpu")
        shown = torch.empty(rows.outer, pairs, dtype=torch.bool, device="cpu")
        heads = torch.empty(rows.outer, dtype=torch.int32, device="cpu")
        where = (x.data_ptr(), rows, _Turns(None, None, *rotary), how)
        out = (power.data_ptr(), pooled.data_ptr(), shown.data_ptr(), heads.data_ptr())
        _checked(self.library.kvk_kv_phases(self.isa, _threads(x), DTYPES[x.dtype], *where, *out))
        return power, pooled, shown, heads

    def kv_sums(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary, tangents: torch.Tensor | None, *, content: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`reference_turn.kv_sums`."""
        still = torch.empty(rows.outer, rows.groups, rows.inner, rows.d, dtype=torch.float32, device="cpu")
        gains = torch.empty(rows.outer, rows.inner, rotary.channels // 2, dtype=torch.float32, device="cpu")
        turned, turns = still, _Turns(None, None, *rotary)
        if tangents is not None:
            turned = torch.zeros_like(still)
            turns.tangents = tangents.data_ptr()
        shape = (rows.outer, rows.groups, rows.inner, 2)
        energies = torch.empty(shape, dtype=torch.float64, device="cpu") if content else None
        where = (still.data_ptr(), turned.data_ptr(), gains.data_ptr(), _place(energies))
        _checked(self.library.kvk_kv_sums(self.isa, _threads(x), DTYPES[x.dtype], x.data_ptr(), rows, turns, *where))
        return still, turned, gains, None if energies is None else energies.sum(dim=1)

    def kv_code_means(
        self, rows: Rows, turns: Turns | None, still: torch.Tensor, turned: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_code_means`."""
        codes = torch.empty(still.shape, dtype=torch.int8, device="cpu")
        scales = torch.empty(*still.shape[:3], -(-rows.d // 8), dtype=torch.uint8, device="cpu")
        means = torch.empty_like(still)
        where = (still, turned, codes, scales, means)
        how = (self.isa, _threads(still), rows, _turning(turns))
        _checked(self.library.kvk_kv_code_means(*how, *(part.data_ptr() for part in where)))
        return codes, scales, means

    def kv_expand_eights(self, rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """`reference_turn.kv_expand_eights`."""
        means = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        where = (codes.data_ptr(), scales.data_ptr(), means.data_ptr())
        _checked(self.library.kvk_kv_expand_eights(rows, *where))
        return means

    def kv_encode(
        self, x: torch.Tensor, rows: Rows, means: torch.Tensor | None, turns: Turns | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Codes, scales, tops and errors as `reference_kv.encode_rotated` gives; None where not finite."""
        blocks = -(-rows.outer * rows.tokens * rows.inner * rows.d // rows.block)
        codes = torch.empty(blocks * rows.block // 2, dtype=torch.uint8, device="cpu")
        scales = torch.empty(blocks, dtype=torch.uint8, device="cpu")
        tops = torch.empty((blocks + 255) // 256, dtype=torch.int16, device="cpu")
        error = torch.empty(blocks, dtype=torch.float32, device="cpu")
        out = (codes.data_ptr(), scales.data_ptr(), tops.data_ptr(), error.data_ptr())
        mean = 0 if means is None else means.data_ptr()
        how = (self.isa, _threads(x), DTYPES[x.dtype])
        status = self.library.kvk_kv_encode(*how, x.data_ptr(), rows, mean, _turning(turns), *out)
        return None if _checked(status) == NOT_FINITE else (codes, scales, tops, error)

    def kv_decode(
        self,
        coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        means: torch.Tensor | None,
        rows: Rows,
        out: torch.Tensor,
        turns: Turns | None = None,
    ) -> None:
        """Rows of out from codes, scales and tops, whose lengths the caller has checked."""
        parts = tuple(part.data_ptr() for part in coded)
        mean = 0 if means is None else means.data_ptr()
        how = (self.isa, _threads(out), DTYPES[out.dtype])
        _checked(self.library.kvk_kv_decode(*how, *parts, mean, _turning(turns), rows, out.data_ptr()))

    def rans_encode(self, columns: Array, classes: Array, counts: Array, starts: Array, lanes: int) -> bytes | None:
        """`codecs.rans.encode` of symbols + 128, uint8 (rows, width); None for a symbol of frequency 0.

        classes: uint8 (rows,); counts, starts: uint16 (tables, 256).
        """
        rows, width = columns.shape
        columns, classes, counts, starts = map(np.ascontiguousarray, (columns, classes, counts, starts))
        out, written = np.empty(2 * rows * width + 4 * lanes, np.uint8), ctypes.c_int64()
        status = self.library.kvk_rans_encode(
            columns.ctypes.data, rows, max(width, 1), classes.ctypes.data, len(counts),
            counts.ctypes.data, starts.ctypes.data, lanes, out.ctypes.data, ctypes.byref(written),
        )  # fmt: skip
        return out[out.size - written.value :].tobytes() if status == OK else None

    def rans_decode(
        self, data: Array, shape: tuple[int, int], classes: Array, slots: Array, lanes: int
    ) -> Array | None:
        """Symbols + 128, uint8 (rows * width,), of a stream uint8 (nbytes,); None for what is no stream.

        classes: uint8 (rows,); slots: `codecs.rans.Tables.packed`.
        """
        data, classes, slots = map(np.ascontiguousarray, (data, classes, slots))
        out = np.empty(shape[0] * shape[1], np.uint8)
        how = (classes.ctypes.data, len(slots), slots.ctypes.data, lanes, out.ctypes.data)
        status = self.library.kvk_rans_decode(self.isa, data.ctypes.data, data.size, *shape, *how)
        return out if status == OK else None

    def learned_decode(
        self, group: LearnedGroup, columns: Array, live: Array, classes: Array, escapes: Array, out: torch.Tensor
    ) -> int | None:
        """Values of a group of layers into `out`, whose first one is the group's. Returns how many escapes were taken.

        None where they do not suffice or a value is not finite. columns: symbols + 128, uint8 (live, tokens); live:
        int32, which coefficients they are of; classes: uint8 (live,); escapes: int16.
        """
        used = ctypes.c_int64()
        where = (columns.ctypes.data, live.ctypes.data, classes.ctypes.data, escapes.ctypes.data, escapes.size)
        how = (self.isa, DTYPES[out.dtype], group, *where, out.data_ptr(), ctypes.byref(used))
        return used.value if self.library.kvk_learned_decode(*how) == OK else None


class _Calling(threading.local):
    single = False


_calling = _Calling()


def stay_single() -> None:
    """Never split this thread's work over several threads: the other processors have other work."""
    _calling.single = True


def _threads(x: torch.Tensor) -> int:
    """Threads for a tensor: torch's own number, so that `torch.set_num_threads` pins kernel and copies alike."""
    if _calling.single or x.numel() * x.element_size() < THREADED_NBYTES:
        return 1
    return torch.get_num_threads()


def _turning(turns: Turns | None) -> _Turns | None:
    if turns is None:
        return None
    return _Turns(turns.tangents.data_ptr(), turns.turning.data_ptr(), *turns.rotary)


def _place(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _checked(status: int) -> int:
    if status not in {OK, NOT_FINITE}:
        raise ValueError(f"the codec kernel refused its arguments (status {status})")
    return status


def kernels() -> list[CpuKernel]:
    """One kernel for each instruction set this machine has, the best last; empty where none is installed."""
    if LIBRARY is None:
        return []
    return [CpuKernel(LIBRARY, isa) for isa in range(LIBRARY.kvk_isa() + 1)]
