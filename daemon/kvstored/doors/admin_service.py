"""The service Admin: what an operator asks of a running daemon. On the event loop; what may block, on threads."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import grpc

from kvstore.errors import ConfigError, InvalidEntry
from kvstore.hit import Copied
from kvstore.keys import check_key, check_keys
from kvstore.stats import Stats
from kvstore.store import Store
from kvstored.access.interceptor import OpenCall
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.fair_threads import FairThreads
from kvstored.calls.snapshot import Snapshot, last_within
from kvstored.live import LiveSettings
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import (
    TIER_NAMES,
    changes_message,
    entry_info_message,
    explanation_message,
    settings_message,
    stats_message,
)
from kvstored_client.wire.requests import read_request

LIST_GROUP = 256


VERIFY_REPORT_S = 0.2
"""Between two reports of a check: a bar that moves, and far less than a client's patience."""
SIGN_OF_LIFE_S = 1.0
"""A step of a snapshot that takes longer is reported as it was: what is only in memory may take minutes to write."""

R = TypeVar("R")


class AdminService:
    """What an operator does."""

    def __init__(
        self, views: TenantViews, threads: FairThreads, boot_epoch: int, version: str, snapshot: Callable[[], Stats],
        settings: LiveSettings,
    ) -> None:  # fmt: skip
        self._views = views
        self._threads = threads
        self._epoch = boot_epoch
        self._version = version
        self._snapshot = snapshot
        self._settings = settings

    def _run(self, call: OpenCall, work: Callable[..., R], *args: Any) -> Awaitable[R]:
        """Work that may block, on a worker thread."""
        return self._threads.run(call.identity.account, work, *args)

    def _whole(self, call: OpenCall) -> Store:
        """The whole store. Raises PermissionDenied for a tenant's caller."""
        return self._views.whole(call.identity)

    async def stats(self, request: bytes, call: OpenCall) -> bytes:
        """Counters and gauges, the daemon's own among them."""
        read_request(pb.StatsRequest, request)
        found = await self._run(call, self._snapshot)
        reply = stats_message(found)
        reply.uptime_s = found.values["uptime_s"]
        reply.version = self._version
        reply.boot_epoch = self._epoch
        return reply.SerializeToString()

    async def list(self, request: bytes, call: OpenCall) -> None:
        """Entries in order of key."""
        asked = read_request(pb.ListRequest, request)
        if asked.tier and asked.tier not in TIER_NAMES:
            raise InvalidEntry(f"unknown tier {asked.tier}")
        found = self._whole(call).entries(
            tier=TIER_NAMES.get(asked.tier),
            key_prefix=asked.key_prefix,
            tenant=asked.tenant,
            namespace=asked.namespace,
            limit=asked.limit or None,
        )
        while group := await self._run(call, lambda: [*islice(found, LIST_GROUP)]):
            await call.write(pb.ListReply(entries=map(entry_info_message, group)).SerializeToString())

    async def inspect(self, request: bytes, call: OpenCall) -> bytes:
        """One entry."""
        key = check_key(read_request(pb.InspectRequest, request).key)
        info = await self._run(call, self._whole(call).inspect, key)
        return pb.InspectReply(entry=None if info is None else entry_info_message(info)).SerializeToString()

    async def explain(self, request: bytes, call: OpenCall) -> bytes:
        """Where keys are, or why they are gone."""
        asked = read_request(pb.ExplainRequest, request)
        keys = check_keys(asked.keys)
        own = self._views.keys_of(asked.tenant, keys) if asked.tenant else keys
        found = await self._run(call, self._whole(call).explain, *own)
        explained = [replace(of, key=key) for of, key in zip(found, keys, strict=True)]
        return pb.ExplainReply(explanations=map(explanation_message, explained)).SerializeToString()

    async def evict(self, request: bytes, call: OpenCall) -> bytes:
        """Forget keys, counted as evictions."""
        keys = check_keys(read_request(pb.EvictRequest, request).keys)
        return pb.EvictReply(evicted=await self._run(call, self._whole(call).evict, *keys)).SerializeToString()

    async def demote(self, request: bytes, call: OpenCall) -> bytes:
        """One tier down."""
        keys = check_keys(read_request(pb.DemoteRequest, request).keys)
        return pb.MoveReply(moved=await self._run(call, self._whole(call).demote, *keys)).SerializeToString()

    async def promote(self, request: bytes, call: OpenCall) -> bytes:
        """Copy to hot."""
        keys = check_keys(read_request(pb.PromoteRequest, request).keys)
        return pb.MoveReply(moved=await self._run(call, self._whole(call).promote, *keys)).SerializeToString()

    async def drain(self, request: bytes, call: OpenCall) -> bytes:
        """Write to cold what is only in memory."""
        read_request(pb.DrainRequest, request)
        return pb.DrainReply(written=await self._run(call, self._whole(call).drain)).SerializeToString()

    async def verify(self, request: bytes, call: OpenCall) -> None:
        """Check every record on disk."""
        read_request(pb.VerifyRequest, request)
        steps = self._whole(call).verify()
        while (found := await self._run(call, last_within, steps, VERIFY_REPORT_S)) is not None:
            await call.write(pb.VerifyReply(**found._asdict()).SerializeToString())

    async def snapshot(self, request: bytes, call: OpenCall) -> None:
        """Copy what is held into a directory."""
        asked = read_request(pb.SnapshotRequest, request)
        steps = Snapshot(self._whole(call).snapshot, Path(self._settings.data_dir), asked.directory)
        told = Copied(0, 0, 0, 0, 0)
        try:
            while True:
                step = asyncio.ensure_future(self._run(call, steps.step, VERIFY_REPORT_S))
                while not (await asyncio.wait({step}, timeout=SIGN_OF_LIFE_S))[0]:
                    await call.write(pb.SnapshotReply(**told._asdict()).SerializeToString())
                if (found := step.result()) is None:
                    return
                told = found
                await call.write(pb.SnapshotReply(**told._asdict()).SerializeToString())
        finally:
            await asyncio.shield(self._run(call, steps.end))

    async def settings(self, request: bytes, _: OpenCall) -> bytes:
        """The settings in force."""
        read_request(pb.SettingsRequest, request)
        return settings_message(self._settings.rows()).SerializeToString()

    async def configure(self, request: bytes, call: OpenCall) -> bytes:
        """Change settings that need no restart."""
        asked = dict(read_request(pb.ConfigureRequest, request).settings)
        try:
            changed = await self._run(call, self._settings.change, asked)
        except ConfigError as error:
            raise InvalidEntry(str(error)) from None
        return changes_message(changed.applied).SerializeToString()

    async def check_shared(self, request: bytes, call: OpenCall) -> bytes:
        """What is wrong with the shared store."""
        read_request(pb.CheckSharedRequest, request)
        return pb.CheckSharedReply(complaints=await self._run(call, self._whole(call).check_shared)).SerializeToString()

    async def flush_shared(self, request: bytes, call: OpenCall) -> bytes:
        """Put what the shared store has out of reach."""
        asked = read_request(pb.FlushSharedRequest, request)
        await self._run(call, self._whole(call).flush_shared, asked.namespace if asked.HasField("namespace") else None)
        return pb.FlushSharedReply().SerializeToString()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, by the names of the proto."""
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            "kvstored.v1.Admin",
            {
                "Stats": unary(self.stats),
                "List": grpc.unary_stream_rpc_method_handler(self.list),
                "Inspect": unary(self.inspect),
                "Explain": unary(self.explain),
                "Evict": unary(self.evict),
                "Demote": unary(self.demote),
                "Promote": unary(self.promote),
                "Drain": unary(self.drain),
                "CheckShared": unary(self.check_shared),
                "FlushShared": unary(self.flush_shared),
                "Snapshot": grpc.unary_stream_rpc_method_handler(self.snapshot),
                "Verify": grpc.unary_stream_rpc_method_handler(self.verify),
                "Settings": unary(self.settings),
                "Configure": unary(self.configure),
            },
        )
