"""A digest over everything an engine configures: the part of an adapter's identity that fails closed.

An adapter gives whole configuration objects. Every field of them is in the digest, at any depth, those of a version
that this module has never seen included; left out is only what the adapter names as harmless, each with its reason.
Objects are read by their state and not by their repr, so the digest is the same in every process and on every host
that configures the same. A value without a stable form (a lambda, a lock, a generator) raises NoStableForm: the
adapter then runs without the store and logs why. It is never left out in silence.
Computed once when an engine starts, not for each request. Imports no engine and no torch. Holds no state.
"""

import ctypes
import dataclasses
import enum
import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any

Harmless = Mapping[str, str]
"""What is left out, with the reason: "Class.field", "*.field" for a field of any class, "mapping.key" for a key of the
mapping that is held by the field `mapping`."""

NODES_MAX = 200_000
"""A configuration has some thousand values: what has more is a model or a cache that hangs on it."""
ARRAY_MAX_NBYTES = 16 << 20
"""Tables of factors and scales are smaller; weights are not read by mistake."""
_NOTHING = object()
_TORCH_WORDS = frozenset({"dtype", "device", "layout", "memory_format", "Size"})
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+|\b0x[0-9a-f]{8,}", re.IGNORECASE)


class NoStableForm(ValueError):
    """A configuration holds a value whose meaning cannot be written down. The message says where it is."""


def digest(kind: str, configuration: Mapping[str, Any], harmless: Harmless | None = None) -> bytes:
    """SHA-256 over whole configuration objects, 32 bytes.

    kind: whose keys these are. configuration: objects by name. harmless: what is left out. Raises NoStableForm.
    """
    found = canonical(configuration, harmless)
    return hashlib.sha256(json.dumps([kind, found], separators=(",", ":")).encode()).digest()


def canonical(value: Any, harmless: Harmless | None = None) -> Any:
    """A value as JSON that is equal for equal values only. Raises NoStableForm."""
    return _Walk(harmless or {}).form(value, "")


def state(value: Any) -> dict[str, Any] | None:
    """An object's fields by name, whatever defines them; None for an object that has none.

    Dataclasses, pydantic models, msgspec structs, plain objects, slots. What a cached property has left behind is no
    field: it is made from the others, and is there only after it was asked for.
    """
    kind = type(value)
    named = [name for each in kind.__mro__ for name in _slots(each)]
    named += getattr(kind, "__struct_fields__", ())
    if dataclasses.is_dataclass(value):
        named += [each.name for each in dataclasses.fields(value)]
    held = _raw(value, "__dict__")
    found = {name: x for name in named if (x := _raw(value, name)) is not _NOTHING}
    if isinstance(held, Mapping):
        found.update({str(name): x for name, x in held.items() if not _is_derived(kind, name)})
    for extra in ("__pydantic_extra__", "__pydantic_private__"):
        more = _raw(value, extra)
        found.update(more if isinstance(more, Mapping) else {})
    return found if found or held is not _NOTHING or named else None


def _raw(value: Any, name: str) -> Any:
    """A field as it is held, past what its class does when it is read (a warning, or an error where layers differ)."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return _NOTHING


def plain_attributes(value: Any, harmless: Harmless | None = None) -> dict[str, Any]:
    """The public attributes of an object that are words, numbers, dtypes or tuples of them, its class's included.

    For a live object beside the configuration, such as a memory pool: its buffers and locks are no configuration, and
    every plain attribute of it may be. Left out is what `harmless` names ("*.field").
    """
    found = {"class": type(value).__qualname__}
    for name in dir(value):
        if name.startswith("_") or f"*.{name}" in (harmless or {}):
            continue
        try:
            x = getattr(value, name)
        except Exception:  # noqa: BLE001, S112 - a property that cannot answer now configures nothing
            continue
        if _is_plain(x):
            found[name] = x
    return found


def c_numbers(params: ctypes.Structure, harmless: Harmless) -> dict[str, Any]:
    """A C structure's fields by name, nested ones and arrays included. A pointer that is set raises NoStableForm.

    harmless: names of fields ("*.field"): a pointer is an address, so one that matters must be represented otherwise.
    """
    found: dict[str, Any] = {}
    for name, *_ in params._fields_:  # some fields are triples
        if f"*.{name}" in harmless:
            continue
        x = getattr(params, name)
        if isinstance(x, ctypes.Structure):
            found[name] = c_numbers(x, harmless)
        elif isinstance(x, ctypes.Array):
            found[name] = bytes(x).hex()
        elif isinstance(x, bool | int | float | bytes | None) and not _is_pointer(params, name):
            found[name] = x
        elif x:
            raise NoStableForm(f"{type(params).__name__}.{name} is a pointer that is set")
    return found


def _is_pointer(params: ctypes.Structure, name: str) -> bool:
    kind = next(each[1] for each in params._fields_ if each[0] == name)
    return kind is ctypes.c_void_p or not issubclass(kind, ctypes._SimpleCData)  # noqa: SLF001 - no public name


def _slots(kind: type) -> list[str]:
    found = kind.__dict__.get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return [name for name in names if not name.startswith("__")]


def _is_derived(kind: type, name: str) -> bool:
    return any(isinstance(each.__dict__.get(name), functools.cached_property) for each in kind.__mro__)


def _is_plain(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | str | enum.Enum) or _is_torch_word(x)


def _is_torch_word(x: Any) -> bool:
    return type(x).__module__ == "torch" and type(x).__name__ in _TORCH_WORDS


def _name_of(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Walk:
    """One walk over a configuration: counts what it meets, and knows the objects it is inside of."""

    def __init__(self, harmless: Harmless) -> None:
        self._harmless = harmless
        self._inside: list[int] = []
        self._nodes = 0

    def form(self, x: Any, at: str) -> Any:
        """The JSON of a value. at: the way to it, for an error."""
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise NoStableForm(f"{at} and what is before it have over {NODES_MAX} values")
        found = _leaf(x, at)
        if found is not None:
            return found[0]
        if id(x) in self._inside:
            return ["again", len(self._inside) - self._inside.index(id(x))]
        self._inside.append(id(x))
        try:
            return self._inner(x, at)
        except RecursionError:
            raise NoStableForm(f"{at[:200]} is nested too deeply") from None
        except NoStableForm:
            raise
        except Exception as error:
            raise NoStableForm(f"{at} cannot be read: {type(error).__name__}: {error}") from error
        finally:
            self._inside.pop()

    def _inner(self, x: Any, at: str) -> Any:
        if isinstance(x, Mapping):
            return self._mapping(x, at)
        if isinstance(x, enum.Enum):
            found = ["enum", _name_of(type(x)), x.name, self.form(x.value, at)]
        elif isinstance(x, AbstractSet):
            found = ["set", sorted((self.form(y, f"{at}{{}}") for y in x), key=json.dumps)]
        elif isinstance(x, functools.partial):
            found = ["partial", self.form([x.func, x.args, x.keywords], at)]
        elif isinstance(x, types.MethodType):
            found = ["method", self.form(x.__self__, at), x.__func__.__qualname__]
        elif isinstance(x, Sequence) and not hasattr(x, "__struct_fields__"):
            found = ["list", [self.form(y, f"{at}[{i}]") for i, y in enumerate(x)]]
        else:
            found = self._object(x, at)
        return found

    def _mapping(self, x: Mapping[Any, Any], at: str) -> Any:
        held_by = at.rpartition(".")[2]
        pairs = []
        for key, y in x.items():
            if f"{held_by}.{key}" not in self._harmless:
                pairs.append([self.form(key, f"{at} key"), self.form(y, f"{at}.{key}" if at else str(key))])
        return ["map", sorted(pairs, key=json.dumps)]

    def _object(self, x: Any, at: str) -> Any:
        kind = type(x)
        fields = state(x)
        if fields is None:
            return ["value", _name_of(kind), _own_words(x, at)]
        kept = {
            name: self.form(y, f"{at}.{name}")
            for name, y in sorted(fields.items())
            if f"{kind.__name__}.{name}" not in self._harmless and f"*.{name}" not in self._harmless
        }
        return ["object", _name_of(kind), kept]


def _leaf(x: Any, at: str) -> tuple[Any] | None:
    """The form of a value with nothing in it, as a tuple of one; None for others."""
    found: Any = None
    if x is None or type(x) in (bool, int, str):
        return (x,)
    if hasattr(x, "dtype") and hasattr(x, "shape") and hasattr(x, "tolist"):
        found = _array(x, at)
    elif isinstance(x, str | int | float) and not isinstance(x, enum.Enum):
        found = [_name_of(type(x)), str.__str__(x) if isinstance(x, str) else repr(+x)]
    elif isinstance(x, bytes | bytearray | memoryview):
        found = ["bytes", bytes(x).hex()]
    elif isinstance(x, PurePath) or _is_torch_word(x):
        found = [type(x).__name__, str(x)]
    elif isinstance(x, type | types.ModuleType):
        found = ["name", _name_of(x) if isinstance(x, type) else x.__name__]
    elif isinstance(x, types.FunctionType | types.BuiltinFunctionType):
        found = ["function", _importable(x, at)]
    return None if found is None else (found,)


def _importable(function: Any, at: str) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if "<" in name:  # <lambda>, <locals>: the name does not say what it does
        raise NoStableForm(f"{at} is {name}, a function without a name that others could import")
    return name


def _array(x: Any, at: str) -> Any:
    """A tensor or an array by its bytes."""
    if getattr(x, "is_meta", False):
        return ["array", str(x.dtype), list(x.shape), "meta"]
    if x.nbytes > ARRAY_MAX_NBYTES:
        raise NoStableForm(f"{at} is an array of {x.nbytes} bytes, at most {ARRAY_MAX_NBYTES} in a configuration")
    text = repr(x.tolist())
    return ["array", str(x.dtype), list(x.shape), hashlib.sha256(text.encode()).hexdigest()]


def _own_words(x: Any, at: str) -> str:
    """The repr of a value without fields (a date, a range, a Decimal), where its type has one that is no address."""
    text = repr(x)
    if _ADDRESS.search(text):  # object's own repr has one, too
        raise NoStableForm(f"{at} is a {type(x).__qualname__}, which has neither fields nor a form of its own")
    return text
