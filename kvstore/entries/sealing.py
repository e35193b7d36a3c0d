"""Data sections encrypted at rest: AES-256-GCM under keys from files, by namespace. Needs `cryptography` when used.

    sealed = key id (8 bytes) | salt (24 bytes) | pieces of 64 MiB, each ciphertext and 16 bytes of tag

Each record has a key of its own, HMAC-SHA256 of the file's key over the salt, so the nonces count the pieces of one
record, and a file's key may seal any number of records. The associated data binds the sealed data to its entry's key
and to the record's head. Invariant: data that does not open is a RecordCorrupt, which is a miss; no part is returned.
Leaves out: the head of a record and its row in the index, with the entry's key, shapes and namespace, stay in clear.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore.errors import ConfigError, RecordCorrupt, UnknownSeal
from kvstore.ownership import read_private

log = logging.getLogger(__name__)

EVERYTHING = "*"
"""The name whose key seals the entries that no other name covers."""
ID_NBYTES = 8
SALT_NBYTES = 24
HEAD_NBYTES = ID_NBYTES + SALT_NBYTES
TAG_NBYTES = 16
PIECE_NBYTES = 64 << 20
"""AES-GCM takes at most 2 GiB at once; a smaller piece needs less memory for its second copy while encrypting."""
_KEY = re.compile(r"[0-9a-fA-F]{64}")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def sealed_nbytes(nbytes: int) -> int:
    """Bytes of the sealed form of `nbytes` bytes."""
    return nbytes + HEAD_NBYTES + TAG_NBYTES * max(1, -(-nbytes // PIECE_NBYTES))


class Key:
    """One key of a file."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = hashlib.sha256(b"kvstored key id v1\0" + secret).digest()[:ID_NBYTES]

    def seal(self, data: Sequence[Bytes], bound: bytes) -> list[Bytes]:
        """The sealed form of a data section in buffers. bound: associated data, needed again to open it."""
        salt = secrets.token_bytes(SALT_NBYTES)
        cipher = self._cipher(salt)
        sealed = [np.frombuffer(self.id + salt, np.uint8)]
        for number, piece in enumerate(_pieces(data)):
            text = cipher.encrypt(_nonce(number), piece, _numbered(bound, number))
            sealed.append(np.frombuffer(text, np.uint8))
        return sealed

    def open(self, sealed: Bytes, bound: bytes) -> Bytes:
        """The opened data, in new memory, aligned for every dtype. Raises RecordCorrupt."""
        from cryptography.exceptions import InvalidTag

        salt, body = sealed[ID_NBYTES:HEAD_NBYTES].tobytes(), sealed[HEAD_NBYTES:]
        cipher = self._cipher(salt)
        step = PIECE_NBYTES + TAG_NBYTES
        count = max(1, -(-body.size // step))
        data = torch.empty(max(0, body.size - count * TAG_NBYTES), dtype=torch.uint8, device="cpu").numpy()
        try:
            for number in range(count):
                piece = body[number * step : (number + 1) * step]
                text = cipher.decrypt(_nonce(number), piece.data, _numbered(bound, number))
                np.copyto(data[number * PIECE_NBYTES :][: len(text)], np.frombuffer(text, np.uint8))
        except (InvalidTag, ValueError):  # or pieces that are not as long as those before them are
            raise RecordCorrupt("the data is not what was sealed under this key") from None
        return data

    def _cipher(self, salt: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(hmac.new(self._secret, b"kvstored record v1\0" + salt, hashlib.sha256).digest())


class Seals:
    """The keys of a store. Any thread."""

    def __init__(self, files: Mapping[str, str], setting: str = "store.cold.key_files") -> None:
        """files: by namespace, tenant, TENANT/NAMESPACE or "*", a file of keys. setting: for messages.

        Raises ConfigError.
        """
        if files:
            _check_installed(setting)
        keys = {name: read_keys(path, setting) for name, path in files.items()}
        self._setting = setting
        self._sealing = {name: found[0] for name, found in keys.items()}
        self._opening = {key.id: key for found in keys.values() for key in found}
        self._missing: set[bytes] = set()

    def sealing(self, names: Sequence[str]) -> Key | None:
        """The key for an entry with these names, the most specific name first; None: it stays in clear."""
        found = (self._sealing[name] for name in (*names, EVERYTHING) if name and name in self._sealing)
        return next(found, None)

    def of_owner(self, tenant: str, namespace: str) -> Key | None:
        """The key for an entry of this owner ("": none); None: it stays in clear."""
        if not self._sealing:
            return None
        both = "/".join(part for part in (tenant, namespace) if part)
        return self.sealing((both, namespace, namespace.rpartition("@")[0], tenant))

    def open(self, sealed: Bytes, bound: bytes) -> Bytes:
        """The opened data, sealed under any of these keys. Raises UnknownSeal, or RecordCorrupt if it does not open."""
        if sealed.size < HEAD_NBYTES + TAG_NBYTES:
            raise RecordCorrupt(f"sealed data of {sealed.size} bytes")
        name = sealed[:ID_NBYTES].tobytes()
        key = self._opening.get(name)
        if key is None:
            if name not in self._missing:
                self._missing.add(name)
                log.warning("records are sealed under a key of no file in %s id=%s", self._setting, name.hex())
            raise UnknownSeal(f"sealed under key {name.hex()}, which is in no file of {self._setting}")
        return key.open(sealed, bound)


NO_SEALS = Seals({})


def read_keys(path: str | Path, setting: str = "store.cold.key_files") -> list[Key]:
    """The keys of a file, 64 hexadecimal digits a line: the first one seals, all of them open. Raises ConfigError."""
    lines = read_private(path, setting).split()
    if not lines or not all(map(_KEY.fullmatch, lines)):
        raise ConfigError(
            f"{setting}: {path} must hold 64 hexadecimal digits a line, the newest key first; "
            "`openssl rand -hex 32` makes one"
        )
    return [Key(bytes.fromhex(line)) for line in lines]


@cache
def _check_installed(setting: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(f"{setting} needs cryptography: pip install 'kvstored[sealed]'") from None


def _pieces(data: Sequence[Bytes]) -> Iterator[Bytes]:
    """The buffers as contiguous pieces of PIECE_NBYTES, the last one shorter; no data gives one empty piece."""
    left = list(data)
    total = sum(part.size for part in left)
    for start in range(0, max(total, 1), PIECE_NBYTES):
        piece = np.empty(min(PIECE_NBYTES, total - start), np.uint8)
        at = 0
        while at < piece.size:
            part = left[0][: piece.size - at]
            piece[at : at + part.size] = part
            at += part.size
            left[0] = left[0][part.size :]
            if not left[0].size:
                left.pop(0)
        yield piece


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _numbered(bound: bytes, number: int) -> bytes:
    # The number of pieces is bound through the data size in the record's head.
    return number.to_bytes(4, "big") + bound
