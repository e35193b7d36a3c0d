"""The prefix layer: token ids in, the longest cached K and V out.

A `Namespace` cuts K and V into chunks, derives their keys from an identity and speaks to any cache with the common
verbs (an embedded `Store` or a client), so prefixes mean the same thing on both. It holds the identity, and the chunks
that lookups lately missed, which are only to save a question.
Invariant: a chunk is only put when its parents are held or put in the same call, so a chain has no holes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

from kvstore import arrays
from kvstore.dtypes import TensorSpec
from kvstore.errors import InvalidEntry, RecordCorrupt
from kvstore.hit import Fidelity, Held, Hit, Match, Priority
from kvstore.keys import (
    CHUNK_TOKENS,
    NAMESPACE_MAX_NBYTES,
    Identity,
    chunk_keys,
    tail_keys,
)
from kvstore.lookup import ELSEWHERE, Lookup, Misses
from kvstore.packed import PackedTensor
from kvstore.pieces import awaited, now

TOKEN_AXIS = 1
"""k and v are (layers, tokens, kv_heads, head_dim)."""
BREATH_CHUNKS = 16
"""Chunks looked at between two turns of an event loop: some 0.2 ms."""


class Cache(Protocol):
    """The verbs that the prefix layer needs of a cache."""

    def put_many(
        self,
        entries: Sequence[tuple[bytes, Mapping[str, Any]]],
        *,
        ttl_s: float | None = None,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        priority: Priority = "normal",
        chain: bool = False,
        parent: bytes | None = None,
        namespace: str = "",
    ) -> int:
        """Put entries, root first; `chain`: each continues the one before it. Returns how many were stored.

        namespace: what they are counted under.
        """
        ...

    def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> list[Hit | None]:
        """Get entries; `leading`: a chain, root first, up to the first miss. lookup: how it is counted."""
        ...

    def lease_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> AbstractContextManager[Iterable[Hit | None]]:
        """`get_many` without copies, inside a `with` block; RecordCorrupt at its end if the lease ended before."""
        ...

    def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> Match:
        """Leading keys held."""
        ...

    def locate(self, keys: Sequence[bytes]) -> list[Held | None]:
        """Where each key is held; None for a key that is not."""
        ...

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first. Returns how many are held."""
        ...

    def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys; `keep_shared`: only keys that no chunk continues, in the order given."""
        ...

    def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys until unpinned, or for `ttl_s` seconds. Returns how many are held."""
        ...

    def unpin(self, *keys: bytes) -> int:
        """Unpin keys."""
        ...


def namespace_name(model: str, digest: bytes) -> str:
    """The name that an operator sees and sets quotas by: the model, "@", four bytes of the identity's digest."""
    shown = "".join(c for c in model if c.isprintable()).encode()[-(NAMESPACE_MAX_NBYTES - 9) :]
    return f"{shown.decode(errors='ignore')}@{digest[:4].hex()}"


def _cut(x: Any, start: int, stop: int) -> Any:
    """Some of the tokens of a k or v: a view."""
    return x[:, start:stop]


class _Joined:
    """Collects the chunks of a prefix, and copies them one behind the other. A context, in which it knows them."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, Any]] = []

    async def take(self, cache: Any, whole: Iterable[tuple[Hit, int]]) -> int:
        """The next chunks. Returns how many they were."""
        before = len(self._parts)
        for hit, _ in whole:
            self._parts.append(hit.tensors)
            if not len(self._parts) % BREATH_CHUNKS:
                await cache.breathe()
        return len(self._parts) - before

    async def result(self, cache: Any) -> tuple[int, Any, Any]:
        """(tokens, k, v), copied by the cache while its leases last."""
        if not self._parts:
            return 0, None, None
        k, v = await cache.work(self._joined)
        return int(k.shape[TOKEN_AXIS]), k, v

    def _joined(self) -> list[Any]:
        pairs = [(tensors["k"], tensors["v"]) for tensors in self._parts]
        return [arrays.joined(list(parts), TOKEN_AXIS) for parts in zip(*pairs, strict=True)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        """Forget the chunks."""
        self._parts.clear()


class _Filled:
    """Copies the chunks of a prefix to where they belong: one copy, right out of the cache's memory. A context, too."""

    def __init__(self, k: Any, v: Any) -> None:
        self._k, self._v, self._tokens = k, v, 0
        self._pairs: list[tuple[Any, Any]] = []

    async def take(self, cache: Any, whole: Iterable[tuple[Hit, int]]) -> int:
        """The next chunks. Returns how many they were."""
        taken = 0
        for hit, tokens in whole:
            for name, x in (("k", self._k), ("v", self._v)):
                at = _cut(x, self._tokens, self._tokens + tokens)
                self._pairs.append((at, hit.tensors[name]))
            self._tokens += tokens
            taken += 1
            if not taken % BREATH_CHUNKS:
                await cache.breathe()
        return taken

    async def result(self, cache: Any) -> tuple[int, Any, Any]:
        """(tokens, k, v), copied by the cache while its leases last: all chunks at once."""
        n = self._tokens
        if not n:
            return 0, None, None
        await cache.fill(self._pairs)
        return n, _cut(self._k, 0, n), _cut(self._v, 0, n)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        """Forget the chunks."""
        self._pairs.clear()


class _Tail(NamedTuple):
    """A partial chunk that is held."""

    key: bytes
    tokens: int


class Prefixes:
    """A `Namespace` over a cache whose verbs are awaited (see `pieces`)."""

    def __init__(self, cache: Any, identity: Identity, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """cache: takes any number of keys (`pieces`): a prompt may have more chunks than a call has keys."""
        self._cache = cache
        self.identity = identity
        self.chunk_tokens = chunk_tokens
        self.digest = identity.digest()
        self.name = namespace_name(identity.model, self.digest)
        self._misses = Misses()
        chunk_keys(self.digest, [], chunk_tokens)  # refuses a bad chunk length now, not at the first put

    def __repr__(self) -> str:
        own = self.identity
        shape = f"{own.dtype} ({own.layers} layers, tokens, {own.kv_heads} kv_heads, {own.head_dim})"
        return f"Namespace({self.name!r}, {shape}, {self.chunk_tokens} tokens a chunk, in {self._cache!r})"

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """The chain of keys of these tokens, root first; the last one may be of a partial chunk."""
        return chunk_keys(self.digest, token_ids, self.chunk_tokens)

    async def put_prefix(
        self,
        token_ids: Sequence[int],
        k: Any,
        v: Any,
        *,
        ttl_s: float | None = None,
        pin: bool = False,
        no_store: bool = False,
        priority: Priority = "normal",
    ) -> int:
        """Put the K and V of a prefix, cut into chunks; chunks already held are touched, not sent.

        k, v: (layers, tokens, kv_heads, head_dim), tokens == len(token_ids). Returns the chunks sent and stored. After
        a lookup of this namespace that missed them, chunks are sent at once, else it is asked first which are held.
        no_store: no prompt will continue this one; held chunks are touched, none is added. priority: "low" is evicted
        before others unless it is hit. pin: pin the whole prefix. Raises InvalidEntry if shapes or dtype are not the
        identity's.
        """
        self._check(k, v, len(token_ids))
        keys = self.keys(token_ids)
        how = {"ttl_s": ttl_s, "pin": pin, "priority": priority}
        missed = None if no_store else self._misses.take(keys)
        # To pin what is held, or to move its deadlines to ttl_s, is a call of its own: then asking costs nothing more.
        if missed == 0 or (missed is not None and not pin and ttl_s is None):
            stored = await self._send(keys, missed, k, v, how)
            if stored or not missed:
                return stored
            # Refused: what was held before it has left since. Nothing of it would ever be found.
        # All of them or none, as a rule: then this one question was all. A count between says not which.
        held: int = await self._cache.touch(keys, ttl_s=ttl_s) if keys else 0
        if 0 < held < len(keys):
            # Not `match`, which may count what only other hosts have: the rest would continue what is not held here.
            places = await self._cache.locate(keys)
            held = places.index(None) if None in places else len(keys)
        if held and pin:
            await self._cache.pin(*keys[:held])
        if held == len(keys) or no_store:
            return 0
        return await self._send(keys, held, k, v, how)

    async def _send(self, keys: list[bytes], held: int, k: Any, v: Any, how: dict[str, Any]) -> int:
        """Put the chunks behind the first `held`. Returns how many were stored; of a parent that is not held, none."""
        tokens, entries = int(k.shape[TOKEN_AXIS]), []
        for i in range(held, len(keys)):
            start, stop = i * self.chunk_tokens, min(tokens, (i + 1) * self.chunk_tokens)
            entries.append((keys[i], {name: _cut(x, start, stop) for name, x in (("k", k), ("v", v))}))
        fidelity: Fidelity = "exact" if self.identity.fidelity == "exact" else "auto"
        parent = keys[held - 1] if held else None
        stored: int = await self._cache.put_many(
            entries, chain=True, parent=parent, fidelity=fidelity, namespace=self.name, **how
        )
        return stored

    async def get_prefix(self, token_ids: Sequence[int], *, out: tuple[Any, Any] | None = None) -> tuple[int, Any, Any]:
        """The longest cached prefix: (n, k, v), with k and v of n tokens; (0, None, None) on a miss.

        out: k and v to copy into, (layers, at least len(token_ids), kv_heads, head_dim); what is returned are their
        first n tokens, and what lies behind is undefined. Raises InvalidEntry if they are not of that shape and type.
        Counts as use of every chunk of it, deepest first, and refreshes their deadlines.
        """
        if out is not None:
            self._check_out(out, len(token_ids))
        keys = self.keys(token_ids)
        full = keys[: len(token_ids) // self.chunk_tokens]
        whole, how = self._lookup(token_ids, keys), await self._how_to_lease(out)
        tails = self._tails(token_ids, keys, len(full)) if full and getattr(self._cache, "answers_tails", False) else []
        first = {**how, "tails": tails} if tails else how
        taken = _Joined() if out is None else _Filled(*out)
        try:
            with ExitStack() as leases, taken:  # no view may outlive the leases
                hits = await self._cache.lease_into(leases, full, leading=True, lookup=whole, **first) if full else ()
                held = await taken.take(self._cache, self._whole(hits))
                known = getattr(hits, "first_tail", None) if held == len(full) else None
                del hits
                tail = await self._tail(token_ids, keys, held, known=None if known is None else (tails, known))
                if tail is not None:
                    at = self._tail_lookup(tail, whole, asked=not full)
                    last = await self._cache.lease_into(leases, [tail.key], leading=True, lookup=at, **how)
                    await taken.take(self._cache, self._whole(last))
                    del last
                elif keys and not full:  # a prompt of less than a chunk: nobody has counted it yet
                    await self._cache.get_many(keys, leading=True, lookup=whole)
                return await taken.result(self._cache)
        except RecordCorrupt:  # the lease ended before the copy: what was copied may be another chunk's
            return 0, None, None

    async def _how_to_lease(self, out: tuple[Any, Any] | None) -> dict[str, Any]:
        """Into tensors on a GPU chunks go as they are held, and are decoded there."""
        if out is None:
            return {}
        found: dict[str, Any] = await self._cache.how_to_lease([dict(zip(("k", "v"), out, strict=True))])
        return found

    def _whole(self, hits: Iterable[Hit | None]) -> Iterator[tuple[Hit, int]]:
        """Hits with their tokens, up to the first that is missing or is not this namespace's."""
        for hit in hits:
            tokens = self._tokens_of(hit) if hit is not None else None
            if hit is None or tokens is None:
                return
            yield hit, tokens

    def _check_out(self, out: tuple[Any, Any], tokens: int) -> None:
        self._check(*out, tokens, longer=True)

    async def get_prefix_hits(self, token_ids: Sequence[int]) -> tuple[int, list[Hit]]:
        """Like `get_prefix`, as the hits of its chunks, root first: for tier, encoding and age of each."""
        keys = await self._longest(token_ids, counted=True)
        hits = await self._cache.get_many(keys, leading=True, lookup=ELSEWHERE) if keys else []
        whole = list(self._whole(hits))
        return sum(tokens for _, tokens in whole), [hit for hit, _ in whole]

    async def fill_prefix(self, token_ids: Sequence[int], k: Any, v: Any) -> int:
        """`get_prefix` into k and v that first asks how much is held: a lookup may have a shorter deadline than a copy.

        k, v: as its `out`; strided ones of torch, too. Returns the tokens filled; what lies behind is undefined.
        """
        self._check_out((k, v), len(token_ids))
        keys = await self._longest(token_ids, counted=True)
        how, taken = await self._how_to_lease((k, v)), _Filled(k, v)
        try:
            with ExitStack() as leases, taken:  # as in `get_prefix`
                hits = await self._cache.lease_into(leases, keys, leading=True, lookup=ELSEWHERE, **how) if keys else ()
                await taken.take(self._cache, self._whole(hits))
                del hits
                return (await taken.result(self._cache))[0]
        except RecordCorrupt:
            return 0

    async def match_prefix(self, token_ids: Sequence[int]) -> Match:
        """Where the chunks of the longest cached prefix are held. Does not count as use."""
        keys = await self._longest(token_ids, counted=True)
        match: Match = await self._cache.match(keys, lookup=ELSEWHERE)
        return match

    async def pin_prefix(self, token_ids: Sequence[int], *, ttl_s: float | None = None) -> int:
        """Keep the longest cached prefix from eviction and expiry, for `ttl_s` seconds or until unpinned.

        Returns the chunks pinned. Raises OverQuota over the tier's share for pins, with nothing newly pinned.
        """
        keys = await self._longest(token_ids)
        return await self._cache.pin(*keys, ttl_s=ttl_s) if keys else 0

    async def unpin_prefix(self, token_ids: Sequence[int]) -> int:
        """Unpin a prefix; chunks of another pinned prefix stay pinned. Returns the chunks unpinned."""
        keys = await self._longest(token_ids)
        return await self._cache.unpin(*keys) if keys else 0

    async def forget(self, token_ids: Sequence[int]) -> int:
        """Forget this prefix, partial tails of it included. Returns how many chunks were forgotten.

        Chunks that another prompt continues stay: forgetting one conversation leaves the system prompt to the others.
        """
        keys = self.keys(token_ids)
        doomed: list[bytes] = []
        for i, parent in enumerate([self.digest, *keys]):
            rest = token_ids[i * self.chunk_tokens :][: self.chunk_tokens]
            if len(rest):
                doomed += tail_keys(parent, rest)
        chunks = set(keys)
        tails = [key for key in doomed if key not in chunks]
        held = [key for key, at in zip(tails, await self._cache.locate(tails), strict=True) if at is not None]
        gone: int = await self._cache.delete(*held, keep_shared=True) if held else 0
        return gone + int(await self._cache.delete(*reversed(keys), keep_shared=True))

    async def _longest(self, token_ids: Sequence[int], *, counted: bool = False) -> list[bytes]:
        """Keys of the longest chain held: whole chunks, then the longest partial one that was put.

        counted: as a lookup.
        """
        keys = self.keys(token_ids)
        # By tokens a chunk: the last one may have fewer, which its own question below sets right.
        full = len(token_ids) // self.chunk_tokens
        whole = self._lookup(token_ids, keys) if counted else ELSEWHERE
        held: Match = await self._cache.match(keys[:full], lookup=whole) if full else Match(())
        # What only another host has cannot be continued here.
        tail = await self._tail(token_ids, keys, held, here=not held or held.held[-1].tier != "shared")
        if tail is None:
            if counted and keys and not full:
                await self._cache.match(keys, lookup=whole)
            return keys[:held]
        if counted:
            await self._cache.match([tail.key], lookup=self._tail_lookup(tail, whole, asked=not full))
        return [*keys[:held], tail.key]

    def _lookup(self, token_ids: Sequence[int], keys: Sequence[bytes]) -> Lookup:
        return Lookup(len(keys), len(token_ids), self.chunk_tokens)

    def _tail_lookup(self, tail: "_Tail", whole: Lookup, *, asked: bool) -> Lookup:
        """How the question for a partial chunk counts. asked: it is the first of its lookup."""
        return (whole if asked else whole.continued())._replace(key_tokens=tail.tokens)

    async def _tail(
        self,
        token_ids: Sequence[int],
        keys: list[bytes],
        held: int,
        *,
        here: bool = True,
        known: tuple[list[bytes], int] | None = None,
    ) -> "_Tail | None":
        """The longest partial chunk that is held behind the first `held` chunks; None: there is none.

        here: those are on this host. known: the `_tails` there, and which of them is the first held (their number: none
        is), where the cache has said that already.
        """
        if held == len(keys):
            return None
        if known is None:
            asked = self._tails(token_ids, keys, held)
            places = await self._cache.locate(asked)
            known = asked, next((i for i, place in enumerate(places) if place), len(asked))
        tails, first = known
        if here and first:  # the longest is the next chunk of the chain
            self._misses.note(keys[held])
        return _Tail(tails[first], len(tails) - first) if first < len(tails) else None

    def _tails(self, token_ids: Sequence[int], keys: Sequence[bytes], held: int) -> list[bytes]:
        """A key for each length of a partial chunk behind the first `held` chunks, the longest first.

        A longer prompt continues inside the chunk where a shorter one ended.
        """
        rest = token_ids[held * self.chunk_tokens :][: self.chunk_tokens]
        return tail_keys(keys[held - 1] if held else self.digest, rest) if len(rest) else []

    def _tokens_of(self, hit: Hit) -> int | None:
        # Under a 256-bit key only this namespace's tensors can be found; a caller may still have put others there.
        tensors = hit.tensors
        specs = getattr(tensors, "specs", None)  # of what is leased they are known, and no view is made for them
        try:
            if specs is not None:
                k, v = specs["k"], specs["v"]
            else:
                k, v = (
                    x.spec if isinstance(x, PackedTensor) else arrays.describe("", x) for x in map(tensors.get, "kv")
                )
            tokens = int(k.shape[TOKEN_AXIS])
        except (KeyError, IndexError, InvalidEntry):
            return None
        own = self.identity
        due = TensorSpec(own.dtype, (own.layers, tokens, own.kv_heads, own.head_dim))
        return tokens if k == v == due else None

    def _check(self, k: Any, v: Any, tokens: int, *, longer: bool = False) -> None:
        """Raise InvalidEntry unless they are this namespace's, of so many tokens; `longer`: or of more."""
        own = self.identity
        for name, info in arrays.describe_all({"k": k, "v": v}):
            there = info.shape[TOKEN_AXIS] if len(info.shape) > TOKEN_AXIS else 0
            due = (own.layers, max(there, tokens) if longer else tokens, own.kv_heads, own.head_dim)
            if info.shape != due or info.dtype != own.dtype:
                raise InvalidEntry(
                    f"{name}: this namespace holds {own.dtype} (layers, tokens, kv_heads, head_dim) = {due}, "
                    f"got {info.dtype} {info.shape}"
                )


class Namespace:
    """Prefixes of one model (one `Identity`) in a cache. name: what its chunks are counted under."""

    def __init__(self, cache: Cache, identity: Identity, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.awaited = Prefixes(awaited(cache), identity, chunk_tokens)
        self.identity = identity
        self.chunk_tokens = chunk_tokens
        self.digest = self.awaited.digest
        self.name = self.awaited.name

    def __repr__(self) -> str:
        return repr(self.awaited)

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """The chain of keys of these tokens, root first; the last one may be of a partial chunk."""
        return self.awaited.keys(token_ids)

    put_prefix = now(Prefixes.put_prefix)
    get_prefix = now(Prefixes.get_prefix)
    get_prefix_hits = now(Prefixes.get_prefix_hits)
    fill_prefix = now(Prefixes.fill_prefix)
    match_prefix = now(Prefixes.match_prefix)
    pin_prefix = now(Prefixes.pin_prefix)
    unpin_prefix = now(Prefixes.unpin_prefix)
    forget = now(Prefixes.forget)
