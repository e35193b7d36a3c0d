"""The text form of keys on the command line: UTF-8 text, or `hex:` and hexadecimal digits. Reversible.

What is shown is quoted where a shell needs it, so that it can be pasted behind a verb.
"""

import shlex
from typing import Any

import click

from kvstore.errors import InvalidEntry
from kvstore.keys import check_key

_HEX = "hex:"
_SHORT_NBYTES = 6
_HASH_NBYTES = 32
"""A chunk's key. A longer binary one has a tenant's prefix."""


def parse_key(text: str) -> bytes:
    """The key with this text form. Raises InvalidEntry."""
    if not text.startswith(_HEX):
        return check_key(text.encode("utf-8", "surrogateescape"))
    try:
        return check_key(bytes.fromhex(text.removeprefix(_HEX)))
    except ValueError:
        raise InvalidEntry(f"not hexadecimal: {text!r:.80}") from None


def key_text(key: bytes) -> str:
    """What `parse_key` takes for a key: text if it is printable and unambiguous, else hex. For JSON."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return _HEX + key.hex()
    return text if text.isprintable() and not text.startswith((_HEX, "-")) else _HEX + key.hex()


def show_key(key: bytes) -> str:
    """The text form as it is typed in a shell: quoted if it has blanks or what else a shell would read."""
    return shlex.quote(key_text(key))


def short_key(key: bytes) -> str:
    """The first 12 hexadecimal digits of a binary key, which --prefix takes; of one with a tenant's prefix the last 12,
    since the first are those of all the tenant's keys. Text as `show_key`.
    """
    text = key_text(key)
    if not text.startswith(_HEX) or len(key) <= _SHORT_NBYTES:
        return shlex.quote(text)
    if len(key) > _HASH_NBYTES:
        return f"{_HEX}..{key[-_SHORT_NBYTES:].hex()}"
    return f"{_HEX}{key[:_SHORT_NBYTES].hex()}"


class KeyType(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    """A key as a command line argument."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The key, or a usage error."""
        if isinstance(value, bytes):
            return value
        try:
            return parse_key(value)
        except InvalidEntry as error:
            self.fail(str(error), param, ctx)


KEY = KeyType()
