"""A basis: what kv-learned knows of a model, as a file. Learned once (`codecs.learning`), never changed.

    basis    := a safetensors file; metadata "kvstored.basis": JSON of `About`, "digest": SHA-256
    angles     float64 (layers, pairs)     radians a token that each pair of each layer turns
    ROLE.G     float16 (n, n)              of each group of layers, n = layers*heads*dim: symbols to values, each row
    ROLE.G.scale  float32 (n,)             over its largest entry, and that
    ROLE.mean  float32 (layers*heads*dim,) of keys before RoPE, of values
    ROLE.spread   float32 (layers*heads*dim,)  their variance; of keys it helps to find their position
    ROLE.classes  uint8 (layers*heads*dim,)    the class of each coefficient
    ROLE.tables   uint16 (41, 256)         frequencies of the classes, and of differences from those above
    ROLE.levels   float32 (40, 3)          what is added to the magnitudes 1, 2, 3 of each class

ROLE is "k" or "v". The digest is taken over the metadata without it and over every tensor, so whatever is damaged is
not read; records carry it, so a basis is never taken for another. Bases in use are found by it (`with_digest`).
Thread-safe: a basis never changes.
"""

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvstore.codecs.classes import CLASSES
from kvstore.codecs.rans import SYMBOLS, Tables
from kvstore.codecs.rotation import Rotation
from kvstore.errors import CodecError, ConfigError, UnknownEncoding

VERSION = 1
FILE_MAX_NBYTES = 4 << 30
GROUPS = (1, 3, 10)
"""Layers that are transformed together."""
LEVELS = 3
TIMES = (3, 5, 7, 9)
"""Steps of a finer basis that one of a coarser may be wide."""
_TAG = "kvstored.basis"
Plane = Literal["k", "v"]


@dataclass(frozen=True, slots=True)
class About:
    """What a basis is of. bits, kl: a value and nats a token as learned, kl_measured: through the model; texts: how
    many tokens it was learned from.
    """

    model: str
    layers: int
    heads: int
    dim: int
    group: int
    interleaved: bool
    tokens: int
    bits: float
    kl: float
    kl_measured: float
    version: int = VERSION


class Placed(NamedTuple):
    """What decoding multiplies by, on one device. matrices: float16 (n, n) for each group, scales: float32 (n,) of
    their rows; values: as `Transform.values`.
    """

    matrices: list[torch.Tensor]
    scales: list[torch.Tensor]
    mean: torch.Tensor
    values: torch.Tensor


class Transform:
    """K or V of a model as coefficients in units of one step: by groups of layers, and back."""

    def __init__(self, plane: Plane, tensors: Mapping[str, torch.Tensor], sizes: list[int]) -> None:
        """Raises CodecError unless the tensors are those of groups of so many coefficients."""
        whole = sum(sizes)
        self.sizes = sizes
        self._placed: dict[torch.device, Placed] = {}
        self._narrow = [_tensor(tensors, f"{plane}.{at}", torch.float16, (n, n)) for at, n in enumerate(sizes)]
        self._scales = [_tensor(tensors, f"{plane}.{at}.scale", torch.float32, (n,)) for at, n in enumerate(sizes)]
        self.mean = _tensor(tensors, f"{plane}.mean", torch.float32, (whole,))
        self.spread = _tensor(tensors, f"{plane}.spread", torch.float32, (whole,))
        self.classes = _tensor(tensors, f"{plane}.classes", torch.uint8, (whole,))
        self.tables = Tables(_tensor(tensors, f"{plane}.tables", torch.uint16, (CLASSES + 1, SYMBOLS)).numpy())
        self.levels = _tensor(tensors, f"{plane}.levels", torch.float32, (CLASSES, LEVELS))
        if int(self.classes.max()) >= CLASSES or not bool((self.levels.abs() < 0.5).all() & (self.spread > 0).all()):
            raise CodecError(
                f"a basis's classes lie below {CLASSES}, its levels within half a step, its spread above 0"
            )

    @cached_property
    def inverse(self) -> list[torch.Tensor]:
        """Values of symbols: float32 (n, n) for each group."""
        return [m.to(torch.float32) * s[:, None] for m, s in zip(self._narrow, self._scales, strict=True)]

    @cached_property
    def forward(self) -> list[torch.Tensor]:
        """Symbols of values: the inverse of exactly what decoding multiplies by. float32 (n, n) for each group."""
        try:
            found = [torch.linalg.inv(m.to(torch.float64)).to(torch.float32) for m in self.inverse]
        except RuntimeError as error:
            raise CodecError(f"a basis whose matrix has no inverse: {error}") from None
        if not all(bool(torch.isfinite(m).all()) for m in found):
            raise CodecError("a basis whose matrix has no finite inverse")
        return found

    def on(self, where: torch.device) -> Placed:
        """What decoding needs, on a device: copied there once, and kept as long as this is."""
        found = self._placed.get(where)
        if found is None:
            matrices, scales = ([x.to(where) for x in parts] for parts in (self._narrow, self._scales))
            found = Placed(matrices, scales, self.mean.to(where), self.values.to(where))
            self._placed[where] = found
        return found

    @cached_property
    def values(self) -> torch.Tensor:
        """What each symbol of each class stands for, in steps: float32 (40, 256)."""
        at = torch.arange(-128, 128, dtype=torch.float32).repeat(CLASSES, 1)
        for magnitude in range(1, LEVELS + 1):
            at[:, 128 + magnitude] += self.levels[:, magnitude - 1]
            at[:, 128 - magnitude] -= self.levels[:, magnitude - 1]
        return at


class Basis:
    """A basis that was checked. digest: 64 hexadecimal digits."""

    def __init__(self, about: About, tensors: Mapping[str, torch.Tensor], digest: str) -> None:
        """Raises CodecError unless the tensors are those of `about`."""
        self.about, self.digest = about, digest
        self.tensors = dict(tensors)
        angles = tensors.get("angles")
        pairs = 0 if angles is None else angles.numel() // about.layers
        if pairs > about.dim // 2:
            raise CodecError(f"a basis turns {pairs} pairs of {about.dim} channels")
        self.rotation = Rotation(_tensor(tensors, "angles", torch.float64, (about.layers, pairs)), about.interleaved)
        self.starts = list(range(0, about.layers, about.group))
        row = about.heads * about.dim
        sizes = [min(about.group, about.layers - start) * row for start in self.starts]
        self.planes: dict[str, Transform] = {
            "key": Transform("k", tensors, sizes), "value": Transform("v", tensors, sizes)
        }  # fmt: skip
        if len(tensors) != 1 + 2 * (2 * len(sizes) + 5):
            raise CodecError(f"a basis of {len(sizes)} groups has {len(tensors)} tensors")

    def times(self, finer: "Basis") -> int:
        """How many steps of a finer basis one of this one is wide, where it is that basis but for its step; else 0.

        An odd number: then each cell of the finer symbols lies whole in one of these, and symbols of the finer basis
        say what those here are (`kv_learned.coarser`).
        """
        shape = ("model", "layers", "heads", "dim", "group", "interleaved")
        if any(getattr(self.about, name) != getattr(finer.about, name) for name in shape):
            return 0
        ours, theirs = self.tensors, finer.tensors
        scales = [name for name in ours if name.endswith(".scale")]
        ratio = float(ours[scales[0]][0] / theirs[scales[0]][0]) if scales else 0.0
        times = next((odd for odd in TIMES if abs(ratio - odd) < 0.5), 0)
        alike = [name for name in ours if name.rpartition(".")[2] not in ("scale", "classes", "tables", "levels")]
        same = all(torch.equal(ours[name], theirs[name]) for name in alike)
        return times if same and all(torch.equal(ours[name], theirs[name] * times) for name in scales) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the file's tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def to_bytes(self) -> bytes:
        """The file."""
        return save(self.tensors, {_TAG: _json(self.about), "digest": self.digest})


def made(about: About, tensors: Mapping[str, torch.Tensor]) -> Basis:
    """A new basis, with the digest of what it holds."""
    return Basis(about, tensors, _digest(about, tensors))


def read_basis(path: str | Path) -> Basis:
    """A basis from a file. Raises ConfigError: no file, none of this version, or damaged."""
    try:
        data = Path(path).read_bytes() if Path(path).stat().st_size <= FILE_MAX_NBYTES else b""
    except OSError as error:
        raise ConfigError(f"the basis {path} cannot be read: {error.strerror}") from None
    try:
        return from_bytes(data)
    except CodecError as error:
        raise ConfigError(f"{path} is no basis of kv-learned: {error}") from None


def from_bytes(data: bytes) -> Basis:
    """A basis from its file's bytes. Raises CodecError for whatever is not one, or is damaged."""
    try:
        n = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + min(n, len(data))].decode()).get("__metadata__", {})
        about = _about(json.loads(metadata.get(_TAG, "null")))
        tensors = load(data)
    except (ValueError, SafetensorError, AttributeError, RecursionError, KeyError, TypeError) as error:
        raise CodecError(f"not the file of a basis: {str(error)[:120]}") from None
    if _digest(about, tensors) != metadata.get("digest"):
        raise CodecError("its digest is not that of what it holds: it is damaged")
    return Basis(about, tensors, metadata["digest"])


_IN_USE: "weakref.WeakValueDictionary[str, Basis]" = weakref.WeakValueDictionary()


def use(basis: Basis) -> Basis:
    """Make a basis known to the decoders of this process, as long as whoever uses it holds what is returned."""
    return _IN_USE.setdefault(basis.digest, basis)


def with_digest(digest: object) -> Basis:
    """The basis in use that has a digest. Raises UnknownEncoding for none, CodecError for what is no digest."""
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CodecError(f"kv-learned names its basis by 64 hexadecimal digits, not {digest!r:.80}")
    found = _IN_USE.get(digest)
    if found is None:
        raise UnknownEncoding(
            f"kv-learned: no basis here has the digest {digest[:16]}...; name its file in store.warm.bases"
        )
    return found


def predicted_kl(digest: str) -> float | None:
    """Nats a token that were predicted when a basis in use was learned; None without it."""
    found = _IN_USE.get(digest)
    return None if found is None else found.about.kl


def _about(value: object) -> About:
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise CodecError(f"no basis of version {VERSION}")
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for field in fields(About):
        got = value.get(field.name)
        kind = kinds[field.type if isinstance(field.type, str) else field.type.__name__]
        if not isinstance(got, kind) or (kind is not bool and isinstance(got, bool)):  # type: ignore[arg-type]
            raise CodecError(f"a basis's {field.name} is {got!r:.40}")
    about = About(**{field.name: value[field.name] for field in fields(About)})
    sizes = (about.layers, about.heads, about.dim, about.group)
    if min(sizes) < 1 or max(sizes) > 1 << 16 or about.group not in GROUPS:
        raise CodecError(f"a basis of layers, heads, dim and group {sizes}; groups are of {GROUPS} layers")
    return about


def _json(about: About) -> str:
    return json.dumps(asdict(about), sort_keys=True)


def _digest(about: About, tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(_json(about).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"\0{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        found.update(np.ascontiguousarray(x.contiguous().view(-1).view(torch.uint8).numpy()).data)
    return found.hexdigest()


def _tensor(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    x = tensors.get(name)
    if x is None or x.dtype != dtype or tuple(x.shape) != shape:
        found = "nothing" if x is None else f"{x.dtype} {tuple(x.shape)}"
        raise CodecError(f"a basis's tensor {name!r} is {dtype} {shape}, not {found}")
    if dtype.is_floating_point and not bool(torch.isfinite(x).all()):
        raise CodecError(f"a basis's tensor {name!r} holds what is not finite")
    return x
