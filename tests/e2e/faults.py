"""Caches that misbehave, each in one way, around a good one."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from kvstore.errors import TierUnavailable
from kvstore.hit import Match

FAULTS = ("absent", "slow", "lying", "raising", "wrong type")
SLOW_S = 20.0
"""Far beyond any deadline of a test, so that half of it tells a missed one from a busy machine."""


class Faulty:
    """The verbs of a cache, with one fault. `calls` counts how often it was asked.

    A slow one answers after `slow_s` seconds or once `gate` is set, and releases `answered`, whatever the fault.
    """

    def __init__(self, inner: Any, fault: str, *, slow_s: float = SLOW_S) -> None:
        self._inner = inner
        self._fault = fault
        self._slow_s = slow_s
        self.calls = 0
        self.gate = threading.Event()
        self.answered = threading.Semaphore(0)
        self.before_get: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            try:
                return self._answer(name, lambda: verb(*args, **options), args)
            finally:
                self.answered.release()

        return call

    def _answer(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name in ("get", "get_many", "lease_many"):
            self.before_get()
        if self._fault == "absent":
            raise TierUnavailable("nobody there")
        if self._fault == "raising":
            raise RuntimeError("a bug")
        if self._fault == "slow":
            self.gate.wait(self._slow_s)
        if self._fault == "lying" and name in ("get", "get_many", "lease_many"):
            # It said yes and has it no more: evicted in between.
            call()
            nothing = [None] * len(args[0])
            return {"get": None, "get_many": nothing, "lease_many": nullcontext(nothing)}[name]
        if self._fault == "wrong type" and name in ("get", "get_many", "lease_many", "match"):
            return Match(()) if name == "match" else []
        return call()
