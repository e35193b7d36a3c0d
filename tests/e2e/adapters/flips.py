"""Changes one field after the other of an engine's own configuration objects, and asks for the digest each time."""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvstored_client.integrations import configured

Path = tuple[tuple[Any, str], ...]


def other(x: Any) -> Any:  # noqa: PLR0911 - one line for each kind of value
    """Another value of the same kind."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, enum.Enum):
        return next((each for each in type(x) if each is not x), "another")
    if isinstance(x, int | float):
        return x + 1 if x + 1 != x else 0  # infinity
    if isinstance(x, str):
        return x + " another"
    if isinstance(x, torch.dtype):
        return torch.float8_e5m2 if x != torch.float8_e5m2 else torch.float8_e4m3fn
    if isinstance(x, Mapping):
        return {**x, "another": 1}
    if isinstance(x, list | tuple | set | frozenset):
        return [*x, "another"]
    return "another"


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A field set to another value, whatever its class forbids."""
    if isinstance(owner, dict):
        before, owner[name] = owner[name], value
        yield
        owner[name] = before
        return
    before = _now(owner, name)
    object.__setattr__(owner, name, value)
    yield
    object.__setattr__(owner, name, before)


def fields(x: Any, harmless: Mapping[str, str]) -> Iterator[tuple[Any, str]]:
    """Every field of a configuration and of the ones in it, as (owner, name); into what is harmless it does not go."""
    for name, value in (configured.state(x) or {}).items():
        yield x, name
        named = harmless_name(x, name, harmless)
        if not named and (dataclasses.is_dataclass(value) or type(value).__module__.startswith("transformers")):
            yield from fields(value, harmless)


def harmless_name(owner: Any, name: str, harmless: Mapping[str, str]) -> str:
    """Under which name a field is on the list; "" where it is not."""
    return next((each for each in (f"{type(owner).__name__}.{name}", f"*.{name}") if each in harmless), "")


def check(whole: Any, harmless: Mapping[str, str], digest: Callable[[], bytes]) -> int:
    """Assert that each field makes another digest, or is on the list and makes none. Returns how many were changed.

    There are hundreds of fields and a digest of the whole is not that quick. So each field is changed in the form of
    the object that holds it, and of each object one field in the whole, whose form holds those of its objects.
    """
    before = digest()
    assert digest() == before
    held: dict[int, tuple[Any, dict[str, None]]] = {}
    for owner, name in fields(whole, harmless):
        held.setdefault(id(owner), (owner, {}))[1][name] = None
    for owner, names in held.values():
        _check_one(owner, list(names), harmless)
        name = next((each for each in names if not harmless_name(owner, each, harmless)), "")
        if name:
            with changed(owner, name, other(_now(owner, name))):
                assert digest() != before, f"{type(owner).__name__}.{name} is not in the digest of the whole"
    assert digest() == before
    if hasattr(whole, "__dict__"):
        object.__setattr__(whole, "invented_by_a_later_version", 1)
        assert digest() != before
        object.__delattr__(whole, "invented_by_a_later_version")
    return sum(len(names) for _, names in held.values())


def _check_one(owner: Any, names: list[str], harmless: Mapping[str, str]) -> None:
    """Each field of one object, the others left out of its form: what lies in those has a turn of its own."""
    kind = type(owner).__name__
    for name in names:
        asked = {**{f"{kind}.{each}": "not now" for each in names if each != name}, **harmless}
        before = configured.canonical(owner, asked)
        with changed(owner, name, other(_now(owner, name))):
            same = configured.canonical(owner, asked) == before
        expected = bool(harmless_name(owner, name, harmless))
        assert same == expected, f"{kind}.{name} is {'' if expected else 'not '}on the list"


def _now(owner: Any, name: str) -> Any:
    return (configured.state(owner) or {})[name]


def of_defaults(kind: Any, **values: Any) -> Any:
    """An engine's dataclass with its defaults, made without its checks, which ask for a model or a device."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        x = None
        if field.default is not dataclasses.MISSING:
            x = getattr(field.default, "default", field.default)
        elif field.default_factory is not dataclasses.MISSING:
            x = field.default_factory()
        object.__setattr__(made, field.name, x)
    for name, x in values.items():
        object.__setattr__(made, name, x)
    return made


def on_the_list_and_gone(harmless: Mapping[str, str], kinds: Mapping[str, Any]) -> list[str]:
    """Names on the list that no class of these has: a list grows old in silence."""
    gone = []
    for name in harmless:
        kind, _, field = name.partition(".")
        if kind in kinds and field not in {each.name for each in dataclasses.fields(kinds[kind])}:
            gone.append(name)
    return gone
