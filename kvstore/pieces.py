"""A cache as the prefix layer calls it: with any number of keys, and awaited, whoever waits.

One text serves callers that block and an event loop: a verb over several calls is a coroutine that awaits each of them.
Over a cache that blocks, `Ready` answers every await at once, and `now` makes the verb an ordinary function; over an
asyncio client its own coroutines are awaited.
A long chain is no mistake: `in_pieces` wraps any cache with the common verbs. A call of at most 4096 keys is passed on
unchanged. A longer one is cut, with the meaning of the whole: a leading match ends with the first piece that is not
held in full, counts are summed, a chain is put root first and its pieces are linked, and a touch goes deepest first, so
that the root is the most recently used. Each verb says what is no longer atomic. Holds no state. As thread-safe as the
cache.
"""

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from itertools import chain as joined
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from kvstore import arrays
from kvstore.hit import Held, Hit, Match
from kvstore.keys import KEYS_PER_CALL_MAX
from kvstore.lookup import Lookup

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")


def given(lookup: Lookup | None) -> dict[str, Lookup]:
    """The keyword argument for a verb; none where nothing is said, so that any cache with the common verbs will do."""
    return {} if lookup is None else {"lookup": lookup}


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
        self.answers_tails = getattr(cache, "answers_tails", False)
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


def in_pieces(cache: Any) -> "Pieces":
    """The cache with calls of any length; the cache itself if it has them already."""
    return cache if getattr(cache, "cuts_calls", False) is True else Pieces(cache)


def awaited(cache: Any) -> Any:
    """The verbs of a cache that blocks, with calls of any length, to be awaited."""
    pieces: Any = in_pieces(cache)
    return pieces.awaited if isinstance(pieces, Pieces) else Ready(pieces)


def cut(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Pieces of at most 4096 items, in order; the items themselves if one piece is enough."""
    if len(items) <= KEYS_PER_CALL_MAX:
        return [items]
    return [items[start : start + KEYS_PER_CALL_MAX] for start in range(0, len(items), KEYS_PER_CALL_MAX)]


class AwaitedPieces:
    """A cache whose verbs take any number of keys, to be awaited. All other attributes are the cache's."""

    cuts_calls = True

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __repr__(self) -> str:
        return repr(self._cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    async def put_many(self, entries: Sequence[tuple[bytes, Mapping[str, Any]]], /, **how: Any) -> int:
        """Put entries, root first. A chain stops after a piece that was not stored in full."""
        pieces = cut(entries)
        if len(pieces) == 1:
            return int(await self._cache.put_many(entries, **how))
        stored = 0
        for piece in pieces:
            got = int(await self._cache.put_many(piece, **how))
            stored += got
            if how.get("chain"):
                if got < len(piece):
                    break
                how["parent"] = piece[-1][0]
        await self._touch_before_the_last(pieces)
        return stored

    async def _touch_before_the_last(self, pieces: list[Sequence[Any]]) -> None:
        # Otherwise the last piece would be the most recently used, and would outlive its root.
        for piece in reversed(pieces[:-1]):
            await self._cache.touch([key for key, _ in piece])

    async def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> list[Hit | None]:
        """Values in the order of keys; leading: up to the first miss."""
        pieces = cut(keys)
        if len(pieces) == 1:
            return list(await self._cache.get_many(keys, leading=leading, **given(lookup)))
        counts = _Counts(lookup, len(keys))
        if not leading:
            # Deepest first, as in one call.
            parts = [list(await self._cache.get_many(piece, lookup=counts.next())) for piece in reversed(pieces)]
            return list(joined(*reversed(parts)))
        found: list[Hit | None] = []
        for i, piece in enumerate(pieces):
            got = list(await self._cache.get_many(piece, leading=True, lookup=counts.next()))
            found += got
            if len(got) < len(piece) or None in got:
                pieces = pieces[: i + 1]
                break
        for piece in reversed(pieces[:-1]):
            await self._cache.touch(piece)
        return found

    async def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> Match:
        """Leading keys held."""
        pieces = cut(keys)
        if len(pieces) == 1:
            return await self._cache.match(keys, **given(lookup))  # type: ignore[no-any-return]
        held: tuple[Held, ...] = ()
        counts = _Counts(lookup, len(keys))
        for piece in pieces:
            got = await self._cache.match(piece, lookup=counts.next())
            held += tuple(got.held)
            if int(got) < len(piece):
                break
        return Match(held)

    async def locate(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held."""
        found: list[Held | None] = []
        for piece in cut(keys):
            found += await self._cache.locate(piece, **given(lookup))
            lookup = None if lookup is None else lookup.continued()
        return found

    async def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first."""
        return sum([int(await self._cache.touch(piece, ttl_s=ttl_s)) for piece in reversed(cut(keys))])

    async def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys, in the order given."""
        return sum([int(await self._cache.delete(*piece, keep_shared=keep_shared)) for piece in cut(keys)])

    async def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys. A chain is pinned as a whole or not at all; of other keys the deepest pieces stay pinned."""
        # A pin holds all chunks before it, so pinning the deepest piece first pins the whole chain, or fails.
        return sum([int(await self._cache.pin(*piece, ttl_s=ttl_s)) for piece in reversed(cut(keys))])

    async def unpin(self, *keys: bytes) -> int:
        """Unpin keys, the deepest first."""
        return sum([int(await self._cache.unpin(*piece)) for piece in reversed(cut(keys))])

    async def how_to_lease(self, out: Any) -> dict[str, Any]:
        """As the cache says."""
        found: dict[str, Any] = await self._cache.how_to_lease(out)
        return found

    async def lease_into(
        self,
        leases: ExitStack,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        lookup: Lookup | None = None,
        **how: Any,
    ) -> Iterable[Hit | None]:
        """The hits of `lease_many`, leased until `leases` are closed."""
        pieces = cut(keys)
        if len(pieces) == 1:
            return await self._cache.lease_into(leases, keys, leading=leading, **given(lookup), **how)  # type: ignore[no-any-return]
        counts, found = _Counts(lookup, len(keys)), list[Sequence[Hit | None]]()
        for piece in pieces:
            hits = await self._cache.lease_into(leases, piece, leading=leading, lookup=counts.next(), **how)
            found.append(hits)
            if leading and len(hits) < len(piece):
                break
        if leading:
            for piece in reversed(pieces[: len(found) - 1]):
                await self._cache.touch(piece)
        return joined(*found)


class _ReadyPieces(AwaitedPieces):
    """Over a cache that blocks. leased: its `lease_many` of any number of keys."""

    def __init__(self, cache: Any, leased: Callable[..., AbstractContextManager[Iterable[Hit | None]]]) -> None:
        super().__init__(Ready(cache))
        self._leased = leased

    async def lease_into(self, leases: ExitStack, keys: Sequence[bytes], **how: Any) -> Iterable[Hit | None]:
        """The hits of `lease_many`, leased until `leases` are closed."""
        return leases.enter_context(self._leased(keys, **how))


class Pieces:
    """The same for callers that block. All other attributes are the cache's."""

    cuts_calls = True

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.awaited = _ReadyPieces(cache, self.lease_many)

    def __repr__(self) -> str:
        return repr(self._cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    put_many = now(AwaitedPieces.put_many)
    get_many = now(AwaitedPieces.get_many)
    match = now(AwaitedPieces.match)
    locate = now(AwaitedPieces.locate)
    touch = now(AwaitedPieces.touch)
    delete = now(AwaitedPieces.delete)
    pin = now(AwaitedPieces.pin)
    unpin = now(AwaitedPieces.unpin)

    def lease_many(
        self,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        lookup: Lookup | None = None,
        **how: Any,
    ) -> AbstractContextManager[Iterable[Hit | None]]:
        """`get_many` without copies; the lease of a piece begins when its first hit is read."""
        if len(keys) <= KEYS_PER_CALL_MAX:
            return self._cache.lease_many(keys, leading=leading, **given(lookup), **how)  # type: ignore[no-any-return]
        return self._leased(cut(keys), _Counts(lookup, len(keys)), leading=leading, **how)

    @contextmanager
    def _leased(
        self, pieces: list[Sequence[bytes]], counts: "_Counts", *, leading: bool, **how: Any
    ) -> Iterator[Iterable[Hit | None]]:
        with ExitStack() as leases:
            begun: list[Sequence[bytes]] = []
            yield self._hits(pieces, leases, begun, counts, leading=leading, **how)
        if leading:
            for piece in reversed(begun[:-1]):
                self._cache.touch(piece)

    def _hits(
        self, pieces: list[Sequence[bytes]], leases: ExitStack, begun: list[Sequence[bytes]], counts: "_Counts",
        *, leading: bool, **how: Any,
    ) -> Iterator[Hit | None]:  # fmt: skip
        for piece in pieces:
            lease = self._cache.lease_many(piece, leading=leading, lookup=counts.next(), **how)
            hits = iter(leases.enter_context(lease))
            begun.append(piece)
            left = len(piece)
            while left:
                try:
                    yield next(hits)  # without a variable: a view that this generator held would outlive its lease
                except StopIteration:
                    break
                left -= 1
            if leading and left:
                return


class _Counts:
    """What each piece of a call counts as: the first one says what all of them ask for."""

    def __init__(self, lookup: Lookup | None, keys: int) -> None:
        self._next = Lookup(keys) if lookup is None else lookup

    def next(self) -> Lookup:
        """For the next piece."""
        now = self._next
        self._next = now.continued()
        return now
