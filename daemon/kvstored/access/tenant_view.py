"""A tenant's view of the store: the same verbs over keys of its own, so another tenant's key is absent.

Each key gets a prefix: an HMAC of the tenant's name under a secret of this data directory. The caller neither sends nor
sees it. No owners are compared, so no comparison can be skipped or timed: an entry of another tenant has another key,
and looking for it is a miss like any other.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from kvstore.config import SharedConfig, StoreConfig
from kvstore.entries.entry import Entry
from kvstore.errors import ConfigError, PermissionDenied
from kvstore.hit import Held, Hit, Match
from kvstore.keys import KEY_MAX_NBYTES, CheckedKeys, Key
from kvstore.options import PutOptions
from kvstore.ownership import open_own
from kvstore.residency.read_path import Found, Plan
from kvstore.shared.names import read_secret as read_shared_secret
from kvstore.shm.arena import Room
from kvstore.store import Store
from kvstore.view import StoreView
from kvstored.access.tokens import Identity

PREFIX_NBYTES = 16
_SECRET_NBYTES = 32


def tenants_secret(data_dir: str | Path, shared: SharedConfig) -> bytes:
    """The secret of the tenants' keys: the data directory's own or, with [store.shared], the same on all hosts.

    Raises ConfigError where the directory has another one: its tenants would share nothing, and nobody would see why.
    """
    path = Path(data_dir) / "tenants.secret"
    if not shared.url:
        return read_secret(path)
    due = hmac.digest(read_shared_secret(shared.secret_file), b"kvstored tenants v1", hashlib.sha256)
    if read_secret(path, made=due) != due:
        raise ConfigError(
            f"{path} is not the secret that follows from store.shared.secret_file, {shared.secret_file}: tenants' keys "
            "would be other keys than on the other hosts. Remove it; each tenant then starts with an empty cache"
        )
    return due


def read_secret(path: Path, *, made: bytes | None = None) -> bytes:
    """The data directory's secret, made at first use. If it is lost, every tenant starts with an empty cache.

    made: what is written at first use, by default random bytes.
    """
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, made or secrets.token_bytes(_SECRET_NBYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
    with os.fdopen(open_own(path, os.O_RDONLY, "the tenants' secret"), "rb") as file:
        found = file.read(_SECRET_NBYTES + 1)
    if len(found) != _SECRET_NBYTES:
        raise ConfigError(f"{path} must hold {_SECRET_NBYTES} bytes, got {len(found)}; remove it to have one made")
    return found


class TenantView:
    """The verbs of Store that a tenant's token may use."""

    def __init__(self, store: Store, secret: bytes, tenant: str) -> None:
        self._store = store
        self.prefixes = self._prefix, self._long_prefix = tenant_prefixes(secret, tenant)

    @property
    def config(self) -> StoreConfig:
        """The store's settings."""
        return self._store.config

    def own(self, key: bytes) -> Key:
        """The store's key for this tenant's key."""
        if len(key) + PREFIX_NBYTES <= KEY_MAX_NBYTES:
            return Key(self._prefix + key)
        return Key(self._long_prefix + hashlib.sha256(key).digest())

    def _all(self, keys: Sequence[bytes]) -> CheckedKeys:
        checked = CheckedKeys(keys)
        if max(map(len, checked), default=0) + PREFIX_NBYTES <= KEY_MAX_NBYTES:
            return checked.after(self._prefix)  # one by one thousands of keys take a tenth of what a call may
        return CheckedKeys([self.own(key) for key in checked])

    def put_entries(
        self, entries: Sequence[Entry], options: PutOptions, *, chain: bool = False, parent: Key | None = None
    ) -> int:
        """As Store.put_entries, under this tenant's keys."""
        own = [Entry(self.own(entry.key), entry.tensors, lossy=entry.lossy, block=entry.block) for entry in entries]
        before = None if parent is None else self.own(parent)
        return self._store.put_entries(own, options, chain=chain, parent=before)

    def plan(self, keys: CheckedKeys, **how: Any) -> Plan:
        """As Store.plan; the plan, and the entries read by it, have the store's keys."""
        return self._store.plan(self._all(keys), **how)

    @property
    def shares(self) -> bool:
        """As Store.shares."""
        return self._store.shares

    def bring(self, keys: CheckedKeys, **how: Any) -> None:
        """As Store.bring."""
        self._store.bring(self._all(keys), **how)

    def ends_here(self, keys: CheckedKeys) -> bool:
        """As Store.ends_here."""
        return self._store.ends_here(self._all(keys))

    def read(self, plan: Plan, *, room: Room | None = None) -> Iterator[Hit | Found | None]:
        """As Store.read, for a plan of this view."""
        return self._store.read(plan, room=room)

    def match(self, keys: Sequence[bytes], **how: Any) -> Match:
        """As Store.match."""
        return self._store.match(self._all(keys), **how)

    def locate(self, keys: Sequence[bytes], **how: Any) -> list[Held | None]:
        """As Store.locate."""
        return self._store.locate(self._all(keys), **how)

    def first_held(self, keys: Sequence[bytes]) -> int:
        """As Store.first_held."""
        return self._store.first_held(self._all(keys))

    def touch(self, keys: Sequence[bytes], **how: Any) -> int:
        """As Store.touch."""
        return self._store.touch(self._all(keys), **how)

    def delete(self, keys: CheckedKeys, /, **how: Any) -> int:
        """As Store.delete."""
        return self._store.delete(self._all(keys), **how)

    def pin(self, keys: CheckedKeys, /, **how: Any) -> int:
        """As Store.pin."""
        return self._store.pin(self._all(keys), **how)

    def unpin(self, keys: CheckedKeys, /) -> int:
        """As Store.unpin."""
        return self._store.unpin(self._all(keys))

    def __getattr__(self, verb: str) -> NoReturn:
        # A verb that is added to the store later is refused until it is mapped here: it fails closed.
        raise _refused(verb)


class TenantViews(dict[str | None, StoreView]):
    """The store as callers see it, by their tenant; without one all of it. Bounded by the tokens file."""

    def __init__(self, store: Store, secret: bytes) -> None:
        super().__init__({None: store})
        self._store = store
        self._secret = secret

    def __missing__(self, tenant: str) -> StoreView:
        """A tenant's part, when it first calls."""
        found = TenantView(self._store, self._secret, tenant)
        self._store.register_tenant(tenant, found.prefixes)
        self[tenant] = found
        return found

    def keys_of(self, tenant: str, keys: Sequence[bytes]) -> list[bytes]:
        """The store's keys for a tenant's keys: for an operator who asks about them."""
        scope = TenantView(self._store, self._secret, tenant)
        return [scope.own(key) for key in keys]

    def whole(self, caller: Identity) -> Store:
        """The whole store, for an operator. Raises PermissionDenied for a tenant's caller."""
        if caller.tenant is not None:
            raise _refused("this verb")
        return self._store


def _refused(verb: str) -> PermissionDenied:
    return PermissionDenied(f"a tenant's token cannot use {verb}: that needs a token without a tenant")


def tenant_prefixes(secret: bytes, tenant: str) -> tuple[bytes, bytes]:
    """The prefixes of a tenant's keys: for usual keys, and for keys that are too long to get it unchanged."""
    return _derive(secret, tenant, "key"), _derive(secret, tenant, "long key")


def _derive(secret: bytes, tenant: str, use: str) -> bytes:
    return hmac.new(secret, f"kvstored {use} v1\0{tenant}".encode(), hashlib.sha256).digest()[:PREFIX_NBYTES]
