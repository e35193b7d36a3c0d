"""A client process of the soak: random verbs for as long as it is told, each value it meets checked.

It is told its place by a JSON file. What it found goes, one JSON object a line, to a file of the run: a line outlives
kill -9. The call under way stands in the ledger, where the supervisor sees one that does not end.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("bench", ".", "daemon", "client")]

from kvstore.errors import OverQuota, PermissionDenied, RecordCorrupt, TierUnavailable  # noqa: E402
from soaking import values  # noqa: E402 - after the path
from soaking.ledger import DYING, KEYS, PREFIXES, Ledger, Promise, Row, durable_line, lie, now  # noqa: E402

BYTES_PER_S = 32 << 20
"""A client gives a call a second more for so many bytes (PAYLOAD_BYTES_PER_S)."""
TTLS_S = (0.5, 2.0, 6.0)
REFUSED_FOR_S = 15.0
"""So long after a reload calls that began under the old tokens may still be refused."""
THINK_S = 0.03
AWAY_S = 0.2
IDENTITY = {
    "revision": "1", "dtype": "float32", "layers": values.LAYERS, "kv_heads": values.HEADS, "head_dim": values.ROW,
    "layout": "lthd",
}  # fmt: skip


def key_of(ordinal: int, n: int) -> bytes:
    """The same for the writer of the same ordinal in each tenant: what leaks from one to another is found."""
    return b"w%d-%d" % (ordinal, n)


class NotStored(OverQuota):
    """The daemon took the call and kept nothing."""


class Worker:
    """One process. place: what the supervisor wrote: number, tenant, ordinal, address, seed and the like."""

    def __init__(self, place: dict[str, Any], client: Any, ledger: Ledger) -> None:
        self.place = place
        self.number: int = place["number"]
        self.tenant: str = place["tenant"]
        self.peers: list[tuple[int, int]] = [tuple(peer) for peer in place["peers"]]
        """(number, ordinal) of the workers of this tenant, itself included."""
        self.client = client
        self.plain = range(place["plain"])
        self.ledger = ledger
        self.me = ledger.workers[self.number : self.number + 1]
        self.rng = random.Random(f"{place['seed']}-{self.number}-{place['incarnation']}")
        self.errors: Counter[str] = Counter()
        self.away = False
        """Whether the daemon did not answer the last call."""
        self.namespaces = {
            fidelity: client.namespace(model="soak", fidelity=fidelity, chunk_tokens=values.CHUNK_TOKENS, **IDENTITY)
            for fidelity in ("auto", "exact")
        }

    # What is done.

    def run(self) -> None:
        """Until told to stop."""
        self.settle_what_a_kill_left()
        verbs = (
            (self.put, 22), (self.get, 30), (self.get_many, 8), (self.put_many, 4), (self.lease, 8),
            (self.put_prefix, 5), (self.get_prefix, 8), (self.forget_prefix, 2), (self.put_dying, 4),
            (self.get_dying, 6), (self.delete, 5), (self.touch, 3), (self.match, 3), (self.pin, 3), (self.fill, 3),
        )  # fmt: skip
        calls, weights = zip(*verbs, strict=True)
        while not self.ledger.header["stop"][0] and not self.me["leave"][0]:
            if self.away:
                time.sleep(AWAY_S)
                self.get()  # changes would be in doubt, one after another, and their keys no longer written
            else:
                self.rng.choices(calls, weights)[0]()
            time.sleep(self.rng.random() * THINK_S)

    def settle_what_a_kill_left(self) -> None:
        """A change was under way when a worker of this number was killed: nobody knows what became of it."""
        for n in range(KEYS):
            row = self.row(n)
            if row["open"]:
                row.doubted()

    def row(self, n: int) -> Row:
        """One of this worker's own keys."""
        return Row(self.ledger, self.number, n)

    def key(self, n: int) -> bytes:
        """Its name."""
        return key_of(self.place["ordinal"], n)

    def size(self) -> int:
        """Bytes, spread over their logarithm; large ones are rarer."""
        low, high = (values.SMALLEST_NBYTES, 1 << 19) if self.rng.random() < 0.85 else (1 << 19, values.LARGEST_NBYTES)
        return int(low * (high / low) ** self.rng.random())

    def value(self, key: bytes, version: int) -> tuple[dict[str, Any], str, int]:
        """(tensors, fidelity, bytes)."""
        nbytes = self.size()
        if self.rng.random() < 0.3:
            nbytes = min(nbytes, 1 << 20)
            return values.lossy(self.tenant, key, version, nbytes), self.rng.choice(("auto", "exact")), nbytes
        return values.exact(self.tenant, key, version, nbytes), self.rng.choice(("auto", "exact")), nbytes

    @contextmanager
    def call(self, verb: str, n: int, *, calls: int = 1, nbytes: int = 0) -> Iterator[Callable[[], bool]]:
        """A call in the ledger while it runs. Yields what says afterwards whether it was answered.

        calls: how many of the client's are in it; each may wait its timeout once at each of two doors.
        """
        me, answered = self.me, [False]
        me["verb"], me["key"] = verb.encode(), n
        me["bound_s"] = 2 * calls * self.place["timeout_s"] + nbytes / BYTES_PER_S
        me["stopped_then_s"] = me["stopped_s"]
        began = now()
        me["began"] = began
        try:
            yield lambda: answered[0]
            answered[0] = True
            me["calls"] += 1
            self.away = False
        except (TierUnavailable, OverQuota, RecordCorrupt) as error:
            self.away = isinstance(error, TierUnavailable)
            self.met(type(error).__name__, error)
        except PermissionDenied as error:
            self.met("PermissionDenied", error)
            if not self.may_be_refused(began):
                self.say("unexpected", verb, n, f"refused outside of a reload: {error}")
        except Exception as error:  # noqa: BLE001 - any other kind is what is being looked for
            self.met(type(error).__name__, error)
            self.say("unexpected", verb, n, f"{type(error).__name__}: {error}"[:500])
        finally:
            me["began"] = 0.0

    def may_be_refused(self, began: float) -> bool:
        """Whether this call ran beside a reload."""
        header = self.ledger.header[0]
        return bool(header["revoke_from"] <= now() and began <= header["revoke_until"] + REFUSED_FOR_S)

    def met(self, kind: str, error: Exception) -> None:
        """Count an error, and tell the first of its kind."""
        if not self.errors[kind]:
            self.say("first", kind, -1, str(error)[:300])
        self.errors[kind] += 1

    def say(self, what: str, verb: str, n: int, text: str) -> None:
        """A line for the supervisor."""
        line = {"what": what, "at_s": round(now() - self.place["began"], 2), "worker": self.number, "verb": verb,
                "key": n, "life": self.ledger.life, "text": text}  # fmt: skip
        durable_line(Path(self.place["found"]), json.dumps(line))

    # Changes of own keys.

    def writable(self, keys: Sequence[int]) -> int | None:
        """A key of these that no change is in doubt of."""
        for _ in range(8):
            n = self.rng.choice(keys)
            if self.row(n).writable():
                return n
        return None

    @contextmanager
    def change(self, ns: Sequence[int]) -> Iterator[None]:
        """Whatever ends in an error leaves its keys in doubt."""
        try:
            yield
        finally:
            for row in map(self.row, ns):
                if row["open"]:
                    row.doubted()
                    self.me["in_doubt"] += 1

    def put(self) -> None:
        """One value under one key."""
        n = self.writable(self.plain)
        if n is None:
            return
        row, key = self.row(n), self.key(n)
        version = row["attempted"] + 1
        tensors, fidelity, nbytes = self.value(key, version)
        namespace, priority = self.rng.choice(("", "", "chat", "batch")), self.rng.choice(("low", "normal"))
        with self.change([n]):
            row.begin(version)
            with self.call("put", n, nbytes=nbytes) as answered:
                if not self.client.put(key, tensors, fidelity=fidelity, namespace=namespace, priority=priority):
                    raise NotStored("not stored")
            if answered():
                row.stored(version)
                self.me["stored"] += 1

    def put_dying(self) -> None:
        """A value with a short time to live that nothing prolongs."""
        n = self.writable(DYING)
        if n is None:
            return
        row, key = self.row(n), self.key(n)
        version = row["attempted"] + 1
        tensors = values.exact(self.tenant, key, version, min(self.size(), 1 << 18))
        ttl_s = self.rng.choice(TTLS_S)
        with self.change([n]):
            row.begin(version)
            with self.call("put ttl", n) as answered:
                if not self.client.put(key, tensors, ttl_s=ttl_s, sliding=False, namespace="short"):
                    raise NotStored("not stored")
            if answered():
                row.stored(version, now() + ttl_s)

    def fill(self) -> None:
        """A value that is made in shared memory."""
        n = self.writable(self.plain)
        if n is None:
            return
        row, key = self.row(n), self.key(n)
        version = row["attempted"] + 1
        tensors = values.exact(self.tenant, key, version, self.size())
        with self.change([n]):
            row.begin(version)
            with self.call("empty, put", n, calls=2, nbytes=tensors["x"].nbytes) as answered:
                room = self.client.empty(tensors["x"].shape, "int64")
                room[:] = tensors["x"]
                if not self.client.put(key, {"about": tensors["about"], "x": room}, fidelity="exact"):
                    raise NotStored("not stored")
            if answered():
                row.stored(version)
                self.me["stored"] += 1

    def put_many(self) -> None:
        """Several keys in one call."""
        found = {self.writable(self.plain) for _ in range(self.rng.randint(2, 8))} - {None}
        ns = sorted(n for n in found if n is not None)
        batch, versions, nbytes = [], {}, 0
        for n in ns:
            version = versions[n] = self.row(n)["attempted"] + 1
            size = min(self.size(), 2 << 20)
            nbytes += size
            batch.append((self.key(n), values.exact(self.tenant, self.key(n), version, size)))
        with self.change(ns):
            for n in ns:
                self.row(n).begin(versions[n])
            with self.call("put_many", ns[0] if ns else -1, calls=3, nbytes=nbytes) as answered:
                stored = self.client.put_many(batch, fidelity="exact")
            if answered() and stored == len(batch):
                for n in ns:
                    self.row(n).stored(versions[n])
                self.me["stored"] += len(ns)

    def delete(self) -> None:
        """For good: no restart brings it back."""
        n = self.writable(self.plain)
        if n is None or not self.row(n)["attempted"]:
            return
        row = self.row(n)
        with self.change([n]):
            row.begin(row["attempted"])
            with self.call("delete", n) as answered:
                self.client.delete(self.key(n))
            if answered():
                row.gone()
                self.me["deleted"] += 1

    def pin(self) -> None:
        """Keep a key for a while, or let it go."""
        n = self.rng.choice(self.plain)
        with self.call("pin", n):
            if self.rng.random() < 0.5:
                self.client.pin(self.key(n), ttl_s=5.0)
            else:
                self.client.unpin(self.key(n))

    def put_prefix(self) -> None:
        """A prompt: the present one of its family, or the next after the present one was forgotten."""
        n = self.writable(PREFIXES)
        if n is None:
            return
        row = self.row(n)
        generation = max(row["attempted"], row["deleted"] + 1, 1)
        tokens = values.tokens_of(self.number, n, generation)
        k, v = values.kv_of(self.tenant, tokens)
        with self.change([n]):
            row.begin(generation)
            with self.call("put_prefix", n, calls=5, nbytes=2 * k.nbytes) as answered:
                self.namespaces[_fidelity(n)].put_prefix(tokens, k, v)
            if answered():
                row["open"] = 0
                self.me["stored"] += 1

    def forget_prefix(self) -> None:
        """A prompt and its chunks, for good."""
        n = self.writable(PREFIXES)
        if n is None or self.row(n)["attempted"] <= self.row(n)["deleted"]:
            return
        row = self.row(n)
        with self.change([n]):
            row.begin(row["attempted"])
            with self.call("forget_prefix", n, calls=4) as answered:
                self.namespaces[_fidelity(n)].forget(values.tokens_of(self.number, n, row["attempted"]))
            if answered():
                row.gone()
                self.me["deleted"] += 1

    # Looks at anybody's.

    def somebody(self) -> tuple[int, int]:
        """(number, ordinal) of a worker of this tenant."""
        return self.rng.choice(self.peers)

    def get(self) -> None:
        """One value."""
        worker, ordinal = self.somebody()
        n = self.rng.choice(self.plain)
        self.look("get", worker, n, lambda: [self.client.get(key_of(ordinal, n))], [key_of(ordinal, n)], [n])

    def get_dying(self) -> None:
        """One that may have expired."""
        worker, ordinal = self.somebody()
        n = self.rng.choice(DYING)
        self.look("get ttl", worker, n, lambda: [self.client.get(key_of(ordinal, n))], [key_of(ordinal, n)], [n])

    def get_many(self) -> None:
        """Several in one call."""
        worker, ordinal = self.somebody()
        ns = self.rng.sample(self.plain, min(self.rng.randint(2, 12), len(self.plain)))
        keys = [key_of(ordinal, n) for n in ns]
        self.look("get_many", worker, ns[0], lambda: self.client.get_many(keys), keys, ns)

    def look(
        self, verb: str, worker: int, n: int, read: Callable[[], list[Any]], keys: list[bytes], ns: list[int]
    ) -> None:
        """Read, and check each value that comes."""
        promises = [self.ledger.promise(worker, n) for n in ns]
        began, hits = now(), []
        with self.call(verb, n, nbytes=len(ns) * values.LARGEST_NBYTES):
            hits = read()
        for hit, key, at, promise in zip(hits, keys, ns, promises, strict=False):
            if hit is not None:
                self.check(verb, worker, at, key, hit, promise, began)

    def lease(self) -> None:
        """One value where it lies, checked in the block."""
        worker, ordinal = self.somebody()
        n = self.rng.choice(self.plain)
        key, promise = key_of(ordinal, n), self.ledger.promise(worker, n)
        began = now()
        told: list[tuple[str, str]] = []
        with self.call("lease", n, nbytes=values.LARGEST_NBYTES) as answered:
            with self.client.lease(key) as hit:
                if hit is not None:
                    told = self.judged(worker, n, key, hit, promise, began)
            del hit
        # Only if the lease held to its end: what was read in one that ended before may be anything, and says so.
        if answered():
            for kind, text in told:
                self.say(kind, "lease", n, text)

    def check(self, verb: str, worker: int, n: int, key: bytes, hit: Any, promise: Promise, began: float) -> None:
        """Tell of what is not as it should be."""
        for kind, text in self.judged(worker, n, key, hit, promise, began):
            self.say(kind, verb, n, text)

    def judged(
        self, worker: int, n: int, key: bytes, hit: Any, promise: Promise, began: float
    ) -> list[tuple[str, str]]:
        """(kind, sentence) of what is wrong with a hit. Keeps nothing of it."""
        self.me["hits"] += 1
        where = f"{key.decode()} of worker {worker}, from {hit.tier} as {hit.encoding}"
        try:
            version = values.version_of(hit.tensors, self.tenant, key, loss=hit.lossy)
        except values.Lie as error:
            return [("wrong", f"{where}: {error}")]
        found = lie(promise, self.ledger.attempted(worker, n), version, began=began, life=self.ledger.life)
        return [] if found is None else [(found[0], f"{where}: {found[1]}")]

    def get_prefix(self) -> None:
        """The longest part of a prompt that is there; sometimes of one that was forgotten."""
        worker, _ = self.somebody()
        n = self.rng.choice(PREFIXES)
        promise = self.ledger.promise(worker, n)
        newest = self.ledger.attempted(worker, n)
        generation = newest if self.rng.random() < 0.6 else max(newest - self.rng.randint(0, 2), 0)
        if not generation:
            return
        tokens, held, k, v = values.tokens_of(worker, n, generation), 0, None, None
        with self.call("get_prefix", n, calls=4, nbytes=values.LARGEST_NBYTES):
            held, k, v = self.namespaces[_fidelity(n)].get_prefix(tokens)
        if not held:
            return
        self.me["hits"] += 1
        if generation <= promise.deleted:
            self.say("resurrected", "get_prefix", n, f"{held} tokens of prompt {generation} of {worker}, forgotten")
        self._check_prefix(n, tokens[:held], (k, v), f"prompt {generation} of worker {worker}")

    def _check_prefix(self, n: int, tokens: list[int], found: tuple[Any, Any], where: str) -> None:
        expected = values.kv_of(self.tenant, tokens)
        try:
            for name, x, whole in zip("kv", found, expected, strict=True):
                values.check_floats(name, np.asarray(x), whole, loss=_fidelity(n) == "auto")
        except values.Lie as error:
            self.say("wrong", "get_prefix", n, f"{where}: {error}")

    def touch(self) -> None:
        """Count some keys as used, and have them live a while longer."""
        ns = self.rng.sample(self.plain, min(4, len(self.plain)))
        with self.call("touch", ns[0]):
            self.client.touch([self.key(n) for n in ns], ttl_s=self.rng.choice((None, 600.0)))

    def match(self) -> None:
        """Where keys and prompts are held. A place that is told for a deleted key is a lie too."""
        worker, ordinal = self.somebody()
        ns = self.rng.sample(self.plain, min(6, len(self.plain)))
        promises = [self.ledger.promise(worker, n) for n in ns]
        held: list[Any] = []
        with self.call("locate", ns[0]):
            held = self.client.locate([key_of(ordinal, n) for n in ns])
        for n, at, promise in zip(ns, held, promises, strict=False):
            # Put again meanwhile, by a later version than the deleted ones: attempted has risen.
            if at is not None and promise.deleted and self.ledger.attempted(worker, n) <= promise.deleted:
                self.say("resurrected", "locate", n, f"worker {worker}'s is held in {at.tier}, and was deleted")


def _fidelity(n: int) -> str:
    return "exact" if n % 3 == 0 else "auto"


PR_SET_KEEPCAPS = 8
CAP_DAC_READ_SEARCH = 2
CAPABILITIES_3 = 0x20080522


def become(uid: int | None) -> None:
    """Another user for the daemon, who may still read the sources: they may lie where only root enters."""
    if uid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([0])
    os.setresuid(uid, uid, uid)
    keeps = 1 << CAP_DAC_READ_SEARCH
    header, sets = struct.pack("Ii", CAPABILITIES_3, 0), struct.pack("6I", keeps, keeps, 0, 0, 0, 0)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def main() -> None:
    """From the command line: the JSON file that says which worker this is."""
    place = json.loads(Path(sys.argv[1]).read_text())
    dumps = Path(place["dump"]).open("a")  # noqa: SIM115 - for the length of the process
    faulthandler.enable(dumps)
    faulthandler.register(signal.SIGUSR1, dumps, all_threads=True)
    os.environ.update(place["environment"])
    module, _, name = place["client"].partition(":")
    make = getattr(importlib.import_module(module), name)
    ledger = Ledger(Path(place["ledger"]), place["workers"])
    become(place["uid"])
    options = {
        "timeout_s": place["timeout_s"],
        "framework": "numpy",
        "on_error": "raise",
        "shared_memory": place["lease"],
    }
    with make(place["address"], **options) as client:
        worker = Worker(place, client, ledger)
        try:
            worker.run()
        finally:
            worker.say("errors", "", -1, json.dumps(worker.errors))


if __name__ == "__main__":
    main()
