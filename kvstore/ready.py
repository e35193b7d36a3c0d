"""One text for both kinds of caller: verbs written with `await`, run by those who block and by an event loop.

A verb over several calls of a cache (a prefix, a call cut into pieces) is a coroutine that awaits each of them. Over a
cache that blocks, `Ready` answers every await at once, and `now` makes the verb an ordinary function; over an asyncio
client its own coroutines are awaited. Holds no state. As thread-safe as the cache.
"""

from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from kvstore import arrays

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits. Raises what it raises."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a verb over a cache that blocks has waited for an event loop")


def now(verb: Callable[Concatenate[S, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """The same verb for callers that block: a method of an object whose `awaited` has the verb as a coroutine."""
    name = verb.__name__

    @wraps(verb)
    def blocking(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        work: Coroutine[Any, Any, T] = getattr(self.awaited, name)(*args, **kwargs)
        return run_now(work)

    return cast("Callable[Concatenate[Any, P], T]", blocking)


class Ready:
    """A cache that blocks, with verbs to await: each has its answer when it is called."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._fill = getattr(cache, "fill", fill)

    def __repr__(self) -> str:
        return repr(self.cache)

    def __getattr__(self, name: str) -> Any:
        async def ready(*args: Any, **kwargs: Any) -> Any:
            return getattr(self.cache, name)(*args, **kwargs)

        return ready

    async def lease_into(self, leases: ExitStack, keys: Any, **how: Any) -> Iterable[Any]:
        """The hits of `lease_many`, leased until `leases` are closed."""
        return leases.enter_context(self.cache.lease_many(keys, **how))

    async def fill(self, pairs: list[tuple[Any, Any]]) -> None:
        """Copy (target, source) pairs."""
        self._fill(pairs)

    async def how_to_lease(self, out: Any) -> dict[str, Any]:
        """How the cache is best asked for what is to fill these tensors."""
        asked = getattr(self.cache, "how_to_lease", None)
        return {} if asked is None else asked(out)

    async def breathe(self) -> None:
        """Between two chunks: an event loop has its turn here."""

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        """A call that takes a while and asks nobody."""
        return call(*args)


def fill(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Copy each source to its target, of the same shape and type."""
    for target, source in pairs:
        arrays.copy_into(target, source)
