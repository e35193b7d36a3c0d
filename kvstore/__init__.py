"""kvstore: the engine of kvstored, usable without a daemon.

    from kvstore import Store

    with Store.open("/var/cache/kv") as store:
        store.put(b"key", {"k": k, "v": v})
        hit = store.get(b"key")

Names are imported when first used (PEP 562): `import kvstore.keys` in a light client must not import torch, and
importing a submodule runs this file first.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.codecs.outside import register_codec
    from kvstore.codecs.packing import decode, encode
    from kvstore.config import ColdConfig, HotConfig, SharedConfig, StoreConfig, WarmConfig
    from kvstore.errors import (
        CodecError,
        ConfigError,
        EntryTooLarge,
        InvalidEntry,
        KvstoreError,
        OverQuota,
        PermissionDenied,
        RecordCorrupt,
        SharedUnavailable,
        TierUnavailable,
    )
    from kvstore.hit import EntryInfo, Held, Hit, Match, TensorInfo
    from kvstore.keys import Identity, chunk_keys
    from kvstore.options import PutOptions
    from kvstore.packed import PackedTensor
    from kvstore.policies import register_policy
    from kvstore.prefix import Namespace
    from kvstore.store import Store

_HOME = {
    "ColdConfig": "config",
    "HotConfig": "config",
    "SharedConfig": "config",
    "StoreConfig": "config",
    "WarmConfig": "config",
    "CodecError": "errors",
    "ConfigError": "errors",
    "EntryTooLarge": "errors",
    "InvalidEntry": "errors",
    "KvstoreError": "errors",
    "OverQuota": "errors",
    "PermissionDenied": "errors",
    "RecordCorrupt": "errors",
    "SharedUnavailable": "errors",
    "TierUnavailable": "errors",
    "EntryInfo": "hit",
    "Held": "hit",
    "Hit": "hit",
    "Match": "hit",
    "TensorInfo": "hit",
    "Identity": "keys",
    "chunk_keys": "keys",
    "Namespace": "prefix",
    "PutOptions": "options",
    "PackedTensor": "packed",
    "decode": "codecs.packing",
    "encode": "codecs.packing",
    "register_codec": "codecs.outside",
    "register_policy": "policies",
    "Store": "store",
}

__all__ = [
    "CodecError",
    "ColdConfig",
    "ConfigError",
    "EntryInfo",
    "EntryTooLarge",
    "Held",
    "Hit",
    "HotConfig",
    "Identity",
    "InvalidEntry",
    "KvstoreError",
    "Match",
    "Namespace",
    "OverQuota",
    "PackedTensor",
    "PermissionDenied",
    "PutOptions",
    "RecordCorrupt",
    "SharedConfig",
    "SharedUnavailable",
    "Store",
    "StoreConfig",
    "TensorInfo",
    "TierUnavailable",
    "WarmConfig",
    "chunk_keys",
    "decode",
    "encode",
    "register_codec",
    "register_policy",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    try:
        return getattr(import_module(f"kvstore.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"kvstore.{name} needs torch, which a light client does without") from error


def __dir__() -> list[str]:
    return sorted(__all__)
