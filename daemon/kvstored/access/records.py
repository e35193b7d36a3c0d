"""What is written down of a call when it ends, through either door: its time, its span, a refusal, an audit line.

A verb that deletes, pins or administers leaves a line in the audit log, and so does whatever is refused. A refusal says
nothing about the entries held. Any thread.
"""

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from kvstore.errors import InvalidEntry
from kvstored.access.admission import peer_group
from kvstored.access.refusals import Lines
from kvstored.access.tokens import NOBODY, Identity
from kvstored.telemetry.metrics import Meter
from kvstored.telemetry.spans import Metadata, Spans
from kvstored_client.wire.requests import keys_named

audit = logging.getLogger("kvstored.audit")

_REFUSED = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})
_LOOKING = frozenset({"Admin/Stats", "Admin/List", "Admin/Inspect", "Admin/Settings"})
"""Admin verbs that change nothing: no audit line for each refresh of a screen."""
_KEYLESS = frozenset({"Admin/CheckShared", "Admin/Configure", "Admin/FlushShared", "Admin/Snapshot"})
"""Verbs that change something and name no keys: what they changed has a line of its own (`live`, `calls.snapshot`)."""
AUDITED = frozenset({"Cache/Delete", "Cache/Pin", "Lease/delete", "Lease/pin"})
"""Verbs beside the admin's that change what others see. Not Put: it is the data path, and each put has its counters."""
REFUSED_LINES = 16
"""Of a caller in a minute, by method and status: a line for each refusal would hide all others."""


class Records:
    """The records of calls.

    well: by method, what takes the seconds of a call that ended well, where nothing else is written down of one; there
    once one has `ended`. A door looks there first.
    """

    def __init__(self, meter: Meter, spans: Spans) -> None:
        self._meter = meter
        self._spans = spans
        self._lines = Lines(REFUSED_LINES)
        self.traced = spans.wanted
        self.well: dict[str, Callable[[float], None]] = {}

    def ended(
        self,
        method: str,
        code: str,
        began: float,
        identity: Identity,
        peer: str,
        request: bytes = b"",
        metadata: Metadata = (),
    ) -> None:
        """Record the end of a call. began: time.perf_counter() at its start. request: has the keys of an admin verb."""
        seconds = time.perf_counter() - began
        observe = self._meter.observer(method, code)
        observe(seconds)
        if self.traced:
            self._spans.record(method, code, seconds, metadata, _about(method, identity, request))
        if code in _REFUSED:
            self._meter.refuse(code)
            caller = peer_group(peer) if identity is NOBODY else identity.account
            left_out = self._lines.left_out((caller, method, code))
            if left_out is not None:
                _audit(method, identity, peer, b"", code, f" left_out={left_out}" if left_out else "")
        elif method in AUDITED or (method.startswith("Admin/") and method not in _LOOKING):
            _audit(method, identity, peer, request, code)
        elif code == "OK" and not self.traced:
            self.well[method] = observe


def _about(method: str, identity: Identity, request: bytes) -> dict[str, str | int]:
    """The attributes of a call's span: the caller and the number of keys, never the keys."""
    attributes: dict[str, str | int] = {"keys": _keys(method, request)[0]} if request else {}
    if identity is not NOBODY:
        attributes["caller"] = identity.name
        if identity.tenant is not None:
            attributes["tenant"] = identity.tenant
    return attributes


def _keys(method: str, request: bytes) -> tuple[int, bytes]:
    """How many keys, and the first."""
    if method in _KEYLESS:
        return 0, b""
    try:
        return keys_named(request)
    except (DecodeError, InvalidEntry):
        return 0, b""


def _audit(method: str, identity: Identity, peer: str, request: bytes, code: str, more: str = "") -> None:
    count, first = _keys(method, request)
    audit.info(
        "admin verb=%s who=%s peer=%s keys=%d first=%s result=%s%s",
        method, identity.name, peer, count,
        first.hex()[:64] or "-", code, more,
    )  # fmt: skip
