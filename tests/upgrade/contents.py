"""What the directories of older versions hold. Imported by the writer, in an older checkout, and by the tests of today.

numpy only, and of it what never changes its numbers: RandomState. Nothing of kvstore.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BEGAN_AT = 1_700_000_000.0
"""When the entries were put, by the writer's clock: years ago, so that what had a minute to live has none left."""
YEAR_S = 365 * 86400.0
TTL_S, TTL_MAX_S, SHORT_S = 50 * YEAR_S, 100 * YEAR_S, 60.0
TENANT, TENANT_PREFIX = "blue", b"blue's 16 bytes."
SEAL_KEY = bytes(range(32)).hex()
"""The text of the key file that "sealed" is sealed with."""

Tensors = dict[str, np.ndarray]


class Written(NamedTuple):
    """An entry. make: its tensors. lossy: it went through a codec. since: the first format whose version can write it.

    codec: of the store that demoted it. options: of the put. parent: the entry that it continues.
    """

    make: Callable[[], Tensors]
    lossy: bool = False
    since: int = 1
    codec: str = "auto"
    options: dict[str, object] = {}  # noqa: RUF012 - read only
    parent: str | None = None


def _normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(dtype)


def _bytes(seed: int, nbytes: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, nbytes).astype(np.uint8)


def kinds() -> Tensors:
    """Several dtypes and shapes, a scalar and an empty one among them."""
    return {
        "f32": _normal(1, 4, 12),
        "f64": _normal(2, 3).astype(np.float64),
        "i64": np.array(-7, np.int64),
        "u8": _bytes(3, 33),
        "bool": np.array([[True, False], [False, True]]),
        "empty": np.empty((0, 3), np.int16),
    }


def compressible() -> Tensors:
    """What zstd makes small: of bytes, of two and of four bytes an element."""
    return {"f32": np.repeat(_normal(4, 64), 256), "f16": np.repeat(_normal(5, 64, dtype="float16"), 256),
            "u8": np.zeros(20_000, np.uint8)}  # fmt: skip


def kv(seed: int) -> Tensors:
    """Keys and values of two layers, 66 tokens, two heads of 32."""
    return {"k": _normal(seed, 2, 66, 2, 32, dtype="float16"), "v": _normal(seed + 1, 2, 66, 2, 32, dtype="float16")}


ENTRIES: dict[str, Written] = {
    "kinds": Written(kinds, options={"fidelity": "exact"}),
    "compressible": Written(compressible, options={"fidelity": "exact"}),
    "blocks of its own": Written(lambda: {"x": _bytes(6, 66_000)}, options={"fidelity": "exact"}),
    "nf4": Written(lambda: {"w": _normal(7, 64, 64)}, lossy=True),
    "nf4-kv": Written(lambda: kv(8), lossy=True, codec="nf4-kv"),
    "int8": Written(lambda: kv(10), lossy=True, codec="int8"),
    "layers": Written(lambda: kv(12), lossy=True, since=2, codec="layers"),
    "does not slide": Written(lambda: {"x": _bytes(14, 9)}, options={"sliding": False}),
    "pinned": Written(lambda: {"x": _bytes(15, 10)}, options={"pin": True, "ttl_s": SHORT_S}),
    "root": Written(lambda: {"x": _bytes(16, 500)}, options={"fidelity": "exact"}),
    "child": Written(lambda: {"x": _bytes(17, 500)}, options={"fidelity": "exact"}, parent="root"),
    "grandchild": Written(lambda: {"x": _bytes(18, 500)}, options={"fidelity": "exact"}, parent="child"),
    "other child": Written(lambda: {"x": _bytes(19, 500)}, options={"fidelity": "exact"}, parent="root"),
    "replaced": Written(lambda: {"x": _bytes(20, 700)}),
    "named": Written(lambda: {"x": _bytes(21, 300)}, since=2, options={"namespace": "model@1"}),
    "sealed": Written(lambda: {"x": _bytes(22, 300)}, since=2, codec="sealed"),
}
BLUE = Written(lambda: {"x": _bytes(23, 200)})
"""A tenant's entry, under `TENANT_PREFIX` + b"kinds": it is no other entry's value."""
ABSENT = ("deleted", "deleted with its parent", "expired")
"""Written to the disk, and gone before the directory was closed or by now."""


def of_format(number: int) -> dict[str, Written]:
    """The entries that a directory of this format holds."""
    return {name: written for name, written in ENTRIES.items() if written.since <= number}
