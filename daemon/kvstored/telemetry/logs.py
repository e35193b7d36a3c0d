"""Log lines: text for a terminal, one JSON object per line for the journal, never a secret.

A message is "event key=value key=value"; in JSON each pair is a field of its own. Under systemd each line begins with
its priority, as journald reads it (<6> for INFO), so `journalctl -p err` works.
No code logs a secret; as a second protection the filter here replaces anything that looks like a token, in every line
and traceback.
"""

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping

from kvstore.printable import printable

TOKEN_PREFIX = "kvd_"  # noqa: S105 - what every token begins with, so that it can be recognised where it must not be
_SECRET = re.compile(TOKEN_PREFIX + r"[A-Za-z0-9_-]{8,}|(?i:bearer)\s+\S+")
_PAIR = re.compile(r"(?:^|\s)([a-z_]+)=(\S+)")
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def redact(text: str) -> str:
    """The text without anything that looks like a token."""
    return _SECRET.sub("[redacted]", text)


class TextFormatter(logging.Formatter):
    """LEVEL logger message, for people."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        text = redact(super().format(record))
        if text.isprintable():
            return text
        # A message is one line, whatever names it contains; a traceback after it has lines of its own.
        message = redact(record.getMessage())
        return "\n".join(map(printable, text.replace(message, printable(message), 1).split("\n")))


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the message's pairs as `fields`, and a traceback if any."""

    def __init__(self, *, priority: bool = False) -> None:
        super().__init__()
        self._priority = priority

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        message = printable(redact(record.getMessage()))
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, object] = {
            "time": stamp,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        fields = dict(_PAIR.findall(message))
        if fields:
            line["fields"] = fields
        if record.exc_info:
            lines = redact("".join(traceback.format_exception(*record.exc_info))).split("\n")
            line["traceback"] = "\n".join(map(printable, lines))
        text = json.dumps(line, ensure_ascii=False)
        return f"<{_priority(record.levelno)}>{text}" if self._priority else text


def _priority(level: int) -> int:
    return next(number for floor, number in _PRIORITIES if level >= floor)


def _is_journal(stream: str) -> bool:
    """Whether standard error has that device and inode: systemd sets the variable if any stream is the journal."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def set_up(log_format: str = "auto", level: str = "info", environ: Mapping[str, str] = os.environ) -> None:
    """Send all logs to standard error. auto: JSON under systemd, text elsewhere."""
    to_journal = _is_journal(environ.get("JOURNAL_STREAM", ""))
    as_json = log_format == "json" or (log_format == "auto" and to_journal)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(priority=to_journal) if as_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
