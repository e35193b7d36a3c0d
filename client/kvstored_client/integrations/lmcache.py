"""kvstored for LMCache 0.5: an L2 adapter for its server, a remote connector for its engine, and an NF4 serde.

    lmcache server ... --l2-adapter '{"type": "plugin",
        "module_path": "kvstored_client.integrations.lmcache", "class_name": "KvstoredL2Adapter",
        "adapter_params": {"address": "unix:/run/kvstored/kvstored.sock"}}'

    remote_url: "plugin://kvstored"
    remote_storage_plugins: ["kvstored"]
    extra_config:
      remote_storage_plugin.kvstored.module_path: kvstored_client.integrations.lmcache
      remote_storage_plugin.kvstored.class_name: KvstoredConnectorAdapter

The identity is every field of LMCache's own keys (model, rank, chunk hash, salt, tags, and later versions') and, for
the connector, a digest of the engine's whole metadata and configuration (`_HARMLESS` says what is left out). The server
tells its adapter nothing of the engines: `namespace` in the parameters is the operator's word for what their model's
name does not say. Objects are kept as bytes, exactly, and fill only objects of the same shapes, dtypes and format.
Locks are not taken: a key that was there and is gone again is a miss of its load, which LMCache allows for.
The adapter's tasks run on threads of its own, and nothing of the cache's trouble is raised.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, Serializer
from lmcache.v1.distributed.serde.factory import register_serde_factory
from lmcache.v1.platform import create_event_notifier
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import configured
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard
from kvstored_client.integrations.wishes import NAME, Wishes, wishes_in

try:
    from lmcache.v1.protocol import RemoteMetadata
except ImportError:  # where 0.5.7 has it
    from lmcache.inprocess.v1.protocol import RemoteMetadata

logger = logging.getLogger(__name__)

_DATA, _META = "data", "meta"
_PLACE = "where a process or its peers are, not what they compute"
_SIZE = "how much memory, not what is in a chunk"
_HARMLESS = {
    "LMCacheMetadata.worker_id": "in each key",
    "LMCacheMetadata.local_worker_id": _PLACE,
    "LMCacheMetadata.local_world_size": _PLACE,
    "LMCacheMetadata.role": "the scheduler's process asks for what the workers' keep",
    "LMCacheMetadata.engine_id": "random, and new at each start",
    "LMCacheMetadata.served_model_name": "what clients call the model",
    "LMCacheMetadata.kv_layer_groups_manager": "made of the model while a worker starts; not there in the scheduler",
    "LMCacheMetadata.kv_connector_extra_config": "ports, and the configuration that is in",
    "LMCacheEngineConfig.lmcache_instance_id": "a name of the process",
    "LMCacheEngineConfig.max_local_cpu_size": _SIZE,
    "LMCacheEngineConfig.max_local_disk_size": _SIZE,
    "LMCacheEngineConfig.local_cpu": _SIZE,
    "LMCacheEngineConfig.local_disk": _PLACE,
    "LMCacheEngineConfig.remote_url": _PLACE,
    "extra_config.kvstored.address": _PLACE,
    "extra_config.kvstored.lookup_timeout_s": "how long a call is waited for",
    "extra_config.kvstored.fetch_timeout_s": "how long a call is waited for",
    "extra_config.kvstored.prefill_tokens_per_s": "what is reported",
}
"""All that is not in the identity. A field that is not here is in it, those of other versions of LMCache included."""
_NOT_THE_KEY = ("request_configs",)
"""Fields of a key that LMCache does not compare: its tags are a field of their own, the rest is for this request."""


def _guard_of(params: dict[str, Any], **more: Any) -> Guard:
    """The guard that a configuration asks for. more: further settings, with defaults. Raises TypeError for another."""
    known: dict[str, Any] = {
        "address": None, "lookup_timeout_s": LOOKUP_TIMEOUT_S, "fetch_timeout_s": FETCH_TIMEOUT_S, "namespace": "",
        **more,
    }  # fmt: skip
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(f"unknown setting {unknown[0]!r}; known: {', '.join(known)}")
    found = {**known, **params}
    return Guard(
        found["address"],
        lookup_timeout_s=float(found["lookup_timeout_s"]),
        fetch_timeout_s=float(found["fetch_timeout_s"]),
        prefill_tokens_per_s=float(found.get("prefill_tokens_per_s", 0.0)),
    )


def _key_of(root: bytes, key: Any) -> bytes:
    """Our key for LMCache's: all of its fields, told apart by name and type."""
    fields = [type(key).__name__]
    kind: Any = type(key)
    for name in _names_of(kind):
        x = getattr(key, name)
        fields.append(f"{name}={x.hex()}" if isinstance(x, bytes) else f"{name}={x!r}")
    return hashlib.sha256(root + json.dumps(fields).encode()).digest()


@lru_cache(maxsize=64)
def _names_of(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(kind) if each.name not in _NOT_THE_KEY)


def _wishes_of(key: Any) -> Wishes:
    """What a request wishes for its chunks, among its `request_configs`: `kvstored.ttl_s`, `.priority`, `.no_store`."""
    given = getattr(key, "request_configs", None)
    if not isinstance(given, dict):
        return Wishes()
    names = [name for name in given if isinstance(name, str) and name.startswith(f"{NAME}.")]
    return wishes_in([{name[len(NAME) + 1 :]: given[name] for name in names}], allow_pin=False)


def _form_of(obj: Any) -> torch.Tensor:
    """What an object's bytes are, as bytes: shapes, dtypes and memory format."""
    try:
        shapes, dtypes = obj.get_shapes(), obj.get_dtypes()
    except AssertionError:  # LMCache's word for an object of one tensor
        shapes, dtypes = [obj.get_shape()], [obj.get_dtype()]
    form = configured.canonical([[list(shape) for shape in shapes], list(dtypes), obj.get_memory_format()])
    return torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)


def _bytes_of(obj: Any) -> torch.Tensor:
    return torch.frombuffer(obj.byte_array, dtype=torch.uint8)


def _fills(tensors: Any, obj: Any) -> bool:
    """Copy an entry into an object. False: it is of another shape, dtype or format."""
    data, form, target, due = tensors.get(_DATA), tensors.get(_META), _bytes_of(obj), _form_of(obj)
    if data is None or form is None or data.shape != target.shape or data.dtype != target.dtype:
        return False
    if form.shape != due.shape or not torch.equal(form, due):
        return False
    target.copy_(data)
    return True


class KvstoredL2Adapter(L2AdapterInterface):
    """LMCache's second level in kvstored. Thread-safe, as LMCache asks for."""

    def __init__(self, params: dict[str, Any] | None = None, **_: Any) -> None:
        super().__init__()
        self._guard = _guard_of(params or {})
        self._root = configured.digest("lmcache-l2", {"namespace": str((params or {}).get("namespace", ""))})
        self._efds = {name: create_event_notifier() for name in ("store", "lookup", "load")}
        self._lock = threading.Lock()
        self._last_task = 0
        self._done: dict[str, dict[int, Any]] = {name: {} for name in self._efds}
        # Stores apart from loads: a long write never stands before a lookup.
        self._threads = {name: ThreadPoolExecutor(1, f"kvstored-{name}") for name in self._efds}

    def get_store_event_fd(self) -> int:
        """Signalled when a store is done."""
        return int(self._efds["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Signalled when a lookup is done."""
        return int(self._efds["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        """Signalled when a load is done."""
        return int(self._efds["load"].fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Put objects. Returns the task."""
        return self._submit("store", lambda: self._store(keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Results by task, each once."""
        with self._lock:
            done, self._done["store"] = self._done["store"], {}
            return done

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any) -> int:
        """Ask which keys are held. Returns the task."""
        del group_layout_descs
        return self._submit("lookup", lambda: self._lookup(keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """The bitmap of a lookup, once; None before it is done."""
        with self._lock:
            return self._done["lookup"].pop(task_id, None)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing is locked."""

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Fill objects. Returns the task."""
        return self._submit("load", lambda: self._load(keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        """The bitmap of a load, once; None before it is done."""
        with self._lock:
            return self._done["load"].pop(task_id, None)

    def delete(self, keys: list[Any]) -> None:
        """Forget keys."""
        self._guard.delete(*self._keys(keys))

    def get_memory_tags(self) -> Any:
        """Where the bytes are, as LMCache 0.5.7 asks: in a store on this host."""
        from lmcache.v1.distributed.api import MemoryResidency, MemorySegment, MemoryTags

        return MemoryTags(MemorySegment.STORAGE, MemoryResidency.LOCAL)

    def report_status(self) -> dict[str, Any]:
        """What LMCache shows of this adapter."""
        return {"is_healthy": True, "type": type(self).__name__, "failures": self._guard.failures}

    def close(self) -> None:
        """End the threads; running tasks are waited for, which their deadlines bound."""
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)
        for efd in self._efds.values():
            efd.close()

    def _submit(self, kind: str, work: Callable[[], Any], failed: Any) -> int:
        with self._lock:
            self._last_task += 1
            task = self._last_task

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - the boundary: LMCache only ever sees a miss
                logger.warning("%s failed: %s: %s", kind, type(error).__name__, error)
                result = failed
            with self._lock:
                self._done[kind][task] = result
            self._efds[kind].notify()

        self._threads[kind].submit(run)
        return task

    def _keys(self, keys: list[Any]) -> list[bytes]:
        return [_key_of(self._root, key) for key in keys]

    def _store(self, keys: list[Any], objects: list[Any]) -> Any:
        # Copies: a put given up at its deadline may still be reading when LMCache reuses the object.
        copies = self._guard.copies([_bytes_of(obj) for obj in objects])
        entries = [
            (key, {_DATA: data, _META: _form_of(obj)})
            for key, data, obj in zip(self._keys(keys), copies, objects, strict=True)
        ]
        stored = self._guard.put_many(entries, fidelity="exact")
        if stored != len(entries):
            return L2StoreResult(False, 0)
        sizes = [entry[_DATA].numel() for _, entry in entries]
        self._notify_keys_stored(keys, sizes)
        return L2StoreResult(True, sum(sizes))

    def _lookup(self, keys: list[Any]) -> Any:
        found = Bitmap(len(keys))
        # LMCache does not tell its second level how many tokens an object has.
        for i, held in enumerate(self._guard.locate(self._keys(keys), lookup=Lookup(len(keys), prefetch=True))):
            if held is not None:
                found.set(i)
        return found

    def _load(self, keys: list[Any], objects: list[Any]) -> Any:
        found = Bitmap(len(keys))
        with self._guard.lease_many(self._keys(keys), lookup=ELSEWHERE) as hits:
            filled = [hit is not None and _fills(hit.tensors, obj) for hit, obj in zip(hits, objects, strict=True)]
        for i, done in enumerate(filled):  # only now: a lease that ended too early has raised
            if done:
                found.set(i)
        self._notify_keys_accessed([key for i, key in enumerate(keys) if found.test(i)])
        return found


class KvstoredConnectorAdapter(ConnectorAdapter):
    """Makes the connector for `plugin://kvstored`, with the metadata that a bare connector class is not given."""

    def __init__(self, *_: Any) -> None:
        super().__init__("plugin://")

    def can_parse(self, url: str) -> bool:
        """Whether the URL names this plug-in."""
        return url.startswith("plugin://kvstored")

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """The connector for an engine; settings are those of extra_config that begin with `kvstored.`."""
        return KvstoredConnector(context)


class KvstoredConnector(RemoteConnector):
    """LMCache's remote store in kvstored."""

    def __init__(self, context: ConnectorContext) -> None:
        super().__init__(context.config, context.metadata)
        extra = context.config.extra_config or {}
        own = {name[len("kvstored.") :]: value for name, value in extra.items() if name.startswith("kvstored.")}
        self._guard = _guard_of(own, prefill_tokens_per_s=0.0)
        self._root: bytes | None = None
        try:
            whole = {"metadata": context.metadata, "config": context.config}
            self._root = configured.digest("lmcache-remote", whole, _HARMLESS)
        except configured.NoStableForm as error:
            logger.warning("running without the store: %s", error)
        self._local = context.local_cpu_backend
        self._chunk_tokens = int(getattr(context.config, "chunk_size", 0) or 0)

    async def exists(self, key: Any) -> bool:
        """Whether the key is held."""
        return await asyncio.to_thread(self.exists_sync, key)

    def exists_sync(self, key: Any) -> bool:
        """Whether the key is held."""
        lookup = Lookup(1, self._chunk_tokens, self._chunk_tokens, prefetch=True)
        return self._root is not None and self._guard.match([_key_of(self._root, key)], lookup=lookup) > 0

    async def get(self, key: Any) -> Any:
        """The object, in memory of LMCache's; None on a miss."""
        return await asyncio.to_thread(self._get, key)

    def _get(self, key: Any) -> Any:
        if self._root is None:
            return None
        made: list[Any] = []
        began = time.perf_counter()
        try:
            with self._guard.lease_many([_key_of(self._root, key)], lookup=ELSEWHERE) as hits:
                filled = hits[0] is not None and self._filled(hits[0].tensors, made)
        except Exception as error:  # noqa: BLE001 - the boundary: LMCache only ever sees a miss
            logger.warning("get failed: %s: %s", type(error).__name__, error)
            filled = False
        if not filled:
            for obj in made:
                obj.ref_count_down()
            return None
        self._guard.restored(self._chunk_tokens, time.perf_counter() - began)
        return made[0]

    def _filled(self, tensors: Any, made: list[Any]) -> bool:
        """Copy an entry into a new object of LMCache's, which goes to `made`. False: it cannot be."""
        if not {_DATA, _META} <= tensors.keys():
            return False
        meta = RemoteMetadata.deserialize(tensors[_META].numpy().tobytes())
        obj = self._local.allocate(meta.shapes, meta.dtypes, meta.fmt)
        if obj is None:
            return False
        made.append(obj)
        target = _bytes_of(obj)
        if tensors[_DATA].shape != target.shape:
            return False
        target.copy_(tensors[_DATA])
        return True

    async def put(self, key: Any, memory_obj: Any) -> None:
        """Put the object."""
        wishes = _wishes_of(key)
        if wishes.complaint:
            logger.debug("a request's wish for its chunks is left out: %s", wishes.complaint)
        if self._root is None or not wishes.store:
            return
        # A copy: a put given up at its deadline may still be reading.
        (data,) = await asyncio.to_thread(self._guard.copies, [_bytes_of(memory_obj)])
        shapes, dtypes = memory_obj.get_shapes(), memory_obj.get_dtypes()
        meta = RemoteMetadata(data.numel(), shapes, dtypes, memory_obj.get_memory_format()).serialize()
        entry = {_DATA: data, _META: torch.frombuffer(bytearray(meta), dtype=torch.uint8)}
        entries = [(_key_of(self._root, key), entry)]
        await asyncio.to_thread(lambda: self._guard.put_many(entries, fidelity="exact", **wishes.options))

    async def list(self) -> list[str]:
        """Keys cannot be listed: they are kept as hashes."""
        return []

    async def close(self) -> None:
        """Finish what is waiting."""
        await asyncio.to_thread(self._guard.flush)


_HEAD_NBYTES = 1024
"""A serialized tensor begins with its description as JSON, padded to this."""


class Nf4Serializer(Serializer):
    """KV tensors as NF4: 4.13 bits a value. Raises CodecError for a tensor with values that are not finite."""

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Write description and parts. Returns the bytes written."""
        del key
        from kvstore.codecs import codec_named

        encoded = codec_named("nf4").encode("kv", src.tensor)
        parts = {suffix: part.contiguous().view(torch.uint8).flatten() for suffix, part in encoded.parts.items()}
        head = {
            "attrs": dict(encoded.attrs),
            "parts": [[s, str(encoded.parts[s].dtype)[6:], p.numel()] for s, p in parts.items()],
        }
        text = json.dumps(head).encode().ljust(_HEAD_NBYTES)
        if len(text) > _HEAD_NBYTES:
            raise ValueError(f"a description has at most {_HEAD_NBYTES} bytes, got {len(text)}")
        whole = torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *parts.values()])
        _bytes_of(dst)[: whole.numel()].copy_(whole)
        return whole.numel()

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """An upper bound: half a byte a value, a scale for each 64 of them and 4 bytes for each 256 scales."""
        n = sum(torch.Size(shape).numel() for shape in layout_desc.shapes)
        scales = n // 64 + 1
        return int(_HEAD_NBYTES + n // 2 + 1 + scales + 4 * (scales // 256 + 1))


class Nf4Deserializer(Deserializer):
    """NF4 back to the destination's dtype."""

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Fill dst. Raises CodecError for bytes that are no NF4 tensor of its shape."""
        del key
        from kvstore.codecs import codec_named
        from kvstore.dtypes import TensorSpec
        from kvstore.entries.entry import EncodedTensor

        data, target = _bytes_of(src), dst.tensor
        head = json.loads(data[:_HEAD_NBYTES].numpy().tobytes())
        start, parts = _HEAD_NBYTES, {}
        for suffix, dtype, nbytes in head["parts"]:
            parts[suffix] = data[start : start + nbytes].clone().view(getattr(torch, dtype))
            start += nbytes
        spec = TensorSpec(str(target.dtype)[6:], tuple(target.shape))
        target.copy_(codec_named("nf4").decode(EncodedTensor(spec, "nf4", parts, head["attrs"])))


def _nf4_serde(settings: dict[str, Any]) -> AsyncSerdeProcessor:
    return AsyncSerdeProcessor(Nf4Serializer(), Nf4Deserializer(), max_workers=int(settings.get("max_workers", 1)))


try:
    register_serde_factory("nf4", _nf4_serde)
except ValueError:  # this module was imported under two names, as LMCache's plug-in loader may
    logger.debug("nf4 is registered already")
