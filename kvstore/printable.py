"""Text that others chose, made safe to print: on a terminal, in a log line, on a page. Imports nothing."""


def printable(text: object) -> str:
    """The text with what is not printable escaped: controls, ANSI sequences, newlines, bidi marks, surrogates.

    A name must not colour the operator's terminal, end a log line and begin another, or turn the text after it round.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
