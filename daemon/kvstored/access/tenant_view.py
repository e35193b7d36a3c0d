"""A tenant's view of the store: the same verbs over keys of its own, so another tenant's key is simply absent.

Each key is put behind a prefix that is an HMAC of the tenant's name under a secret of this data directory. The caller
neither sends nor sees it. There is no comparison of owners that could be skipped or timed: what another tenant put
stands under another key, and the lookup that misses it is the lookup that misses anything.
"""

import contextvars
import hashlib
import hmac
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, PermissionDenied
from kvstore.hit import Held, Hit, Match
from kvstore.keys import Key
from kvstore.residency.read_path import Found, Resident
from kvstore.store import Store
from kvstored.access.tokens import LOCAL, Identity

CALLER: contextvars.ContextVar[Identity] = contextvars.ContextVar("kvstored_caller", default=LOCAL)
"""Who the call under way is for; set by the interceptor."""

PREFIX_NBYTES = 16
_KEY_MAX_NBYTES = 256
_SECRET_NBYTES = 32


def read_secret(path: Path) -> bytes:
    """The data directory's secret, made at first use. Lost or replaced, every tenant starts with an empty cache."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, secrets.token_bytes(_SECRET_NBYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
    found = path.read_bytes()
    if len(found) != _SECRET_NBYTES:
        raise ConfigError(f"{path} must hold {_SECRET_NBYTES} bytes, got {len(found)}; remove it to have one made")
    return found


class TenantView:
    """The verbs of Store that a tenant's token can reach."""

    def __init__(self, store: Store, secret: bytes, tenant: str) -> None:
        self._store = store
        self.prefixes = self._prefix, self._long_prefix = tenant_prefixes(secret, tenant)

    @property
    def config(self) -> StoreConfig:
        """The store's settings."""
        return self._store.config

    def own(self, key: bytes) -> bytes:
        """Where this tenant's key stands."""
        if len(key) + PREFIX_NBYTES <= _KEY_MAX_NBYTES:
            return self._prefix + key
        return self._long_prefix + hashlib.sha256(key).digest()

    def _all(self, keys: Sequence[bytes]) -> list[bytes]:
        return [self.own(key) for key in keys]

    def put_many(
        self, entries: Sequence[tuple[bytes, Mapping[str, Any]]], *, parent: bytes | None = None, **how: Any
    ) -> int:
        """As Store.put_many."""
        own = [(self.own(key), tensors) for key, tensors in entries]
        return self._store.put_many(own, parent=None if parent is None else self.own(parent), **how)

    @contextmanager
    def lease_as_held(
        self, keys: Sequence[bytes], accept: Collection[str], **how: Any
    ) -> Iterator[Iterator[Hit | Found | None]]:
        """As Store.lease_as_held; hits carry the keys asked for."""
        with self._store.lease_as_held(self._all(keys), accept, **how) as hits:
            yield (_under(key, hit) for key, hit in zip(keys, hits, strict=False))

    def at_hand(self, keys: Sequence[bytes], accept: Collection[str], **how: Any) -> bool:
        """As Store.at_hand."""
        return self._store.at_hand(self._all(keys), accept, **how)

    def resident(self, keys: Sequence[bytes], **how: Any) -> Resident | None:
        """As Store.resident; the entries carry the keys they stand under."""
        return self._store.resident(self._all(keys), **how)

    def match(self, keys: Sequence[bytes]) -> Match:
        """As Store.match."""
        return self._store.match(self._all(keys))

    def locate(self, keys: Sequence[bytes]) -> list[Held | None]:
        """As Store.locate."""
        return self._store.locate(self._all(keys))

    def holds_truly(self, key: bytes) -> bool:
        """As Store.holds_truly."""
        return self._store.holds_truly(self.own(key))

    def touch(self, keys: Sequence[bytes], **how: Any) -> int:
        """As Store.touch."""
        return self._store.touch(self._all(keys), **how)

    def delete(self, *keys: bytes, **how: Any) -> int:
        """As Store.delete."""
        return self._store.delete(*self._all(keys), **how)

    def pin(self, *keys: bytes, **how: Any) -> int:
        """As Store.pin."""
        return self._store.pin(*self._all(keys), **how)

    def unpin(self, *keys: bytes) -> int:
        """As Store.unpin."""
        return self._store.unpin(*self._all(keys))

    def __getattr__(self, verb: str) -> Any:
        # A verb added to the store later is out of a tenant's reach until it is mapped here: fails closed.
        raise PermissionDenied(f"a tenant's token cannot use {verb}: that needs a token without a tenant")


class TenantViews:
    """The store as each caller may see it."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._secret = secret
        self._by_tenant: dict[str, TenantView] = {}

    def keys_of(self, tenant: str, keys: Sequence[bytes]) -> list[bytes]:
        """Where a tenant's keys stand: for an operator who asks after them."""
        scope = TenantView(self._store, self._secret, tenant)
        return [scope.own(key) for key in keys]

    def current(self) -> Any:
        """The store of the call under way: the whole one, or its tenant's part."""
        self._store.settle()  # what was answered before is counted before
        return self.of(CALLER.get())

    def of(self, identity: Identity) -> Any:
        """The store as this caller may see it."""
        tenant = identity.tenant
        if tenant is None:
            return self._store
        found = self._by_tenant.get(tenant)  # as many as the tokens file has tenants
        if found is None:
            found = self._by_tenant[tenant] = TenantView(self._store, self._secret, tenant)
            self._store.register_tenant(tenant, found.prefixes)
        return found


def tenant_prefixes(secret: bytes, tenant: str) -> tuple[bytes, bytes]:
    """What stands before a tenant's keys: the usual ones, and those too long to be put behind it as they are."""
    return _derive(secret, tenant, "key"), _derive(secret, tenant, "long key")


def _under(key: bytes, hit: Hit | Found | None) -> Hit | Found | None:
    if isinstance(hit, Found):
        return hit._replace(key=Key(key))
    return None if hit is None else replace(hit, key=key)


def _derive(secret: bytes, tenant: str, use: str) -> bytes:
    return hmac.new(secret, f"kvstored {use} v1\0{tenant}".encode(), hashlib.sha256).digest()[:PREFIX_NBYTES]
