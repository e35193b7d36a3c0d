"""One client of the lease socket: tensors in shared memory. The proto describes the exchange.

One thread a connection: a call is answered in about 50 us, where a hop to another thread would double it. What a client
holds (leases, ingest segments) hangs on its connection and goes with it, however it ends; a lease also ends by age.
"""

import logging
import mmap
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.entries.entry import ArrivingTensors
from kvstore.errors import InvalidEntry, KvstoreError
from kvstore.keys import CHUNK_TOKENS_MAX, CheckedKeys
from kvstore.residency.read_path import NOTHING, Plan
from kvstore.shm.arena import Handed, Segment
from kvstore.view import StoreView
from kvstored.access.admission import Refusal
from kvstored.access.interceptor import RIGHT_OF, Access
from kvstored.access.records import AUDITED
from kvstored.access.shares import CONTENDED_S, charged
from kvstored.calls.gets import Reading, on_device
from kvstored.calls.puts import Incoming, incoming, lying, put_ready
from kvstored.calls.replies import SharedMemoryReply, new_reply
from kvstored.calls.verbs import Verbs
from kvstored.doors.busy_wait import Waiting
from kvstored.doors.lease_packets import (
    NUMBER_NBYTES,
    NUMBER_TAG,
    MoreSegments,
    Revoked,
    UseStream,
    number_of,
    numbered,
    refusal,
    told,
)
from kvstored.doors.lease_shared import Shared
from kvstored.doors.lending import HELD_FREE
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes
from kvstored_client.wire.messages import read_lookup
from kvstored_client.wire.trust import peer_uid

logger = logging.getLogger(__name__)

PACKET_MAX_NBYTES = 256 << 10
INGEST_MIN_NBYTES = 16 << 20
VERBS = {
    "get": "Cache/Get",
    "put": "Cache/Put",
    "match": "Cache/Match",
    "touch": "Cache/Touch",
    "delete": "Cache/Delete",
    "pin": "Cache/Pin",
}
"""Fields of a LeaseCall, and the method each of them is: rights are the method's."""
_CHARGED = frozenset(VERBS) - {"get", "put"}
"""Verbs that may name thousands of keys and write a line a call; gets and puts are bytes, copied beside others."""
SEEN_S = CONTENDED_S / 4
"""How often a connection says that its caller is active: callers compete that were within `CONTENDED_S`."""
LEASE_CALL_S = 0.00005
"""Of the interpreter for a call, beside its verb."""
_METHODS = {verb: f"Lease/{verb}" for verb in (*VERBS, "ingest")}
"""By what name a call is recorded."""
_MORE = "ABORTED"
"""The status of a call that the client is to repeat; no error of the engine's has it."""
SEND_TIMEOUT_S = 5.0
SEGMENTS_MAX = 64
"""Descriptors in one packet: for more a client has no room, and the kernel takes 253."""
_GIVEN = struct.Struct("<BQBdBQ")
_LEASE_TAG, _NOW_TAG = 3 << 3 | 1, 13 << 3 | 1  # fields of a LeaseReply of 8 bytes

_NOTHING = np.empty(0, dtype=np.uint8)
_KEPT_REPLY, _SEGMENT, _SERIALIZED = attrgetter("kept_reply"), attrgetter("segment"), attrgetter("serialized")


class Connection:
    """One client: its leases, its ingest segments, and which segments it was handed."""

    def __init__(self, sock: socket.socket, shared: Shared) -> None:
        self._sock = sock
        self._shared = shared
        self.uid = peer_uid(sock)
        self._access, self._records = shared.access, shared.records
        self._tokens = shared.access.tokens
        identity = shared.access.of_user(self.uid)
        if identity is None:
            raise PermissionError(f"user {self.uid} has no entry in the tokens file")
        self._identity = identity
        self._rights = frozenset(verb for verb, method in VERBS.items() if RIGHT_OF[method] in identity.rights)
        self._account = identity.account
        self._peer = f"lease:{self.uid}"
        self._owner = shared.owners.of(self.uid, identity)
        self._store: StoreView = shared.views[identity.tenant]
        self._shares = self._store.shares
        self._verbs = Verbs(self._store, shared.verbs.epoch)
        self._on_device = on_device(self._store)
        # A GPU's memory cannot be sealed as the host's is: who has it could write to it, so only who may put gets it.
        self._may_map = bool(shared.device) and "put" in self._rights
        self._leases: dict[int, tuple[float, Sequence[Any]]] = {}
        self._holding = threading.Lock()
        self.held = 0
        self.ingest_nbytes = 0
        self._next = 1
        self._number = 0
        self._handed: set[Handed] = set()
        self._ingest: dict[int, Segment] = {}
        self._fds: dict[Handed, tuple[int, ...]] = {}
        self._arriving: list[ArrivingTensors] = []
        self._wait_s = 0.0
        self._seen_at = -inf
        self._room = partial(shared.arena.empty, owner=self._owner)
        self._encoded_room = partial(shared.encoded.empty, owner=self._owner)
        always = pb.LeaseReply(complete=True, boot_epoch=self._verbs.epoch, lease_max_s=shared.lease_max_s)
        self._serialized_always = always.SerializeToString()

    @property
    def leases(self) -> int:
        """Leases held now."""
        return len(self._leases)

    def run(self) -> None:
        """Answer calls until the client is gone."""
        # Mapped, not allocated: a page is there once a packet has reached it, and most packets are short.
        packet = memoryview(mmap.mmap(-1, PACKET_MAX_NBYTES))
        waiting = Waiting(self._sock, self._shared.callers)
        try:
            while nbytes := waiting.receive(packet):
                reply = self.answer(bytes(packet[:nbytes]))
                if reply is not None:
                    self._send(reply)
                    if self._arriving:
                        self._copy_arriving()
                    self._shared.store.settle()
                if self._wait_s:
                    self._wait_s, wait_s = 0.0, self._wait_s
                    time.sleep(wait_s)  # this thread serves nobody else
        except OSError as error:
            logger.debug("lease connection ended error=%s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything the client held."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._copy_arriving()  # the client is gone, what it put stays
        self._drop(list(self._leases))
        for segment in self._ingest.values():
            segment.close()
        self._shared.lending.ingest.give_back(self.ingest_nbytes)
        self.ingest_nbytes = 0
        self._ingest.clear()

    def hang_up(self) -> None:
        """End the connection from outside its thread; a call under way still gets its answer."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def is_current(self) -> bool:
        """Whether this client's user is still the caller that it was: the tokens may have been replaced."""
        tokens = self._access.tokens
        if tokens is self._tokens:
            return True
        if self._access.of_user(self.uid) != self._identity:
            return False
        self._tokens = tokens
        return True

    def expire(self, now: float) -> None:
        """Drop leases over their age: a client that was stopped must not hold memory for ever."""
        old = [number for number, (until, _) in list(self._leases.items()) if until <= now]
        if old:
            self._shared.aged += len(old)  # one thread watches ages
            self._drop(old)

    def _drop(self, numbers: Iterable[int]) -> None:
        with self._holding:  # from two threads
            for number in numbers:
                self.held -= len(self._leases.pop(number, (0, ()))[1])

    def _send(self, data: bytes) -> None:
        if self._fds:
            fds, self._fds = self._fds, {}
            socket.send_fds(self._sock, [data], [fd for of_segment in fds.values() for fd in of_segment])
        else:
            self._sock.send(data)

    def answer(self, packet: bytes) -> bytes | None:
        """The reply to one packet; None for one that only releases leases."""
        began = time.perf_counter()
        if not self.is_current():
            raise Revoked(f"user {self.uid} is no longer {self._identity.name}")
        try:
            call = pb.LeaseCall.FromString(packet)
        except DecodeError as error:
            return numbered(refusal("InvalidEntry", str(error)), number_of(packet))
        self._number = call.number
        if call.release:
            self._drop(call.release)
            if not call.ingest_nbytes and not any(map(call.HasField, VERBS)):
                return None
        verb = next(filter(call.HasField, VERBS), "ingest")
        code, reply = self._charged(verb, call, began)
        method = _METHODS[verb]
        observe = self._records.well.get(method) if code == "OK" else None
        if observe is not None:
            observe(time.perf_counter() - began)
        else:
            asked = getattr(call, verb).SerializeToString() if method in AUDITED else b""
            self._records.ended(method, code, began, self._identity, self._peer, asked)
        if len(reply) > PACKET_MAX_NBYTES - NUMBER_NBYTES:
            reply = self._too_large(verb, reply)
        elif code == "OK":
            return reply  # it has its number
        elif code == _MORE:
            return numbered(reply, call.number)
        # Another refusal names no segments: what this call was to hand over goes with the next one that needs it.
        self._handed.difference_update(self._fds)
        self._fds.clear()
        return numbered(reply, call.number)

    def _charged(self, verb: str, call: pb.LeaseCall, now: float) -> tuple[str, bytes]:
        """The outcome; of a verb in Python also how long its caller's next call has to wait (`access.shares`)."""
        if verb not in _CHARGED:
            if now - self._seen_at > SEEN_S:
                self._seen_at = now
                self._shared.shares.seen(self._account)
            return self._outcome(verb, call)
        return charged(self._spent, self._outcome, verb, call)

    def _spent(self, seconds: float) -> None:
        self._wait_s = self._shared.shares.charge(self._account, LEASE_CALL_S + seconds)

    def _outcome(self, verb: str, call: pb.LeaseCall) -> tuple[str, bytes]:
        """The call's status, by gRPC's name, and its reply."""
        try:
            return "OK", self._allowed(verb, call)
        except Refusal as refused:
            return refused.code.name, refusal("PermissionDenied", str(refused))
        except MoreSegments as error:
            handed = [told(segment) for segment in self._fds]
            reply = pb.LeaseReply(error=pb.LeaseError(kind="UseStream", message=str(error)), segments=handed)
            return _MORE, reply.SerializeToString()
        except UseStream as error:
            return "UNIMPLEMENTED", refusal("UseStream", str(error))
        except KvstoreError as error:
            kinds = (kind.__name__ for kind in type(error).__mro__)
            name = next(kind for kind in kinds if hasattr(errors, kind))
            return error.grpc_code, refusal(name, str(error))
        except OSError:
            raise
        except Exception:
            logger.exception("lease call failed")
            return "INTERNAL", refusal("KvstoreError", "internal error, see the daemon's log")

    def _too_large(self, verb: str, reply: bytes) -> bytes:
        if verb == "get":  # it holds the newest lease
            self._drop([self._next - 1])
        return refusal("UseStream", f"a reply of {len(reply)} bytes is over {PACKET_MAX_NBYTES}")

    def _allowed(self, verb: str, call: pb.LeaseCall) -> bytes:
        if verb == "ingest":
            if not call.ingest_nbytes:
                raise InvalidEntry("an empty call")
            if "put" not in self._rights:
                Access.check(self._identity, VERBS["put"])
            return self._open_ingest(call.ingest_nbytes)
        if verb not in self._rights:
            Access.check(self._identity, VERBS[verb])  # which says why not
        asked = getattr(call, verb)
        if verb == "get":
            return self._get(asked)
        if verb == "put":
            return pb.LeaseReply(put=self._put(asked), number=self._number).SerializeToString()
        return pb.LeaseReply(number=self._number, **{verb: getattr(self._verbs, verb)(asked)}).SerializeToString()

    def _get(self, asked: pb.GetRequest) -> bytes:
        shared, keys, tails = self._shared, CheckedKeys(asked.keys), CheckedKeys(asked.tails)
        if len(tails) > CHUNK_TOKENS_MAX:
            raise InvalidEntry(f"a get names at most {CHUNK_TOKENS_MAX} tails, got {len(tails)}")
        if self.held >= HELD_FREE and not shared.lending.may_hold(len(self._leases), self, shared.connections):
            raise UseStream(f"{len(self._leases)} leases of {self.held} entries are held: release some")
        lookup = read_lookup(asked) if asked.HasField("lookup") else None
        # On this client's own thread: nobody else waits for the shared store.
        if self._shares and self._store.ends_here(keys):
            self._store.bring(keys, leading=asked.leading, lookup=lookup)
        # What hot holds is read where it lies; on a device by a client that maps it.
        in_place = not self._on_device or (self._may_map and asked.device == shared.device)
        reading: Reading | None = None  # a hot answer, the commonest, needs none

        def begun() -> Reading:
            maps = self._owner if self._on_device and in_place else None
            return Reading(self._store, shared.budget, asked, keys, lookup=lookup, room=self._room, maps=maps)

        def charge(plan: Plan) -> None:
            nonlocal reading
            if not (plan.hot and in_place):
                charged = begun()
                charged.charge(plan)
                reading = charged  # not one that was refused: another plan may follow it

        try:
            plan = self._store.plan(
                keys, leading=asked.leading, accept=frozenset(asked.accept) if asked.accept else NOTHING,
                from_nbytes=asked.accept_from_nbytes, at_most_nbytes=shared.budget.lot_nbytes,
                whole_if_hot=in_place, charge=charge, count_later=True, lookup=lookup,
            )  # fmt: skip
            looked = tails and not plan.ended
            tail = pb.LeaseReply(tail=1 + self._store.first_held(tails)).SerializeToString() if looked else b""
            kept_replies = None if reading is not None or plan.ended else self._kept_replies(plan)
            if kept_replies is not None:
                return self._hot_reply(plan, kept_replies) + tail
            if reading is not None:
                reading.begin(plan)
            else:  # all hot, but to be copied, or no complete answer: hot may let go of it before that is done
                reading = begun()
                reading.begin_whole(plan)
            return self._read(reading) + tail
        finally:
            if reading is not None:
                reading.close()

    def _hot_reply(self, plan: Plan, kept_replies: list[SharedMemoryReply]) -> bytes:
        """The commonest reply of all, written by hand: the constant part, this call's, the kept reply of each entry."""
        new = set(map(_SEGMENT, kept_replies)) - self._handed
        if sum(len(segment.descriptors) for segment in new) > SEGMENTS_MAX:
            self._hand_some(new)
        now = _GIVEN.pack(_LEASE_TAG, self._hold(plan.entries), _NOW_TAG, plan.now, NUMBER_TAG, self._number)
        if new:
            handed = pb.LeaseReply()
            for segment in new:
                self._hand(handed, segment)
            now += handed.SerializeToString()
        return b"".join((self._serialized_always, now, *map(_SERIALIZED, kept_replies)))

    def _kept_replies(self, plan: Plan) -> list[SharedMemoryReply] | None:
        """The kept reply of each entry; None where one does not lie in a segment that this user could be handed."""
        kept_replies: list[SharedMemoryReply] = list(map(_KEPT_REPLY, plan.entries))
        if not all(kept_replies):
            for i, (entry, meta) in enumerate(zip(plan.entries, plan.metas, strict=True)):
                if kept_replies[i] is None and entry is not None and meta is not None:
                    kept_reply = new_reply(entry, meta.created_at)
                    if kept_reply is None:
                        return None
                    entry.keep_reply(kept_reply)
                    kept_replies[i] = kept_reply
        for segment in set(map(_SEGMENT, kept_replies)) - self._handed:
            if segment.owner != self._owner:
                return None
        return kept_replies

    def _hold(self, held: Sequence[Any]) -> int:
        """The number of a new lease; 0 for one that would hold nothing."""
        if not held:
            return 0
        number = self._next
        self._next = number + 1
        with self._holding:
            self._leases[number] = (time.monotonic() + self._shared.lease_max_s, held)
            self.held += len(held)
        return number

    def _read(self, reading: Reading) -> bytes:
        """A get that has to read, decode or copy something first."""
        shared = self._shared
        reply = pb.LeaseReply(boot_epoch=shared.verbs.epoch, lease_max_s=shared.lease_max_s)
        held: list[Any] = []
        while True:
            with shared.reads:
                lot = reading.read()
            for index, hit in lot:
                if hit is not None:
                    found = shared.replies.of(index, hit, self._owner)
                    if found is None:
                        raise UseStream("no room in shared memory, or nothing to share")
                    tensors, segment, described = found
                    held.append(tensors)
                    self._hand(reply, segment)
                    reply.leased.append(described)
            if reading.done:
                break
            reading.plan()
        reply.lease = self._hold(held)
        reply.number = self._number
        return reply.SerializeToString()

    def _hand(self, reply: pb.LeaseReply, segment: Handed, *, writable: bool = False) -> None:
        if segment in self._handed:
            return
        if sum(map(len, self._fds.values())) + len(segment.descriptors) > SEGMENTS_MAX:
            raise MoreSegments(f"the answer lies in more segments than {SEGMENTS_MAX}, which is a packet's limit")
        self._handed = {known for known in self._handed if not known.closed}
        self._handed.add(segment)
        reply.segments.append(told(segment, writable=writable))
        self._fds[segment] = segment.descriptors

    def _hand_some(self, segments: Iterable[Handed]) -> NoReturn:
        """Hand over as many as a packet brings, instead of an answer. Raises MoreSegments."""
        unsaid = pb.LeaseReply()  # the refusal says it
        for segment in sorted(segments, key=attrgetter("number")):
            self._hand(unsaid, segment)
        raise AssertionError("so many fit into a packet")

    def _open_ingest(self, nbytes: int) -> bytes:
        size = -(-max(nbytes, INGEST_MIN_NBYTES) // (1 << 20)) * (1 << 20)
        lending = self._shared.lending
        if not lending.lend(size, self, self._shared.connections.copy()):
            limit = lending.ingest.limit_nbytes
            raise UseStream(f"{size} bytes beside {self.ingest_nbytes} of this connection's, and {limit} of all")
        self.ingest_nbytes += size
        number = (1 << 31) + len(self._ingest)  # apart from the arena's: those count up from 1
        try:
            segment = Segment(number, self.uid, size, self._shared.arena.register, readers_only=False)
        except (OSError, MemoryError) as error:  # out of descriptors or memory: the stream needs neither
            self.ingest_nbytes -= size
            lending.ingest.give_back(size)
            raise UseStream(str(error)) from None
        self._ingest[segment.number] = segment
        reply = pb.LeaseReply(number=self._number)
        self._hand(reply, segment, writable=True)
        return reply.SerializeToString()

    def _put(self, asked: pb.LeasePut) -> pb.PutReply:
        shared = self._shared
        limit_nbytes = shared.store.config.entry_max_nbytes
        ready = incoming([item.header for item in asked.entries], limit_nbytes)
        nbytes = sum(entry.nbytes for entry in ready)
        stored = 0
        shared.budget.take(nbytes)
        try:
            all_sources = [self._sources(entry, item.places) for entry, item in zip(ready, asked.entries, strict=True)]
            room = None if self._on_device else self._room  # to a device: from where it lies
            # At the end: nothing of a call that is refused as a whole is copied.
            self._arriving = lying(ready, all_sources, room, self._encoded_room, self._owner)
            stored = put_ready(self._store, ready)
        finally:
            shared.budget.give_back(nbytes)
            # Before any answer but the one that lets the client go on: in its ingest segment it may write again then.
            if not (stored and asked.copy_later):
                self._copy_arriving()
        return pb.PutReply(stored=stored, boot_epoch=shared.verbs.epoch)

    def _copy_arriving(self) -> None:
        """Copy what was put and is not copied yet out of the client's ingest segments."""
        while self._arriving:
            tensors = self._arriving.pop()
            try:
                tensors.arrive()
            except Exception:  # memory ran out: whoever reads the entry finds it undecodable, a miss
                logger.exception("an entry was not copied when it was put")

    def _sources(self, entry: Incoming, places: Any) -> list[Bytes]:
        """The bytes of an entry in the client's ingest segments. It may still write there: the copy is what counts."""
        if len(places) != len(entry.sizes):
            raise InvalidEntry(f"{len(entry.sizes)} tensors in {len(places)} places")
        sources: list[Bytes] = []
        for nbytes, place in zip(entry.sizes, places, strict=True):
            segment, start = self._ingest.get(place.segment), place.start
            if not nbytes:
                sources.append(_NOTHING)
            elif segment is None or start + nbytes > segment.nbytes:
                raise InvalidEntry(f"bytes {start} to {start + nbytes} are in no ingest segment {place.segment}")
            else:
                sources.append(segment.bytes[start : start + nbytes])
        return sources
