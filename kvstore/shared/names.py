"""What an object is called, and what proves that a host with the secret wrote its head.

    alias = HMAC-SHA256(secret, epoch | entry key): 32 bytes, the key that the record inside the object has
    name  = "kvstored:1:" and the alias in hexadecimal

All hosts have one secret, so they find each other's objects. Neither a name nor an object tells an entry's key, or
anything that could be compared with a guessed prompt: the record is written under its alias. The epoch is that of the
whole store: raised by a flush, it makes every older object unreachable. No hash tags: objects spread over all nodes.
Pure. Any thread.
"""

import hashlib
import hmac
import re
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.keys import NAMESPACE_MAX_NBYTES, Key
from kvstore.ownership import read_private

VERSION = 1
PREFIX = f"kvstored:{VERSION}:"
"""What every name begins with: a server's access rules need it."""
TAG_NBYTES = 16
MAC_NBYTES = 32
_SECRET = re.compile(r"[0-9a-fA-F]{64}")


def read_secret(path: str | Path) -> bytes:
    """The secret of all hosts: 64 hexadecimal digits in a file. Raises ConfigError."""
    text = read_private(path, "store.shared.secret_file").strip()
    if not _SECRET.fullmatch(text):
        raise ConfigError(
            f"store.shared.secret_file: {path} must hold 64 hexadecimal digits, the same on all hosts; "
            "`openssl rand -hex 32` makes them"
        )
    return bytes.fromhex(text)


class Names:
    """Everything that is derived from the secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.epochs = PREFIX + self._mac("epochs").hex()

    def alias(self, key: bytes, epoch: int) -> Key:
        """What an entry's key is outside this host."""
        return Key(self._mac("object", epoch.to_bytes(8, "little"), key))

    def tag(self, namespace: str) -> bytes:
        """What a namespace is called in a head and in the table of epochs."""
        return self._mac("namespace", namespace.encode())[:TAG_NBYTES]

    def head_mac(self, alias: bytes, head: bytes) -> bytes:
        """Proves that a head was made for this object by a host that has the secret."""
        return self._mac("head", alias, head)

    def epochs_mac(self, head: bytes) -> bytes:
        """The same for the table of epochs."""
        return self._mac("table", head)

    def masked(self, alias: bytes, text: bytes) -> bytes:
        """A namespace's name as an object has it, and back: at most 96 bytes."""
        assert len(text) <= NAMESPACE_MAX_NBYTES
        blocks = (self._mac("mask", bytes([i]), alias) for i in range(NAMESPACE_MAX_NBYTES // MAC_NBYTES))
        return bytes(a ^ b for a, b in zip(text, b"".join(blocks), strict=False))

    def _mac(self, use: str, *parts: bytes) -> bytes:
        # Every part but the last has a fixed length, so no two lists of parts are one message.
        return hmac.digest(
            self._secret, f"kvstored shared {use} v{VERSION}\0".encode() + b"".join(parts), hashlib.sha256
        )


def name_of(alias: bytes) -> str:
    """The name of an object."""
    return PREFIX + alias.hex()
