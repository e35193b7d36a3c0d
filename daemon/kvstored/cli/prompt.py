"""Reads prompts from files: token ids, and the identity of the namespace that they were put under."""

import json
from pathlib import Path
from typing import Any

from kvstore.errors import InvalidEntry
from kvstore.keys import Identity

TOKENS_FILE_MAX_NBYTES = 64 << 20
"""Ten million tokens; a longer file is not a prompt."""


def read_token_ids(path: Path) -> list[int]:
    """The token ids in a file: a JSON list, a JSON object with "token_ids" or "input_ids", or numbers between blanks.

    Raises InvalidEntry.
    """
    if path.stat().st_size > TOKENS_FILE_MAX_NBYTES:
        raise InvalidEntry(f"{path} has {path.stat().st_size} bytes, at most {TOKENS_FILE_MAX_NBYTES} are read")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        found = json.loads(text) if text[:1] in ("[", "{") else [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InvalidEntry(f"{path}: not token ids: {error!s:.120}") from None
    if isinstance(found, dict):
        found = found.get("token_ids", found.get("input_ids"))
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]  # a batch of one, as tokenizers return it
    if not isinstance(found, list) or not found or not all(type(i) is int and 0 <= i < 1 << 32 for i in found):
        raise InvalidEntry(f"{path}: expected token ids, whole numbers in 0..2**32-1, in a list or apart by blanks")
    return found


def read_identity(text: str) -> Identity:
    """An identity from JSON, or from a file of JSON. Raises InvalidEntry, which names the field."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidEntry(
                f"--identity is JSON or a file of it; cannot read {text!r:.80}: {error.strerror}"
            ) from None
    try:
        fields: Any = json.loads(text)
    except ValueError as error:
        raise InvalidEntry(f"--identity is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidEntry(f"--identity is an object of the fields of Identity, got {type(fields).__name__}")
    try:
        return Identity(**fields)
    except TypeError as error:
        raise InvalidEntry(f"--identity: {str(error).removeprefix('Identity.__init__() ')}") from None
