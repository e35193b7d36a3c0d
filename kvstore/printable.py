"""Untrusted text made safe to print: on a terminal, in a log line, on a page; and sizes for people. Imports nothing."""

_SIZE_STEP = 1024
_KEY_SHOWN = 24


def printable(text: object) -> str:
    """The text with unprintable characters escaped: controls, ANSI sequences, newlines, bidi marks, surrogates.

    A name must not change an operator's terminal, forge a log line, or reverse the text after it.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < _SIZE_STEP:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= _SIZE_STEP
    return f"{nbytes:.1f} TiB"


def short_key(key: bytes) -> str:
    """A key for a repr: as Python writes bytes if it is text, else hexadecimal digits; a long one is cut."""
    text = repr(key) if key.isascii() and key.decode("ascii").isprintable() else key.hex()
    return text if len(text) <= _KEY_SHOWN else f"{text[: _KEY_SHOWN - 8]}.. ({len(key)} bytes)"
