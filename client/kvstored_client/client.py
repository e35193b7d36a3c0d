"""Client: the verbs of `kvstore.Store`, spoken to a daemon.

    with Client() as cache:
        cache.put(b"key", {"k": k, "v": v})
        hit = cache.get(b"key")          # None on a miss

On the data path a daemon that is down, draining or busy means a miss (False, 0): the caller prefills as if there were
no cache. `on_error="raise"` raises instead. The caller's own mistakes always raise, and so do the operator's verbs
(entries, inspect, evict, ping, stats, ...), for which nothing can stand in. After `close` every verb raises
TierUnavailable. Thread-safe; a forked child connects anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from types import TracebackType
from typing import Any, Self, Unpack

from kvstore import arrays
from kvstore.device import Driver
from kvstore.hit import Copied, EntryInfo, Explanation, Fidelity, Held, Hit, Match, Priority, TensorInfo, Verified
from kvstore.keys import CHUNK_TOKENS, IdentityFields, check_key, check_keys, check_prefix, identity_of
from kvstore.lookup import Lookup, check_saved
from kvstore.options import PutOptions
from kvstore.packed import refuse_both
from kvstore.prefix import Namespace
from kvstore.stats import Setting, Stats
from kvstored_client.asking import Asking, Leases, OneLease, OnError, Wanted, leading_hits
from kvstored_client.decoding import Decode
from kvstored_client.puts import outgoing, put_options
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import (
    lookup_message,
    read_changes,
    read_entry_info,
    read_explanation,
    read_settings,
    read_stats,
    tier_number,
)

TIMEOUT_S = 5.0
_ONE, _ONE_PACKED = Wanted(), Wanted(packed=True)
_first: Callable[[list[Hit | None]], Hit | None] = itemgetter(0)


def _nothing(_reply: object) -> None:
    """What a verb returns that has nothing to say."""


class Client(Asking):
    """A cache behind a daemon.

    address: "unix:PATH" or "tcp:HOST:PORT"; by default $KVSTORED_ADDRESS, else the runtime directory's socket.
    timeout_s: how long a call may be silent; calls that move bytes get more time in proportion.
    framework: what `get` returns, "torch", "numpy", or "auto": torch where the process has imported it.
    shared_memory: pass tensors through memory shared with the daemon where both are on one host.
    decode: who decodes what the daemon holds encoded: "client", so that 27% of the bytes travels (13% of float32), or
    "daemon"; "auto": the client where torch is imported and the compiled kernel is installed. The bits are the same.
    driver: who copies to and from tensors on a GPU, by default CUDA (see `kvstore.device`).
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
        driver: Driver | None = None,
    ) -> None:
        super().__init__(address, timeout_s, framework, on_error, decode, shared_memory=shared_memory, driver=driver)

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
        entry = check_key(key), tensors, None if parent is None else check_key(parent)
        options = put_options(ttl_s, sliding, pin, fidelity, priority, namespace)
        return self._sent(outgoing([entry], options), bool)

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
        batch = outgoing(list(zip(held.keys(), held.values(), parents, strict=True)), options, root=chain)
        return self._sent(batch, lambda stored: len(keys) if stored == len(batch) else stored)

    def get(self, key: bytes, *, out: Mapping[str, Any] | None = None, packed: bool = False) -> Hit | None:
        """The value under a key; None on a miss.

        out: tensors to fill, by name, of the entry's dtypes and shapes (else InvalidEntry); they are in the hit.
        After a miss their contents are undefined. What is held encoded crosses the bus to a GPU as it is held, and is
        decoded there. packed: tensors that are held encoded come as they are held, as `PackedTensor`: to put them
        elsewhere, or to decode them where they are needed; needs no torch. Not with out.
        """
        if packed:
            refuse_both(out, packed=packed)
        return self._received([check_key(key)], _first, out=None if out is None else [out], packed=packed)

    def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None, packed: bool = False
    ) -> list[Hit | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss.

        Keys are touched deepest first. lookup: how it counts among the daemon's lookups, by default each key as one.
        packed: as for `get`.
        """
        read = leading_hits if leading else list[Hit | None]
        return self._received(check_keys(keys), read, leading=leading, lookup=lookup, packed=packed)

    def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> Match:
        """How many leading keys of a chain are held, and where. Does not count as use.

        lookup: how it counts among the daemon's lookups, by default each key as one; a get of the same keys within a
        minute belongs to it.
        """
        checked = check_keys(keys)
        request = pb.MatchRequest(keys=checked, lookup=lookup_message(lookup))

        def matched(reply: pb.MatchReply) -> Match:
            return Match(tuple(at for at in self._places(len(checked), reply) if at is not None))

        return self._asked("Match", request, pb.MatchReply, matched, Match(()))

    def locate(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held; None where it is not. Does not count as use, nor as a lookup unless that is said."""
        checked = check_keys(keys)
        request = pb.MatchRequest(keys=checked, every=True, lookup=lookup_message(lookup))
        return self._asked("Match", request, pb.MatchReply, partial(self._places, len(checked)), [None] * len(checked))

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first; move deadlines that slide, to ttl_s from now. Returns how many are held."""
        return self._touch(check_keys(keys), ttl_s)

    def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys in all tiers, for good: no restart or power cut brings them back. Returns how many were held.

        Chunks that continue a key go with it, uncounted; with `keep_shared` a key that others continue stays instead.
        """
        request = pb.DeleteRequest(keys=check_keys(keys), keep_shared=keep_shared)
        return self._asked("Delete", request, pb.DeleteReply, lambda reply: self._at_most(len(keys), reply.deleted), 0)

    def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys, and the chunks before them, from eviction and expiry until `unpin`, or for `ttl_s` seconds.

        Returns how many are held.
        """
        return self._pin(keys, pinned=True, ttl_s=ttl_s)

    def unpin(self, *keys: bytes) -> int:
        """Let keys be evicted and expire again; the deadline starts anew. Returns how many are held."""
        return self._pin(keys, pinned=False)

    def lease(self, key: bytes, *, packed: bool = False) -> AbstractContextManager[Hit | None]:
        """The value without a copy, read-only, for the length of a block; None on a miss.

        On the daemon's host the tensors lie in its memory: writing to one ends this process (numpy arrays refuse it),
        and one that is still referred to after the block raises LeaseKept. A block that takes longer than
        `server.lease_max_s`, and whose memory was used again, ends with RecordCorrupt. From afar it is a copy.
        packed: as for `get`.
        """
        return OneLease(self._lease, [check_key(key)], _ONE_PACKED if packed else _ONE)

    def lease_many(
        self,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        lookup: Lookup | None = None,
        packed: bool = False,
        device: bytes = b"",
        tails: Sequence[bytes] = (),
    ) -> AbstractContextManager[Sequence[Hit | None]]:
        """Like `get_many` without copies: see `lease`. Hits are made when they are looked at.

        device: a GPU of this process's, by its UUID: what a daemon holds in its memory may come as tensors there, which
        are only to be read, and not after the block. `how_to_lease` says it. tails: at most 512 keys that each continue
        the last one; over shared memory the hits say in `first_tail` which is the first held, if all keys are.
        """
        return Leases(self._lease, check_keys(keys), Wanted(leading, lookup, packed, device, check_keys(tails)))

    def empty(self, shape: Sequence[int], dtype: str = "float32") -> Any:
        """A tensor to fill and put, not cleared. On the daemon's host it lies in memory shared with it.

        So filling it is the only copy on this side. Dropped without a put it is freed.
        """
        self._check_open()
        spec = TensorInfo(dtype, tuple(shape))
        framework = arrays.resolve_framework(self._framework)
        arrays.check_specs({"x": spec})
        return self._emptied(spec, framework)

    def evict(self, *keys: bytes) -> int:
        """Forget keys, counted as evictions. Returns how many were held. Raises if the daemon cannot answer."""
        request = pb.EvictRequest(keys=check_keys(keys))
        return self._operate("Evict", request, pb.EvictReply, lambda reply: int(reply.evicted))

    def demote(self, *keys: bytes) -> int:
        """Move keys one tier down. Returns how many moved. Raises if the daemon cannot answer."""
        request = pb.DemoteRequest(keys=check_keys(keys))
        return self._operate("Demote", request, pb.MoveReply, lambda reply: int(reply.moved))

    def promote(self, *keys: bytes) -> int:
        """Copy keys to hot. Returns how many were copied. Raises if the daemon cannot answer."""
        request = pb.PromoteRequest(keys=check_keys(keys))
        return self._operate("Promote", request, pb.MoveReply, lambda reply: int(reply.moved))

    def drain(self) -> int:
        """Have everything that is only in memory written to cold. Returns entries written. Raises if it cannot."""
        return self._operate("Drain", pb.DrainRequest(), pb.DrainReply, lambda reply: int(reply.written))

    def verify(self) -> Iterator[Verified]:
        """Have every record on disk read and checked; how far it is, a few times a second. Damaged ones are dropped.

        The last one is the result. Raises if the daemon cannot answer.
        """

        def read(message: bytes) -> list[Verified]:
            reply = self._understood(pb.VerifyReply.FromString, message)
            return [Verified(reply.checked, reply.total, reply.nbytes, reply.corrupt)]

        return self._streamed("Verify", pb.VerifyRequest(), read)

    def snapshot(self, path: str) -> Iterator[Copied]:
        """Have all entries copied to a directory of the daemon's host, while it serves; how far it is, in steps.

        path: absolute, as the daemon sees it; not there yet, or empty. It is written by the daemon's user, with mode
        0700, and whole when the last step was taken; if the iterator is closed before, nothing is left. A daemon takes
        it as its `server.data_dir`. Raises ConfigError for a path that cannot be used or has no room, and if the daemon
        cannot answer.
        """

        def read(message: bytes) -> list[Copied]:
            reply = self._understood(pb.SnapshotReply.FromString, message)
            return [Copied(reply.done, reply.total, reply.copied, reply.nbytes, reply.lost)]

        return self._streamed("Snapshot", pb.SnapshotRequest(directory=path), read)

    def check_shared(self) -> list[str]:
        """What is wrong with the store that the daemon shares with other hosts, a sentence each; empty: nothing.

        Raises ConfigError where it shares none, and if the daemon cannot answer.
        """
        request = pb.CheckSharedRequest()
        return self._operate("CheckShared", request, pb.CheckSharedReply, lambda reply: list(reply.complaints))

    def flush_shared(self, namespace: str | None = None) -> None:
        """Put what the shared store has of a namespace, or everything, out of reach: all hosts miss it within 2 s.

        Raises ConfigError where nothing is shared, and if the daemon or the shared store does not answer.
        """
        request = pb.FlushSharedRequest(namespace=namespace)
        return self._operate("FlushShared", request, pb.FlushSharedReply, _nothing)

    def report(self, *, prefill_saved_s: float) -> None:
        """Tell the daemon's metrics how much prefill time was saved since the last report, in seconds."""
        request = pb.ReportRequest(prefill_saved_s=check_saved(prefill_saved_s))
        return self._asked("Report", request, pb.ReportReply, _nothing, None, small=False)

    def inspect(self, key: bytes) -> EntryInfo | None:
        """What is known of an entry. Does not count as use. Raises if the daemon cannot answer."""
        request = pb.InspectRequest(key=check_key(key))

        def read(reply: pb.InspectReply) -> EntryInfo | None:
            return self._understood(read_entry_info, reply.entry) if reply.HasField("entry") else None

        return self._operate("Inspect", request, pb.InspectReply, read)

    def explain(self, *keys: bytes, tenant: str = "") -> list[Explanation]:
        """For each key where it is held, or why it is gone. Raises if the daemon cannot answer.

        tenant: the keys are as this tenant names them.
        """
        request = pb.ExplainRequest(keys=check_keys(keys), tenant=tenant)

        def read(reply: pb.ExplainReply) -> list[Explanation]:
            return [self._understood(read_explanation, message) for message in reply.explanations]

        return self._operate("Explain", request, pb.ExplainReply, read)

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
        request = pb.ListRequest(
            tier=tier_number(tier),
            key_prefix=check_prefix(key_prefix),
            limit=limit or 0,
            tenant=tenant,
            namespace=namespace,
        )

        def read(message: bytes) -> list[EntryInfo]:
            entries = self._understood(pb.ListReply.FromString, message).entries
            return [self._understood(read_entry_info, entry) for entry in entries]

        return self._streamed("List", None if limit is not None and limit <= 0 else request, read)

    def ping(self) -> bool:
        """Whether the daemon serves; False while it stops. Needs no right. Raises TierUnavailable without an answer."""
        return self._health()

    def stats(self) -> Stats:
        """Counters since start and gauges of now. Raises if the daemon cannot answer."""

        def read(reply: pb.StatsReply) -> Stats:
            return self._understood(read_stats, self._noted(reply))

        return self._operate("Stats", pb.StatsRequest(), pb.StatsReply, read)

    def settings(self) -> list[Setting]:
        """The daemon's settings in force, each with its origin. Raises if the daemon cannot answer."""

        def read(reply: pb.SettingsReply) -> list[Setting]:
            return self._understood(read_settings, reply)

        return self._operate("Settings", pb.SettingsRequest(), pb.SettingsReply, read)

    def configure(self, settings: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
        """Change settings that need no restart: by name, each value as text. What changed: the values before and now.

        Raises InvalidEntry, and nothing has changed, for one that is unknown, wrong or needs a restart; and if the
        daemon cannot answer.
        """
        request = pb.ConfigureRequest(settings=settings)

        def read(reply: pb.ConfigureReply) -> dict[str, tuple[Any, Any]]:
            return self._understood(read_changes, reply)

        return self._operate("Configure", request, pb.ConfigureReply, read)

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

    def _pin(self, keys: tuple[bytes, ...], *, pinned: bool, ttl_s: float | None = None) -> int:
        request = pb.PinRequest(keys=check_keys(keys), pinned=pinned, ttl_s=PutOptions(ttl_s).ttl_s or 0.0)
        return self._asked("Pin", request, pb.PinReply, lambda reply: self._at_most(len(keys), reply.changed), 0)
