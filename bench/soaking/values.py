"""Values that say what they are: any process can tell of each byte whether it belongs to a key, a tenant and a version.

Three forms. "exact": 8-byte words that follow from a table and from one word of (tenant, key, version), so that a word
of another value, or at another place, is found. "float": keys and values as a model has them, which the store may keep
with a loss; rows of 64 numbers are compared within a tolerance that another version's rows are far outside of.
"prefix": the same, each token's row following from the token and its place, for the prefix layer.
Each entry of the first two forms has a tensor "about" beside it: JSON with tenant, key, version, sizes and a checksum.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

LARGEST_NBYTES = 16 << 20
SMALLEST_NBYTES = 1 << 10
FLOATS = 1 << 20
ROW = 64
LAYERS, HEADS = 2, 2
TOLERANCE = 0.5
"""Relative error of a row. NF4 has about a tenth; two rows that have nothing to do with each other have 1.4."""
CHUNK_TOKENS = 32


class Lie(Exception):
    """A value that is not what it should be."""


@lru_cache(maxsize=1)
def words() -> Any:
    """The table of the exact form."""
    return np.random.default_rng(1).integers(0, 1 << 63, LARGEST_NBYTES // 8, dtype=np.int64)


@lru_cache(maxsize=1)
def floats() -> Any:
    """The table of the other forms, twice in a row: a slice may begin anywhere."""
    once = np.random.default_rng(2).standard_normal(FLOATS, dtype=np.float32)
    return np.concatenate([once, once])


def _number(tenant: str, key: bytes, version: int) -> int:
    digest = hashlib.blake2b(b"%s|%s|%d" % (tenant.encode(), key, version), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def exact(tenant: str, key: bytes, version: int, nbytes: int) -> dict[str, Any]:
    """A value of about so many bytes, kept bit for bit."""
    x = words()[: max(nbytes // 8, 1)] ^ np.int64(_number(tenant, key, version))
    return {"about": _about(tenant, key, version, "exact", x), "x": x}


def lossy(tenant: str, key: bytes, version: int, nbytes: int) -> dict[str, Any]:
    """Keys and values of about so many bytes together, which the store may encode."""
    tokens = max(nbytes // (8 * LAYERS * HEADS * ROW), 1)
    k, v = _floats_of(tenant, key, version, tokens)
    return {"about": _about(tenant, key, version, "float", k), "k": k, "v": v}


def _floats_of(tenant: str, key: bytes, version: int, tokens: int) -> tuple[Any, Any]:
    shape = (LAYERS, tokens, HEADS, ROW)
    n = int(np.prod(shape))
    at = _number(tenant, key, version) % FLOATS
    return tuple(floats()[start : start + n].reshape(shape) for start in (at, (at + FLOATS // 2) % FLOATS))  # type: ignore[return-value]


def _about(tenant: str, key: bytes, version: int, form: str, x: Any) -> Any:
    said = {"tenant": tenant, "key": key.decode(), "version": version, "form": form, "shape": list(x.shape),
            "xxh3": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(x).view(np.uint8).reshape(-1))}  # fmt: skip
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def version_of(tensors: Mapping[str, Any], tenant: str, key: bytes, *, loss: bool) -> int:
    """The version of a value that was found under a key. loss: the store says it went through a lossy codec.

    Raises Lie if a single byte is another's.
    """
    try:
        said = json.loads(np.asarray(tensors["about"]).tobytes())
        version, form, shape = int(said["version"]), said["form"], tuple(said["shape"])
    except (KeyError, ValueError, TypeError) as error:
        raise Lie(f"it does not say what it is: {error!r}") from None
    if said["tenant"] != tenant or said["key"] != key.decode():
        raise Lie(f"it is {said['key']} of tenant {said['tenant']}, version {version}")
    if form == "exact":
        _check_exact(np.asarray(tensors["x"]), shape, _number(tenant, key, version), said["xxh3"])
    else:
        expected = _floats_of(tenant, key, version, shape[1])
        for name, whole in zip("kv", expected, strict=True):
            check_floats(name, np.asarray(tensors[name]), whole, loss=loss)
    return version


def _check_exact(x: Any, shape: tuple[int, ...], number: int, xxh3: str) -> None:
    if x.shape != shape or x.dtype != np.int64:
        raise Lie(f"it has {x.shape} of {x.dtype}, and should have {shape}")
    others = np.flatnonzero((words()[: x.size] ^ x) != np.int64(number))
    if others.size:
        raise Lie(f"{others.size} of {x.size} words are another's, the first at {others[0]}, the last at {others[-1]}")
    if xxhash.xxh3_64_hexdigest(np.ascontiguousarray(x).view(np.uint8)) != xxh3:
        raise Lie("its checksum is another's")


def check_floats(name: str, x: Any, expected: Any, *, loss: bool) -> None:
    """Raise Lie unless each row of 64 numbers is the expected one, within the tolerance where there may be a loss."""
    if x.shape != expected.shape or x.dtype != np.float32:
        raise Lie(f"{name} has {x.shape} of {x.dtype}, and should have {expected.shape}")
    if not loss:
        if not np.array_equal(x, expected):
            raise Lie(f"{name} is said to have no loss, and {np.count_nonzero(x != expected)} numbers are others")
        return
    errors = np.linalg.norm(x - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    worst = float(np.nan_to_num(errors, nan=np.inf).max())
    if worst > TOLERANCE:
        raise Lie(f"{name} has a row with a relative error of {worst:.2f}; at most {TOLERANCE} is a codec's")


def tokens_of(worker: int, n: int, generation: int) -> list[int]:
    """The prompt of a generation of a family of prefixes: another from its first token on."""
    rng = np.random.default_rng([worker, n, generation])
    count = 1 + int(rng.integers(4 * CHUNK_TOKENS))
    # The first three tokens name it, so no two prompts share a chunk.
    return [worker, n, generation, *map(int, rng.integers(0, 50_000, count))]


def kv_of(tenant: str, tokens: Sequence[int]) -> tuple[Any, Any]:
    """(k, v) of a prompt: each row follows from tenant, token, place, layer and head."""
    places = np.arange(len(tokens))
    base = np.asarray(tokens, np.int64) * 7919 + places * 104_729 + _number(tenant, b"prefix", 0) % 65_537
    planes = (np.arange(LAYERS)[:, None, None] * HEADS + np.arange(HEADS)) * 131
    both = []
    for which in range(2):
        starts = (base[None, :, None] + 524_287 * which + planes) % FLOATS
        both.append(floats()[starts[..., None] + np.arange(ROW)])
    return both[0], both[1]
