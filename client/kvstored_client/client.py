"""Client: the verbs of `kvstore.Store`, spoken to a daemon.

    with Client() as cache:
        cache.put(b"key", {"k": k, "v": v})
        hit = cache.get(b"key")          # None on a miss

On the data path a daemon that is down, draining or busy means a miss (False, 0): the caller prefills as if there were
no cache. `on_error="raise"` raises instead. The caller's own mistakes always raise, and so do the operator's verbs
(entries, inspect, evict, ping, stats, ...), for which nothing can stand in. After `close` every verb raises
TierUnavailable. Thread-safe; a forked child connects anew.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import lru_cache
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from kvstore import arrays
from kvstore.hit import Copied, EntryInfo, Explanation, Fidelity, Held, Hit, Match, Priority, TensorInfo, Verified
from kvstore.keys import CHUNK_TOKENS, IdentityFields, check_key, check_keys, check_prefix, identity_of
from kvstore.lookup import Lookup, check_saved
from kvstore.options import PutOptions
from kvstore.prefix import Namespace
from kvstore.stats import Setting, Stats
from kvstored_client.buffers import Out
from kvstored_client.decoding import DECODES, SHM_FROM_NBYTES, Decode, accepted
from kvstored_client.doors import SOFT, Doors, OnError
from kvstored_client.leasing import NOTHING_LEASED, Leases, OneLease, leading_hits
from kvstored_client.puts import Outgoing, put_options
from kvstored_client.shm import calls
from kvstored_client.shm.pool import UseStream
from kvstored_client.stream.receiver import Receiver
from kvstored_client.stream.transport import ADMIN, CACHE
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import (
    GetOptions,
    lookup_message,
    read_changes,
    read_entry_info,
    read_explanation,
    read_held,
    read_settings,
    read_stats,
    tier_number,
)

TIMEOUT_S = 5.0

_how_to_get = lru_cache(maxsize=64)(GetOptions)


class Client(Doors):
    """A cache behind a daemon.

    address: "unix:PATH" or "tcp:HOST:PORT"; by default $KVSTORED_ADDRESS, else the runtime directory's socket.
    timeout_s: how long a call may be silent; calls that move bytes get more time in proportion.
    framework: what `get` returns, "torch", "numpy", or "auto": torch where the process has imported it.
    shared_memory: pass tensors through memory shared with the daemon where both are on one host.
    decode: who decodes what the daemon holds encoded: "client", so that an eighth of the bytes travels (with torch), or
    "daemon"; "auto": the client where torch is imported and the compiled kernel is installed. The bits are the same.
    failures: calls that ended in trouble and were answered as a miss, or raised.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        framework: arrays.Framework = "auto",
        on_error: OnError = "miss",
        shared_memory: bool = True,
        decode: Decode = "auto",
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be over 0, got {timeout_s!r}")
        if on_error not in ("miss", "raise"):
            raise ValueError(f"on_error is miss or raise, got {on_error!r}")
        if decode not in DECODES:
            raise ValueError(f"decode is one of {', '.join(DECODES)}, got {decode!r}")
        arrays.resolve_framework(framework)
        self._decode = decode
        self._framework = framework
        self._resolved_for: tuple[bool | None, tuple[str, tuple[str, ...]]] = (None, ("", ()))
        super().__init__(address, timeout_s, on_error, shared_memory=shared_memory)

    def put(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        key: bytes,
        tensors: Mapping[str, Any],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        priority: Priority = "normal",
        parent: bytes | None = None,
        namespace: str = "",
    ) -> bool:
        """Keep a copy of named tensors under a key, replacing what was there. True: stored.

        ttl_s: seconds to live, by default the store's; sliding: a get moves the deadline. pin: keep from eviction and
        expiry. fidelity: "exact" for bit-for-bit in every tier. priority: "low" leaves before others unless it is hit.
        parent: the key of the chunk that this one continues; it will not outlive it. namespace: the name under which
        it is counted and limited; with a parent it is the parent's.
        Raises InvalidEntry, EntryTooLarge.
        """
        options = put_options(ttl_s, sliding, pin, fidelity, priority, namespace)
        before = None if parent is None else check_key(parent)
        batch = [Outgoing(check_key(key), tensors, options, before)]
        return bool(self._data(self._send, 0, batch))

    def put_many(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        entries: Sequence[tuple[bytes, Mapping[str, Any]]],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        priority: Priority = "normal",
        chain: bool = False,
        parent: bytes | None = None,
        namespace: str = "",
    ) -> int:
        """Put entries, root first, in one call. Returns how many were stored.

        chain: each entry continues the one before it, the first one `parent` (None: it is a root); a chunk never
        outlives the one it continues. namespace: as for `put`. Of two entries under one key the later one is kept.
        """
        pairs = list(entries)
        keys = check_keys(key for key, _ in pairs)
        options = put_options(ttl_s, sliding, pin, fidelity, priority, namespace)
        before_first = check_key(parent) if chain and parent is not None else None
        held = dict(zip(keys, (tensors for _, tensors in pairs), strict=True))
        parents = [before_first, *held][:-1] if chain else [None] * len(held)
        batch = [
            Outgoing(key, tensors, options, before, root=chain)
            for (key, tensors), before in zip(held.items(), parents, strict=True)
        ]
        stored = self._data(self._send, 0, batch) if batch else 0
        return len(keys) if stored == len(batch) else stored

    def get(self, key: bytes, *, out: Mapping[str, Any] | None = None) -> Hit | None:
        """The value under a key; None on a miss.

        out: tensors to fill, by name, of the entry's dtypes and shapes (else InvalidEntry); they are in the hit.
        After a miss their contents are undefined.
        """
        return self._receive([check_key(key)], leading=False, out=None if out is None else [out])[0]

    def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> list[Hit | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss.

        Keys are touched deepest first. lookup: how it counts among the daemon's lookups, by default each key as one.
        """
        checked = check_keys(keys)
        return leading_hits(self._receive(checked, leading=leading, lookup=lookup), leading=leading)

    def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> Match:
        """How many leading keys of a chain are held, and where. Does not count as use.

        lookup: how it counts among the daemon's lookups, by default each key as one; a get of the same keys within a
        minute belongs to it.
        """
        held = self._match(check_keys(keys), every=False, lookup=lookup)
        return Match(tuple(at for at in held if at is not None))

    def locate(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held; None where it is not. Does not count as use, nor as a lookup unless that is said."""
        checked = check_keys(keys)
        return self._match(checked, every=True, lookup=lookup) or [None] * len(checked)

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first; move deadlines that slide, to ttl_s from now. Returns how many are held."""
        request = pb.TouchRequest(keys=check_keys(keys), ttl_s=PutOptions(ttl_s).ttl_s or 0.0)
        return self._data(lambda: self._at_most(len(keys), self._ask("Touch", request, pb.TouchReply).touched), 0)

    def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys in all tiers, for good: no restart or power cut brings them back. Returns how many were held.

        Chunks that continue a key go with it, uncounted; with `keep_shared` a key that others continue stays instead.
        """
        request = pb.DeleteRequest(keys=check_keys(keys), keep_shared=keep_shared)
        return self._data(lambda: self._at_most(len(keys), self._ask("Delete", request, pb.DeleteReply).deleted), 0)

    def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys, and the chunks before them, from eviction and expiry until `unpin`, or for `ttl_s` seconds.

        Returns how many are held.
        """
        return self._pin(keys, pinned=True, ttl_s=ttl_s)

    def unpin(self, *keys: bytes) -> int:
        """Let keys be evicted and expire again; the deadline starts anew. Returns how many are held."""
        return self._pin(keys, pinned=False)

    def lease(self, key: bytes) -> AbstractContextManager[Hit | None]:
        """The value without a copy, read-only, for the length of a block; None on a miss.

        On the daemon's host the tensors lie in its memory: writing to one ends this process (numpy arrays refuse it),
        and one that is still referred to after the block raises LeaseKept. A block that takes longer than
        `server.lease_max_s`, and whose memory was used again, ends with RecordCorrupt. From afar it is a copy.
        """
        return OneLease(self._lease, [check_key(key)], leading=False)

    def lease_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None
    ) -> AbstractContextManager[Sequence[Hit | None]]:
        """Like `get_many` without copies: see `lease`. Hits are made when they are looked at."""
        return Leases(self._lease, check_keys(keys), leading=leading, lookup=lookup)

    def empty(self, shape: Sequence[int], dtype: str = "float32") -> Any:
        """A tensor to fill and put, not cleared. On the daemon's host it lies in memory shared with it.

        So filling it is the only copy on this side. Dropped without a put it is freed.
        """
        self._check_open()
        spec = TensorInfo(dtype, tuple(shape))
        framework = arrays.resolve_framework(self._framework)
        arrays.check_specs({"x": spec})
        try:
            return self._through_shared_memory(calls.empty, spec, framework)
        except (UseStream, *SOFT):
            return arrays.from_bytes(spec, np.empty(arrays.check_specs({"x": spec}), dtype=np.uint8), framework)

    def evict(self, *keys: bytes) -> int:
        """Forget keys, counted as evictions. Returns how many were held. Raises if the daemon cannot answer."""
        request = pb.EvictRequest(keys=check_keys(keys))
        return self._operate("Evict", request, pb.EvictReply).evicted

    def demote(self, *keys: bytes) -> int:
        """Move keys one tier down. Returns how many moved. Raises if the daemon cannot answer."""
        request = pb.DemoteRequest(keys=check_keys(keys))
        return self._operate("Demote", request, pb.MoveReply).moved

    def promote(self, *keys: bytes) -> int:
        """Copy keys to hot. Returns how many were copied. Raises if the daemon cannot answer."""
        request = pb.PromoteRequest(keys=check_keys(keys))
        return self._operate("Promote", request, pb.MoveReply).moved

    def drain(self) -> int:
        """Have everything that is only in memory written to cold. Returns entries written. Raises if it cannot."""
        return int(self._operate("Drain", pb.DrainRequest(), pb.DrainReply).written)

    def verify(self) -> Iterator[Verified]:
        """Have every record on disk read and checked; how far it is, a few times a second. Damaged ones are dropped.

        The last one is the result. Raises if the daemon cannot answer.
        """
        with closing(self._transport.stream_in(ADMIN + "Verify", pb.VerifyRequest())) as messages:
            for message in messages:
                reply = self._understood(pb.VerifyReply.FromString, message)
                yield Verified(reply.checked, reply.total, reply.nbytes, reply.corrupt)

    def snapshot(self, path: str) -> Iterator[Copied]:
        """Have all entries copied to a directory of the daemon's host, while it serves; how far it is, in steps.

        path: absolute, as the daemon sees it; not there yet, or empty. It is written by the daemon's user, with mode
        0700, and whole when the last step was taken; if the iterator is closed before, nothing is left. A daemon takes
        it as its `server.data_dir`. Raises ConfigError for a path that cannot be used or has no room, and if the daemon
        cannot answer.
        """
        with closing(self._transport.stream_in(ADMIN + "Snapshot", pb.SnapshotRequest(directory=path))) as messages:
            for message in messages:
                reply = self._understood(pb.SnapshotReply.FromString, message)
                yield Copied(reply.done, reply.total, reply.copied, reply.nbytes, reply.lost)

    def check_shared(self) -> list[str]:
        """What is wrong with the store that the daemon shares with other hosts, a sentence each; empty: nothing.

        Raises ConfigError where it shares none, and if the daemon cannot answer.
        """
        return list(self._operate("CheckShared", pb.CheckSharedRequest(), pb.CheckSharedReply).complaints)

    def flush_shared(self, namespace: str | None = None) -> None:
        """Put what the shared store has of a namespace, or everything, out of reach: all hosts miss it within 2 s.

        Raises ConfigError where nothing is shared, and if the daemon or the shared store does not answer.
        """
        self._operate("FlushShared", pb.FlushSharedRequest(namespace=namespace), pb.FlushSharedReply)

    def report(self, *, prefill_saved_s: float) -> None:
        """Tell the daemon's metrics how much prefill time was saved since the last report, in seconds."""
        request = pb.ReportRequest(prefill_saved_s=check_saved(prefill_saved_s))
        self._data(lambda: self._transport.unary(CACHE + "Report", request, pb.ReportReply), None)

    def inspect(self, key: bytes) -> EntryInfo | None:
        """What is known of an entry. Does not count as use. Raises if the daemon cannot answer."""
        request = pb.InspectRequest(key=check_key(key))
        reply = self._operate("Inspect", request, pb.InspectReply)
        return self._understood(read_entry_info, reply.entry) if reply.HasField("entry") else None

    def explain(self, *keys: bytes, tenant: str = "") -> list[Explanation]:
        """For each key where it is held, or why it is gone. Raises if the daemon cannot answer.

        tenant: the keys are as this tenant names them.
        """
        request = pb.ExplainRequest(keys=check_keys(keys), tenant=tenant)
        reply = self._operate("Explain", request, pb.ExplainReply)
        return [self._understood(read_explanation, message) for message in reply.explanations]

    def entries(
        self,
        *,
        tier: str | None = None,
        key_prefix: bytes = b"",
        tenant: str = "",
        namespace: str = "",
        limit: int | None = None,
    ) -> Iterator[EntryInfo]:
        """Entries in order of key. Filters narrow each other. Raises if the daemon cannot answer.

        namespace: the name they were put under, its versions (NAME@...) included.
        """
        if limit is not None and limit <= 0:
            return
        request = pb.ListRequest(
            tier=tier_number(tier),
            key_prefix=check_prefix(key_prefix),
            limit=limit or 0,
            tenant=tenant,
            namespace=namespace,
        )
        with closing(self._transport.stream_in(ADMIN + "List", request)) as messages:
            for message in messages:
                for entry in self._understood(pb.ListReply.FromString, message).entries:
                    yield self._understood(read_entry_info, entry)

    def ping(self) -> bool:
        """Whether the daemon serves; False while it stops. Needs no right. Raises TierUnavailable without an answer."""
        return self._transport.health()

    def stats(self) -> Stats:
        """Counters since start and gauges of now. Raises if the daemon cannot answer."""
        reply = self._operate("Stats", pb.StatsRequest(), pb.StatsReply)
        return self._understood(read_stats, self._noted(reply))

    def settings(self) -> list[Setting]:
        """The daemon's settings in force, each with its origin. Raises if the daemon cannot answer."""
        reply = self._operate("Settings", pb.SettingsRequest(), pb.SettingsReply)
        return self._understood(read_settings, reply)

    def configure(self, settings: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
        """Change settings that need no restart: by name, each value as text. What changed: the values before and now.

        Raises InvalidEntry, and nothing has changed, for one that is unknown, wrong or needs a restart; and if the
        daemon cannot answer.
        """
        reply = self._operate("Configure", pb.ConfigureRequest(settings=settings), pb.ConfigureReply)
        return self._understood(read_changes, reply)

    def namespace(self, *, chunk_tokens: int = CHUNK_TOKENS, **identity: Unpack[IdentityFields]) -> Namespace:
        """The prefixes of one model: `identity` is the fields of `keys.Identity`, all that have no default."""
        return Namespace(self, identity_of(identity), chunk_tokens)

    def close(self) -> None:
        """End the connection. Closing twice is harmless. Tensors of `empty` stay readable.

        Later calls raise TierUnavailable; those that are under way in other threads end as if the daemon had stopped.
        """
        if self._pool is not None:
            self._pool.close()
        self._transport.close()

    def __repr__(self) -> str:
        at = self._transport
        state = "closed" if at.closed else "not asked for a while after failures" if at.breaker.is_open else "open"
        memory = "shared memory" if self._pool is not None else "no shared memory"
        return (
            f"Client({self.address!r}, {state}, timeout_s={at.timeout_s:g}, on_error={self._on_error!r}, {memory}, "
            f"failures={self.failures})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, batch: list[Outgoing]) -> int:
        try:
            stored, epoch, commits = self._through_shared_memory(calls.put, batch)
        except UseStream:
            return self._send_stream(batch)
        if commits > 1:
            self.touch([entry.key for entry in batch])  # as one batch: the root ends most recently used
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        return self._at_most(len(batch), stored)

    def _send_stream(self, batch: list[Outgoing]) -> int:
        reply = self._noted(self._understood(pb.PutReply.FromString, self._transport.put(batch)))
        return self._at_most(len(batch), int(reply.stored))

    def _receive(
        self, keys: Sequence[bytes], *, leading: bool, out: Out = None, lookup: Lookup | None = None
    ) -> list[Hit | None]:
        """Hits by position. out: for each key tensors to fill, or None."""
        hits: list[Hit | None] = [None] * len(keys)
        if keys:
            if lookup is None and leading and len(keys) > calls.KEYS_PER_PACKET:
                lookup = Lookup(len(keys))  # what lies behind the first miss is in no packet
            self._data(self._read, None, hits, keys, leading=leading, out=out, lookup=lookup)
        return hits

    def _read(
        self, hits: list[Hit | None], keys: Sequence[bytes], *, leading: bool, out: Out, lookup: Lookup | None
    ) -> None:
        framework, accept = self._resolved()
        from_nbytes = SHM_FROM_NBYTES if accept and self._decode == "auto" and self._pool else 0
        how = _how_to_get(leading, accept, from_nbytes, lookup)
        try:
            hits[:], stale, epoch = self._through_shared_memory(calls.get, keys, how, framework, out)
        except UseStream:
            Receiver(keys, framework, out, hits).read_from(self._transport, how.request(keys))
            return
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        if stale:
            self.failures += stale

    def _resolved(self) -> tuple[str, tuple[str, ...]]:
        """The framework of what is returned, and the encodings to ask for: both change when torch is imported."""
        torch_there = "torch" in sys.modules
        known, resolved = self._resolved_for
        if known is not torch_there:
            resolved = arrays.resolve_framework(self._framework), accepted(self._decode)
            self._resolved_for = torch_there, resolved
        return resolved

    def _lease(
        self, keys: Sequence[bytes], *, leading: bool, lookup: Lookup | None
    ) -> AbstractContextManager[Sequence[Hit | None]]:
        return self._data(self._leased, NOTHING_LEASED, keys, leading=leading, lookup=lookup)

    def _leased(
        self, keys: Sequence[bytes], *, leading: bool, lookup: Lookup | None
    ) -> AbstractContextManager[Sequence[Hit | None]]:
        framework, accept = self._resolved()
        try:
            return self._through_shared_memory(calls.lease, keys, _how_to_get(leading, (), 0, lookup), framework)
        except UseStream:
            receiver = Receiver(keys, framework)
            receiver.read_from(self._transport, _how_to_get(leading, accept, 0, lookup).request(keys))
            return nullcontext(leading_hits(receiver.hits, leading=leading))

    def _match(self, keys: Sequence[bytes], *, every: bool, lookup: Lookup | None) -> list[Held | None]:
        request = pb.MatchRequest(keys=keys, every=every, lookup=lookup_message(lookup))
        return self._data(self._held, [], request)

    def _held(self, request: pb.MatchRequest) -> list[Held | None]:
        reply = self._ask("Match", request, pb.MatchReply)
        self._at_most(len(request.keys), len(reply.held))
        return [read_held(held) for held in reply.held]

    def _pin(self, keys: tuple[bytes, ...], *, pinned: bool, ttl_s: float | None = None) -> int:
        request = pb.PinRequest(keys=check_keys(keys), pinned=pinned, ttl_s=PutOptions(ttl_s).ttl_s or 0.0)
        return self._data(lambda: self._at_most(len(keys), self._ask("Pin", request, pb.PinReply).changed), 0)
