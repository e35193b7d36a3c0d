"""Changes thought of by hand, each of a line that keeps the law. All of them have to be noticed."""

from pathlib import Path

from tests.mutants.abuse import ABUSE
from tests.mutants.doors import DOORS
from tests.mutants.mutations import Mutant

PREPARED = (
    ("kvstore/entries/record.py", "data_xxh3 != head.data_xxh3", "False", "damaged data is a value"),
    ("kvstore/entries/record.py", "!= head_xxh3:", "!= head_xxh3 and False:", "a damaged head is believed"),
    (
        "kvstore/entries/record.py",
        "key_hash != _key_hash(key) or key_nbytes != len(key)",
        "False",
        "another key's record answers",
    ),
    ("kvstore/entries/record.py", "data_nbytes > 2 * value_nbytes + _SIDE_NBYTES", "False", "a bomb is decompressed"),
    ("kvstore/entries/record.py", "seals.open(stored, key + head_bytes", "seals.open(stored, head_bytes", "one side"),
    ("kvstore/entries/record.py", "tensors.value_nbytes != head.value_nbytes", "False", "a head lies about its size"),
    ("kvstore/entries/sealing.py", 'number.to_bytes(4, "big") + bound', "bound", "sealed pieces change places"),
    ("kvstore/metadata/meta.py", "now >= self.expires_at", "now > self.expires_at", "it lives at its deadline"),
    (
        "kvstore/residency/read_path.py",
        "if now >= (meta.pinned_until if meta.pinned else meta.expires_at):",
        "if False:",
        "an expired entry is resident",
    ),
    (
        "kvstore/residency/read_path.py",
        "now - meta.last_hit_at <= self._promote_window_s",
        "now - meta.last_hit_at > self._promote_window_s",
        "the window is turned around",
    ),
    ("kvstore/residency/read_path.py", "used.reverse()", "pass", "the root of a chain leaves first"),
    (
        "kvstore/residency/state.py",
        "self.touch(keys[::-1])",
        "self.touch(keys)",
        "the root of a chain leaves first",
    ),
    ("kvstore/residency/mover.py", "not flight.called_off and key not in into", "key not in into", "an old value"),
    ("kvstore/residency/mover.py", "key not in into and bool(r.tiers_of(key))", "key not in into", "the only form"),
    ("kvstore/residency/mover.py", "if r.index.get(key) is not meta", "if False", "a drain writes an old value"),
    (
        "kvstore/residency/leaving.py",
        "or r.in_cold(key):\n        r.counters",
        ":\n        r.counters",
        "encoded twice",
    ),
    (
        "kvstore/residency/state.py",
        "self.flights.call_off(key)\n        if self",
        "if self",
        "a promotion of an old value",
    ),
    (
        "kvstore/residency/state.py",
        "self.lost_clean_copy(key)\n            self.forget_if_gone(key, _CAUSES",
        "self.forget_if_gone(key, _CAUSES",
        "a lossy copy outlives its encoded form",
    ),
    ("kvstore/residency/write_path.py", 'r.forget(key, "orphaned")', "pass", "a chunk without its parent stays"),
    (
        "kvstore/residency/transcode.py",
        "raw_entry(entry.key, self.decode(entry, room), lossy=entry.lossy, receipt=entry.receipt)",
        "raw_entry(entry.key, self.decode(entry, room), lossy=entry.lossy)",
        "a promoted copy says it is exact",
    ),
    (
        "kvstore/residency/transcode.py",
        "raw_entry(entry.key, self.decode(entry, room), lossy=entry.lossy, receipt=entry.receipt)",
        "raw_entry(entry.key, self.decode(entry, room), receipt=entry.receipt)",
        "a promoted copy says it is no lossy one",
    ),
    ("kvstore/tiers/order.py", "return limit if limit == inf else limit", "return inf if limit else limit", "a quota"),
    (
        "kvstore/tiers/order.py",
        "tenants[owner.tenant] = tenants.get(owner.tenant, 0) + nbytes",
        "pass",
        "the newcomer is not counted",
    ),
    (
        "kvstore/tiers/order.py",
        "-self._used[lane] - (nbytes if lane == owner.lane else 0)",
        "-self._used[lane]",
        "same",
    ),
    ("kvstore/tiers/pinned.py", "if total > self.limit_nbytes:", "if False:", "pins take the whole tier"),
    ("kvstore/tiers/pinned.py", "if own > share:", "if False:", "one tenant takes all that may be pinned"),
    ("kvstore/metadata/slices.py", "STEPS = 64", "STEPS = 1 << 30", "a root's children are deleted in one hold"),
    ("kvstore/tiers/admission.py", "if self.exhausted:", "if False:", "the write budget is ignored"),
    (
        "kvstore/disk/writer.py",
        "before, self._freed = self._freed, freed",
        "before = freed",
        "freed before it is durable",
    ),
    ("kvstore/disk/writer.py", "self._rows.sync()\n        freed, self", "freed, self", "freed before it is durable"),
    (
        "kvstore/disk/segments.py",
        "self._write(batch)\n            self._sync()\n        except",
        "self._write(batch)\n        except",
        "a row names bytes that are not on the disk",
    ),
    (
        "kvstore/disk/reading.py",
        "        head = parse_head(head_bytes, key, known=known)",
        "        head = parse_head(head_bytes, key)",
        "a row of another record",
    ),
    (
        "kvstore/shm/arena.py",
        "given.segment.words[given.start >> 3] = 0",
        "pass",
        "a late reader keeps what was freed under him",
    ),
    (
        "kvstore/shm/arena.py",
        "if segment.owner != owner:",
        "if False:",
        "a block of another user's segment is handed out",
    ),
    (
        "kvstore/shm/arena.py",
        "mine = segment.owner == owner and",
        "mine =",
        "two users in one segment",
    ),
    (
        "kvstore/shm/arena.py",
        " and segment not in self._leaving",
        "",
        "a block is made in a segment that is to run empty",
    ),
    (
        "kvstore/tiers/memory.py",
        "if self._entries.get(held.key) is not held or other.nbytes != held.nbytes:",
        "if other.nbytes != held.nbytes:",
        "what was deleted or put anew while it was moved is back",
    ),
    (
        "daemon/kvstored/sampler.py",
        "                        shared_memory.turn()\n",
        "                        pass\n",
        "a smaller hot tier keeps its shared memory",
    ),
    (
        "client/kvstored_client/shm/connection.py",
        "            self.segments.look(until)\n",
        "            pass\n",
        "a client keeps the pages of segments that the daemon closed",
    ),
    (
        "kvstore/keys.py",
        "hashlib.sha256(parent + data[start : start + step])",
        "hashlib.sha256(data[start : start + step])",
        "equal tokens after another prompt",
    ),
    (
        "kvstore/keys.py",
        "hashlib.sha256(parent + data[:end])",
        "hashlib.sha256(data[:end])",
        "equal tokens after another prompt",
    ),
    (
        "kvstore/kernels/reference.py",
        "return levels * scale + offset",
        "return levels * scale - offset",
        "wrong scales",
    ),
    ("kvstore/codecs/int8.py", "+ 0xFFFF) & ~0xFFFF", "& ~0xFFFF)", "scales rounded down"),
    ("kvstore/codecs/receipt.py", "if not bool(torch.isfinite(missed).all()):", "if False:", "infinities"),
    (
        "kvstore/codecs/parts.py",
        "if not tops[at].clamp(0, _TOP_LIMIT - 1).equal(tops[at]):",
        "if False:",
        "scales that are none",
    ),
)
"""File, text that stands there once, what stands there instead, and what comes of it."""


def prepared(root: Path) -> list[Mutant]:
    """As mutants. Raises ValueError where a text does not stand in its file once: the file has changed since."""
    found = []
    for file, before, after, _ in (*PREPARED, *DOORS, *ABUSE):
        source = (root / file).read_bytes()
        start = source.find(before.encode())
        if source.count(before.encode()) != 1:
            raise ValueError(f"{file} has {source.count(before.encode())} times: {before}")
        line = source.count(b"\n", 0, start) + 1
        found.append(Mutant(file, line, "prepared", (start, start + len(before.encode())), before, after))
    return found
