"""The text form of keys on the command line: UTF-8 text, or `hex:` and hexadecimal digits. Reversible."""

from typing import Any

import click

from kvstore.errors import InvalidEntry
from kvstore.keys import check_key

_HEX = "hex:"


def parse_key(text: str) -> bytes:
    """The key with this text form. Raises InvalidEntry."""
    if not text.startswith(_HEX):
        return check_key(text.encode("utf-8", "surrogateescape"))
    try:
        return check_key(bytes.fromhex(text.removeprefix(_HEX)))
    except ValueError:
        raise InvalidEntry(f"not hexadecimal: {text!r:.80}") from None


def show_key(key: bytes) -> str:
    """The text form of a key: text if it is printable, has no blanks and is unambiguous, else hex."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return _HEX + key.hex()
    plain = text.isprintable() and not any(c.isspace() for c in text) and not text.startswith((_HEX, "-"))
    return text if plain else _HEX + key.hex()


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
