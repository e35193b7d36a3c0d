"""Names from outside: policies and codecs that a program registers, or that an installed package offers.

A package offers them as entry points (groups `kvstored.policies` and `kvstored.codecs`); they are looked for once, when
a name is met that is not built in, and loaded when they are used. What is registered under a name stays: a second thing
under it is an error. Thread-safe. Imports the standard library only: what a policy or a codec must be able to do is
checked where those are known (`policies.register_policy`, `codecs.register_codec`).
"""

import re
import threading
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from kvstore.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}")

T = TypeVar("T")


class Registry(Generic[T]):
    """The names of one kind of thing. built_in: names that nobody else may take."""

    def __init__(self, kind: str, group: str, built_in: Collection[str], name_max: int = 64) -> None:
        self.kind = kind
        self._group = group
        self._built_in = frozenset(built_in)
        self._name_max = name_max
        self._lock = threading.Lock()
        self._things: dict[str, T] = {}
        self._offered: dict[str, list[EntryPoint]] | None = None

    def add(self, name: str, thing: T) -> None:
        """Register a thing under a name; the same one twice changes nothing. Raises ConfigError."""
        if not self.allows(name):
            raise ConfigError(
                f"the name of a {self.kind} is 1 to {self._name_max} letters, digits and any of -_.:, got {name!r:.80}"
            )
        with self._lock:
            if name in self._built_in:
                raise ConfigError(f"{name!r} is a {self.kind} of kvstored itself: register yours under another name")
            if self._things.setdefault(name, thing) is not thing:
                raise ConfigError(f"a {self.kind} named {name!r} is registered already: {self._things[name]!r:.120}")

    def allows(self, name: str) -> bool:
        """Whether anything may have this name."""
        return _NAME.fullmatch(name) is not None and len(name) <= self._name_max

    def knows(self, name: object) -> bool:
        """Whether `find` would return something, or fail in loading it."""
        return isinstance(name, str) and (name in self._things or name in self._entry_points())

    def names(self) -> list[str]:
        """Every name from outside."""
        return sorted({*self._things, *self._entry_points()})

    def find(self, name: str, register: Callable[[str, object], object]) -> T | None:
        """What a name stands for; None: nobody offers it. register: checks what was loaded and adds it.

        Raises ConfigError where two packages offer the name, or where loading it fails.
        """
        found = self._things.get(name)
        if found is not None:
            return found
        offers = self._entry_points().get(name, [])
        if len({offer.value for offer in offers}) > 1:
            raise ConfigError(f"{len(offers)} packages offer a {self.kind} {name!r}: {', '.join(map(_told, offers))}")
        if not offers:
            return None
        try:
            loaded = offers[0].load()
        except Exception as error:
            raise ConfigError(
                f"the {self.kind} {name!r} of {_told(offers[0])} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        register(name, loaded)
        return self._things.get(name)

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        if self._offered is None:
            offered: dict[str, list[EntryPoint]] = {}
            for point in entry_points(group=self._group):
                if point.name not in self._built_in:
                    offered.setdefault(point.name, []).append(point)
            self._offered = offered
        return self._offered


def _told(point: EntryPoint) -> str:
    return f"{point.dist.name if point.dist is not None else '?'} ({point.value})"


def imported(reference: str, kind: str) -> object:
    """What "module:Name" names. Raises ConfigError."""
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f'a {kind} from outside is named as "module:Name", got {reference!r:.120}')
    try:
        found: object = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigError(f"the {kind} {reference!r} cannot be imported: {type(error).__name__}: {error}") from error
    return found


OWN_POLICIES = ("lru", "arc", "s3fifo")
OWN_CODECS = ("auto", "nf4-kv2", "nf4-kv", "nf4", "int8", "raw", "kv-learned", "layers", "by-layer", "adaptive")
"""Encodings that records name, and words that settings and codecs use for several."""
POLICIES: Registry[Callable[[], object]] = Registry("policy", "kvstored.policies", OWN_POLICIES)
CODECS: Registry[object] = Registry("codec", "kvstored.codecs", OWN_CODECS, name_max=32)
"""A record's metadata has 32 characters for an encoding's name."""
