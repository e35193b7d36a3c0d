"""Changes thought of by hand in what keeps one caller from stopping another. All have to be noticed."""

ABUSE = (
    (
        "daemon/kvstored/access/admission.py",
        '"health": Lane(HEALTH_MAX, STRANGER_MAX, now)',
        '"health": Lane(HEALTH_MAX, HEALTH_MAX, now)',
        "one address takes all places of health checks",
    ),
    (
        "daemon/kvstored/access/admission.py",
        '        return "calls", "admin"',
        '        return ("calls",)',
        "no place is left for the operator",
    ),
    (
        "daemon/kvstored/access/admission.py",
        "            if len(most) > len(own):",
        "            if False:",
        "who came first keeps all places",
    ),
    (
        "daemon/kvstored/access/interceptor.py",
        "asyncio.timeout(within_s)",
        "asyncio.timeout(None)",
        "a message that never comes holds its place",
    ),
    (
        "daemon/kvstored/doors/lease_server.py",
        "                    self._failed(error)\n                else:",
        "                    return\n                else:",
        "one failure ends the accepting thread",
    ),
    (
        "daemon/kvstored/doors/lease_server.py",
        "            if turn == self._accept:\n                self._close_door()",
        "            pass",
        "clients wait at a door that nobody opens",
    ),
    (
        "daemon/kvstored/doors/lease_server.py",
        "            self._turn_one_away()",
        "            pass",
        "out of descriptors, clients wait instead of taking the stream",
    ),
    (
        "daemon/kvstored/doors/lease_connection.py",
        "        if not self.is_current():\n            raise Revoked",
        "        if False:\n            raise Revoked",
        "a revoked caller goes on",
    ),
    (
        "client/kvstored_client/wire/trust.py",
        "        if uid not in self.users:",
        "        if False:",
        "tensors go to whoever listens",
    ),
    (
        "client/kvstored_client/wire/trust.py",
        "    if found.st_uid not in users:\n        if not made_by_root:",
        "    if found.st_uid not in users:\n        if False:",
        "another user's directory is used",
    ),
    (
        "kvstore/ownership.py",
        "flags | os.O_NOFOLLOW | os.O_NONBLOCK",
        "flags | os.O_NONBLOCK",
        "a lock that is a link truncates a file",
    ),
    (
        "daemon/kvstored/doors/lease_connection.py",
        "        if sum(map(len, self._fds.values())) + len(segment.descriptors) > SEGMENTS_MAX:",
        "        if False:",
        "more descriptors in a packet than the kernel hands over",
    ),
    (
        "client/kvstored_client/shm/connection.py",
        "if not nbytes or flags & _CUT_OFF:",
        "if not nbytes:",
        "descriptors that the kernel dropped are not missed",
    ),
    (
        "kvstore/metadata/deadlines.py",
        "                return\n            self.unwatch(meta)\n        if deadline",
        "                return\n        if deadline",
        "deadlines that move earlier pile up",
    ),
    (
        "daemon/kvstored/telemetry/metrics_port.py",
        "if since <= due]",
        "if False]",
        "dripping connections hold the metrics port",
    ),
    (
        "daemon/kvstored/telemetry/metrics_port.py",
        "            if len(self._open) >= CONNECTIONS_MAX:",
        "            if False:",
        "connections to the metrics port without end",
    ),
    (
        "daemon/kvstored/doors/lending.py",
        "        if asking.ingest_nbytes + nbytes > self.connection_max_nbytes:",
        "        if False:",
        "one connection takes all memory for puts",
    ),
    (
        "daemon/kvstored/doors/lending.py",
        "        if leases >= LEASES_MAX or asking.held >= HELD_MAX:",
        "        if False:",
        "leases of one connection without end",
    ),
    (
        "kvstore/disk/record_log.py",
        "if not moved and isinstance(error, UnknownSeal | TierUnavailable | OSError):",
        "if False:",
        "an errno deletes what it could not read",
    ),
    (
        "daemon/kvstored/host/become.py",
        "        os.setresuid(uid, uid, uid)",
        "        pass",
        "an offline verb leaves root's files in the daemon's directory",
    ),
    (
        "daemon/kvstored/access/records.py",
        "            _audit(method, identity, peer, request, code)",
        "            pass",
        "a deletion leaves no line",
    ),
    (
        "kvstore/ownership.py",
        "        if mode & bit:",
        "        if False:",
        "secrets that everybody reads, callers that everybody writes",
    ),
    (
        "client/kvstored_client/wire/trust.py",
        '_UCRED = struct.Struct("iII")',
        '_UCRED = struct.Struct("iii")',
        "users of high numbers match nobody",
    ),
    (
        "kvstore/disk/writer.py",
        "            if not self._rows.readable:\n                self._rows.reopen()\n",
        "",
        "an index that could not be opened once is never opened again",
    ),
)
"""As `prepared.PREPARED`."""
