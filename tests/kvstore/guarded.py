"""Notes whatever of a store's state is used by a thread that does not hold the lock it belongs to."""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from kvstore.store import Store
from kvstore.tiers.cold import Cold
from kvstore.tiers.order import Order

ANYBODY = {
    "__init__",
    "admits",  # numbers; `displace` decides, under the lock
    "pinned_beside",
    "owner_of",  # "any thread, without the lock"
    "keys_now",  # one step of the interpreter for each part
    "_keys_as_used",  # copies of keys
    "register_tenant",  # takes the lock itself
    "dropped_from_cold",  # takes the lock itself
    "in_cold",
    "tier",
}

Held = Callable[[], bool]


class Guard:
    """Checks objects and dictionaries of one store against their locks. broken: what was used without, and by whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._held: dict[int, Held] = {}
        self._classes: set[type] = set()
        self.broken: set[str] = set()
        self.on = False

    def check(self, held: Held, what: str) -> None:
        if self.on and not held():
            at = sys._getframe(2)
            while "/tests/" in at.f_code.co_filename and at.f_back is not None:
                at = at.f_back
            where = f"{at.f_code.co_filename.rpartition('/')[2]}:{at.f_lineno} in {threading.current_thread().name}"
            self.broken.add(f"{what} at {where}")

    def methods(self, thing: object, held: Held, *names: str) -> None:
        """Of one object: these, or all but what anybody may call. Setting its attributes too, of a dataclass."""
        self._held[id(thing)] = held
        if type(thing) in self._classes:
            return
        self._classes.add(type(thing))
        own = [kind for kind in type(thing).__mro__[::-1] if kind.__module__.startswith("kvstore.")]
        for name, method in {name: method for kind in own for name, method in vars(kind).items()}.items():
            if isinstance(method, FunctionType) and (name in names if names else name not in ANYBODY):
                self._monkeypatch.setattr(type(thing), name, self._guarded(method, name))

    def attributes(self, thing: object, held: Held) -> None:
        """Setting attributes of one object."""
        self._held[id(thing)] = held
        if type(thing) not in self._classes:
            self._classes.add(type(thing))
            self._monkeypatch.setattr(type(thing), "__setattr__", self._guarded(object.__setattr__, "__setattr__"))

    def _guarded(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def guarded(thing: Any, *args: Any, **kwargs: Any) -> Any:
            held = self._held.get(id(thing))
            if held is not None:
                self.check(held, f"{type(thing).__name__}.{name}{args[:1] if name == '__setattr__' else ''}")
            return method(thing, *args, **kwargs)

        return guarded

    def mapping(self, found: Any, held: Held, name: str, *, reads: bool = True) -> Any:
        """A copy of a dictionary that is checked. reads: not only when it changes."""
        names = [
            "__setitem__",
            "__delitem__",
            "pop",
            "clear",
            "update",
            "__iter__",
            "__getitem__",
            "items",
            "keys",
            "values",
        ]
        if reads:
            names += ["get", "__contains__", "__bool__", "__len__"]
        made: dict[str, Any] = {}
        kind: Any = type(found)
        for of in names:
            method = getattr(kind, of, None) or (lambda thing: len(thing) > 0)

            def guarded(thing: Any, *args: Any, _method: Any = method, _name: str = of, _guard: "Guard" = self) -> Any:
                _guard.check(held, f"{name}.{_name}")
                return _method(thing, *args)

            made[of] = guarded
        checked: Any = type(f"Checked{kind.__name__}", (kind,), made)()
        kind.update(checked, found)
        return checked


def guard_store(guard: Guard, store: Store) -> None:
    """A store just opened, in which nothing is held."""
    r = store._r
    lock: Held = r.lock._is_owned  # type: ignore[attr-defined]
    for thing in (r, r.hot, r.warm, r.chains, r.tombstones, r.flights, r.deadlines, r.tenants):
        guard.methods(thing, lock)
    # Only where it changes or is walked: `meta_of` and `owner_of` look a key up from any thread.
    guard.methods(r.index, lock, "__setitem__", "__delitem__", "__iter__", "__getitem__", "add_new", "clear", "rest")
    for thing in (r.counters, *r.counters.tiers.values()):
        guard.attributes(thing, lock)
    r.transit = guard.mapping(r.transit, lock, "transit")
    _set(r.counters, "misses", guard.mapping(Counter(), lock, "misses"))
    _set(r.counters, "hits_in", guard.mapping(Counter(), lock, "hits_in"))
    if r.balance is not None:
        guard.methods(r.balance, lock)
    for tier in (r.hot, r.warm):
        guard.methods(tier._entries, lock)
        tier.get, tier.get_all = tier._entries.get, tier._entries.get_all
        guard_order(guard, tier.order, lock)
    moving: Held = store._mover._moving.locked
    guard.methods(store._mover, moving, "_place", "_sink", "_demote_one", "_copy_to_cold")
    if isinstance(r.cold, Cold):
        guard_cold(guard, r.cold)


def guard_order(guard: Guard, order: Order, lock: Held) -> None:
    """An order of keys: of use its only lane is told itself."""
    guard.methods(order, lock)
    guard.methods(order._first, lock, "touch")
    order.touch = order._first.touch


def _set(thing: object, name: str, value: Any) -> Any:
    object.__setattr__(thing, name, value)
    return value


def guard_cold(guard: Guard, cold: Cold) -> None:
    """A disk's: its order, what waits for the writer, pins, and what is to be written down."""
    lock: Held = cold._changed._is_owned  # type: ignore[attr-defined]
    guard_order(guard, cold._order, lock)
    guard.methods(cold._records._pending, lock)
    guard.methods(cold._pinned, lock)
    writer = cold._records._writer
    writer.dirty = guard.mapping(writer.dirty, lock, "dirty")
    segments = cold._records._segments
    segments._readable = guard.mapping(segments._readable, segments._opened_lock.locked, "readable")
