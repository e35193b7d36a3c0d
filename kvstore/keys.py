"""Keys: what may be one, and how a prefix of tokens becomes a chain of them.

The one place where an identity is turned into bytes, for the embedded store and the client alike: a
second derivation would one day disagree, and a wrong identity returns another model's tensors.
Imports the standard library only.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NewType, Required, Self, TypedDict, get_args

from kvstore.dtypes import BY_NAME, DTypeName
from kvstore.errors import InvalidEntry
from kvstore.hit import FIDELITIES, Fidelity

Key = NewType("Key", bytes)
"""What a key is below the verbs: bytes that `check_key` has seen."""

KEY_MAX_NBYTES = 256
"""LMDB keys end at 511 bytes; half of that leaves room for what a later version may put before them."""
KEYS_PER_CALL_MAX = 4096
_LENGTHS = frozenset(range(1, KEY_MAX_NBYTES + 1))
NAMESPACE_MAX_NBYTES = 96
CHUNK_TOKENS = 256
CHUNK_TOKENS_MAX = 512
"""Above 512 tokens a chunk loses 3 to 13 points of hit ratio on chat traffic (Mooncake trace)."""
Layout = Literal["lthd"]
"""How a namespace's k and v are arranged: (layers, tokens, kv_heads, head_dim), K and V apart."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_DTYPE_WORDS = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
"""Other words for dtypes: each would be another key, and a miss for ever."""
IDENTITY_VERSION = 1
"""Raised when what a chunk holds changes meaning: old chunks are then never found again."""


def check_key(key: object) -> Key:
    """The key as bytes. Raises InvalidEntry unless it is 1 to 256 bytes."""
    if type(key) is bytes and 1 <= len(key) <= KEY_MAX_NBYTES:
        return Key(key)  # nearly every key, a thousand in a match: not a copy, not a second look
    if not isinstance(key, bytes | bytearray | memoryview):
        raise InvalidEntry(f"a key is bytes, got {type(key).__name__}")
    try:
        nbytes = key.nbytes if isinstance(key, memoryview) else len(key)
        # The copy is measured, too: the caller may change a bytearray meanwhile, and a subclass may lie about itself.
        own = _copied(key) if nbytes <= KEY_MAX_NBYTES else b""
    except ValueError as error:  # a memoryview that was released
        raise InvalidEntry(f"a key is bytes: {error}") from None
    if not 1 <= len(own) <= KEY_MAX_NBYTES:
        raise InvalidEntry(f"a key has 1 to {KEY_MAX_NBYTES} bytes, got {max(nbytes, len(own))}")
    return Key(own)


def _copied(key: bytes | bytearray | memoryview) -> bytes:
    # Not bytes(key) for a subclass of bytes: that calls its __bytes__, which may be another key.
    return bytes.__getitem__(key, slice(None)) if isinstance(key, bytes) else bytes(key)


class CheckedKeys(tuple[Key, ...]):
    """The keys of one call, checked: a door makes it once, and whoever is given one does not look again.

    CheckedKeys(keys): raises InvalidEntry for a bad key, for more than 4096, or for what is no sequence. Use what is
    made, never `keys` again: it may be a generator, or hold a bytearray, which no index takes.
    """

    __slots__ = ()

    def __new__(cls, keys: Iterable[object] = ()) -> Self:
        """The keys as bytes; those that are checked already as they are."""
        if type(keys) is cls:
            return keys
        if isinstance(keys, bytes | bytearray | memoryview | str):
            raise InvalidEntry("expected a sequence of keys, got one key: put it in a list")
        if not isinstance(keys, Iterable):
            raise InvalidEntry(f"expected a sequence of keys, got {type(keys).__name__}")
        checked: list[Key] = list(keys)  # type: ignore[arg-type]  # looked at in the next line
        if set(map(type, checked)) != {bytes} or not _LENGTHS.issuperset(map(len, checked)):
            checked = [check_key(key) for key in checked]
        if len(checked) > KEYS_PER_CALL_MAX:
            raise InvalidEntry(f"a call names at most {KEYS_PER_CALL_MAX} keys, got {len(checked)}")
        return super().__new__(cls, checked)

    def part(self, start: int, stop: int | None = None) -> "CheckedKeys":
        """self[start:stop], which need not be checked again."""
        return tuple.__new__(CheckedKeys, self[start:stop])

    def after(self, prefix: bytes) -> "CheckedKeys":
        """Each key behind a prefix. The caller knows that the longest one has room for it."""
        return tuple.__new__(CheckedKeys, [prefix + key for key in self])


check_keys = CheckedKeys
"""For those who think of it as a check."""


def named(keys: Sequence[bytes | CheckedKeys]) -> CheckedKeys:
    """The keys of a verb that takes them one by one: `delete(b"a", b"b")`, or one `CheckedKeys` from a door."""
    only = keys[0] if len(keys) == 1 else None
    return only if isinstance(only, CheckedKeys) else CheckedKeys(keys)


def check_prefix(prefix: object) -> bytes:
    """What keys begin with, as bytes; it may be empty. Raises InvalidEntry where no key could begin so."""
    empty = isinstance(prefix, bytes | bytearray | memoryview) and not len(prefix)
    return b"" if empty else check_key(prefix)


def check_namespace(name: str) -> str:
    """The name of a namespace. Raises InvalidEntry."""
    if type(name) is not str or len(name.encode("utf-8", "replace")) > NAMESPACE_MAX_NBYTES or not name.isprintable():
        raise InvalidEntry(
            f"a namespace's name is at most {NAMESPACE_MAX_NBYTES} bytes of printable text, got {name!r:.120}"
        )
    return name


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that must be equal for cached keys and values to be interchangeable.

    model, revision: which weights. dtype, layers, kv_heads, head_dim: the tensors. layout: how they are arranged. Of
    `namespace` it is one of LAYOUTS ("lthd": (layers, tokens, kv_heads, head_dim), K and V apart); an adapter that
    keeps something else under an identity has a word of its own.
    rope: the RoPE configuration, if it differs from the revision's own. tp/pp rank and size: which shard.
    fidelity: "auto" or "exact"; it is part of the identity, so that a reader who demands exact bytes can never
    be served what another caller let become lossy.
    """

    model: str
    revision: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    layout: str
    rope: Mapping[str, object] | str | None = None
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    fidelity: str = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "revision", "dtype", "layout"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise InvalidEntry(f"identity: {name} must be a non-empty string, got {value!r}")
        if self.dtype not in BY_NAME:
            meant = _DTYPE_WORDS.get(self.dtype.lower(), self.dtype.removeprefix("torch."))
            hint = f"; did you mean {meant!r}?" if meant in BY_NAME else ""
            raise InvalidEntry(f"identity: dtype must be one of {', '.join(BY_NAME)}, got {self.dtype!r:.60}{hint}")
        for name in ("layers", "kv_heads", "head_dim", "tp_size", "pp_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidEntry(f"identity: {name} must be an integer of at least 1, got {value!r}")
        if self.fidelity not in FIDELITIES:
            raise InvalidEntry(f"identity: fidelity must be one of {', '.join(FIDELITIES)}, got {self.fidelity!r}")
        for name, size in (("tp_rank", self.tp_size), ("pp_rank", self.pp_size)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
                raise InvalidEntry(f"identity: {name} must be in 0..{size - 1}, got {value!r}")

    def digest(self, salt: bytes = b"") -> bytes:
        """SHA-256 over the canonical JSON of all fields, the identity version and a tenant's salt: 32 bytes."""
        fields = {"version": IDENTITY_VERSION, "salt": salt.hex(), **asdict(self)}
        try:
            text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidEntry(f"identity: rope must be JSON-able, {error}") from None
        return hashlib.sha256(text.encode()).digest()


class IdentityFields(TypedDict, total=False):
    """The keyword arguments of `namespace`, for type checkers: the fields of `Identity`."""

    model: Required[str]
    revision: Required[str]
    dtype: Required[DTypeName]
    layers: Required[int]
    kv_heads: Required[int]
    head_dim: Required[int]
    layout: Required[Layout]
    rope: Mapping[str, object] | str | None
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    fidelity: Fidelity


def identity_of(fields: "Mapping[str, Any] | IdentityFields") -> Identity:
    """A namespace's Identity from keyword arguments. Raises InvalidEntry, naming the field that is wrong or missing."""
    try:
        found = Identity(**fields)
    except TypeError as error:
        raise InvalidEntry(f"namespace: {str(error).removeprefix('Identity.__init__() ')}") from None
    if found.layout not in LAYOUTS:
        raise InvalidEntry(
            f'namespace: layout must be "lthd", (layers, tokens, kv_heads, head_dim), got {found.layout!r:.60}: '
            "arrange k and v so"
        )
    return found


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian u32. Raises InvalidEntry for an id outside 0..2**32-1."""
    tolist = getattr(token_ids, "tolist", None)
    ids = tolist() if tolist is not None else token_ids
    try:
        words = array("I", ids)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEntry(f"token ids are a flat sequence of integers in 0..2**32-1: {error}") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def tail_keys(parent: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """Keys of every partial chunk that these tokens could begin with, longest first.

    parent: the key of the chunk before (or the root). token_ids: at most one chunk of tokens.
    """
    data = token_bytes(token_ids)
    return [hashlib.sha256(parent + data[:end]).digest() for end in range(len(data), 0, -4)]


def chunk_keys(root: bytes, token_ids: Sequence[int], chunk_tokens: int = CHUNK_TOKENS) -> list[bytes]:
    """The chain of keys of a prefix: SHA-256(parent | tokens as u32), 32 bytes each, root first.

    root: the namespace digest. The last chunk may be partial: its key covers just its own tokens.
    """
    if not 1 <= chunk_tokens <= CHUNK_TOKENS_MAX:
        raise InvalidEntry(f"a chunk has 1 to {CHUNK_TOKENS_MAX} tokens, got {chunk_tokens}")
    data = token_bytes(token_ids)
    step = 4 * chunk_tokens
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(data), step):
        parent = hashlib.sha256(parent + data[start : start + step]).digest()
        keys.append(parent)
    return keys
