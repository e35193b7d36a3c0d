"""The callers: bearer tokens and client certificates, each with a name, rights and perhaps a tenant.

The file holds SHA-256 digests, never tokens: a reader of the file cannot log in with them. A plain fast hash is enough,
because a token is 256 random bits made by `kvstored token`, not a password that could be guessed. A caller's digest is
compared with every digest in the file in constant time, so the time tells neither how much of it was right nor which
entry it resembles.

    [[token]]                           [[certificate]]
    name = "worker-a"                   name = "worker-b"          # the common name in the client's certificate
    sha256 = "9f86d0..."                rights = ["read"]
    tenant = "team-a"
    rights = ["read", "write"]
    uid = 1001                          # this user's processes may use shared memory, as this caller

A caller with a tenant sees that tenant's keys and no others; one without sees all keys as they are.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.config import read_toml
from kvstore.errors import ConfigError
from kvstore.ownership import check_private, everybody_reads, overflow_uid
from kvstored.telemetry.logs import TOKEN_PREFIX

log = logging.getLogger(__name__)

RIGHTS = ("read", "write", "admin")
TOKENS_MAX = 256
"""Each call is compared with all of them: 256 take 60 us."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


@dataclass(frozen=True)
class Identity:
    """A caller. tenant: None sees all keys. account: under whose name it counts: all tokens of a tenant together."""

    name: str
    rights: frozenset[str]
    tenant: str | None = None
    account: str = field(init=False)

    def __post_init__(self) -> None:
        account = f"caller {self.name}" if self.tenant is None else f"tenant {self.tenant}"
        object.__setattr__(self, "account", account)


LOCAL = Identity("local", frozenset(RIGHTS))
"""Any caller that the socket's permissions allow, where no token is needed."""
NOBODY = Identity("nobody", frozenset(), tenant="")
"""Who has not been identified: no tenant can have this name, so there is no part of the store for it."""


@dataclass(frozen=True)
class Tokens:
    """The entries of a tokens file."""

    by_digest: Mapping[str, Identity] = field(default_factory=dict)
    by_common_name: Mapping[str, Identity] = field(default_factory=dict)
    by_uid: Mapping[int, Identity] = field(default_factory=dict)
    """For the lease socket, where the kernel tells the user id of the connected process."""

    @property
    def tenants(self) -> set[str]:
        """Every tenant with a caller."""
        known = (*self.by_digest.values(), *self.by_common_name.values(), *self.by_uid.values())
        return {identity.tenant for identity in known if identity.tenant is not None}

    def of_token(self, token: str) -> Identity | None:
        """The caller with a token. A wrong token takes as long as a right one."""
        given = digest(token)
        found = None
        for known, identity in self.by_digest.items():
            if hmac.compare_digest(known, given):
                found = identity
        return found

    def of_certificate(self, common_name: str) -> Identity | None:
        """The caller with a client certificate that the TLS handshake has verified."""
        return self.by_common_name.get(common_name)


def digest(token: str) -> str:
    """The digest of a token, as in the file."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def make_token() -> str:
    """A new token: 256 random bits, recognisable by its first letters."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def read_tokens(path: str | Path) -> Tokens:
    """The entries of a file. Raises ConfigError, naming the entry, for any mistake; none is skipped."""
    table = read_toml(path)  # first: a file that is not there gets its own sentence
    check_private(path, "server.tokens", secret=False)
    if everybody_reads(path):
        log.warning("tokens file=%s event=readable_by_everybody effect=%s", path, "names and rights are known to all")
    unknown = sorted(set(table) - {"token", "certificate"})
    if unknown:
        raise ConfigError(f"{path}: unknown table {unknown[0]!r:.40}; known: token, certificate")
    by_digest: dict[str, Identity] = {}
    by_common_name: dict[str, Identity] = {}
    by_uid: dict[int, Identity] = {}
    for number, entry in enumerate(_entries(table, "token", path), start=1):
        where = f"{path}: token {number}"
        known = str(entry.pop("sha256", ""))
        if not _DIGEST.fullmatch(known):
            raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits; `kvstored token` prints them")
        if known in by_digest:
            raise ConfigError(
                f"{where}: the same sha256 as {by_digest[known].name}: each caller has a token of its own"
            )
        uid = entry.pop("uid", None)
        by_digest[known] = _identity(entry, where)
        if uid is not None:
            by_uid[_checked_uid(uid, by_uid, where)] = by_digest[known]
    for number, entry in enumerate(_entries(table, "certificate", path), start=1):
        identity = _identity(entry, f"{path}: certificate {number}")
        by_common_name[identity.name] = identity
    if len(by_digest) > TOKENS_MAX:
        raise ConfigError(f"{path}: at most {TOKENS_MAX} tokens, got {len(by_digest)}")
    return Tokens(by_digest, by_common_name, by_uid)


def _checked_uid(uid: Any, taken: Mapping[int, Identity], where: str) -> int:
    if isinstance(uid, bool) or not isinstance(uid, int) or not 0 <= uid < 1 << 32 or uid in taken:
        raise ConfigError(f"{where}: uid must be a user's number, each in one entry only, got {uid!r:.40}")
    if uid == overflow_uid():
        raise ConfigError(
            f"{where}: uid = {uid} is what the kernel shows for every user that it has no number for (a user of "
            "another container or namespace), so it names nobody; give that worker a token"
        )
    return uid


def _entries(table: Mapping[str, Any], name: str, path: str | Path) -> list[dict[str, Any]]:
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"{path}: write each entry under [[{name}]]")
    return [dict(entry) for entry in found]


def _identity(entry: dict[str, Any], where: str) -> Identity:
    name, rights, tenant = entry.pop("name", ""), entry.pop("rights", []), entry.pop("tenant", None)
    if entry:
        raise ConfigError(f"{where}: unknown key {min(entry)!r:.40}; known: name, sha256, rights, tenant, uid")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: name must be 1 to 64 letters, digits or . _ @ -, got {name!r:.80}")
    if not isinstance(rights, list) or not rights or not set(map(str, rights)) <= set(RIGHTS):
        raise ConfigError(f"{where}: rights must name some of {', '.join(RIGHTS)}, got {rights!r:.80}")
    if tenant is not None and (not isinstance(tenant, str) or not _NAME.fullmatch(tenant)):
        raise ConfigError(f"{where}: tenant must be 1 to 64 letters, digits or . _ @ -, got {tenant!r:.80}")
    if tenant is not None and "admin" in rights:
        # Listings and counters cover all tenants' entries, so an admin right within one tenant would see the others.
        raise ConfigError(f"{where}: the admin right sees every tenant, so it cannot go with tenant = {tenant!r}")
    return Identity(name, frozenset(rights), tenant)
