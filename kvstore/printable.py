"""Untrusted text made safe to print: on a terminal, in a log line, on a page. Imports nothing."""


def printable(text: object) -> str:
    """The text with unprintable characters escaped: controls, ANSI sequences, newlines, bidi marks, surrogates.

    A name must not change an operator's terminal, forge a log line, or reverse the text after it.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
