"""Damaged, swapped, cut, forged and foreign objects: a get gives the right bytes, or nothing.

KVSTORED_SHARED_MUTATIONS: how many mutations are tried, 300 by default; 10,000 is the issue's number.
"""

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.entries import record
from kvstore.entries.sealing import NO_SEALS, Seals
from kvstore.errors import RecordCorrupt, UnknownSeal
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.transcode import raw_entry
from kvstore.shared import HEAD_NBYTES
from kvstore.shared.names import Names
from kvstore.shared.objects import RECORD_AT, Facts, made, opened, parse_head
from tests.kvstore.shared.conftest import CHUNK, Hosts, prefix

TRIED = int(os.environ.get("KVSTORED_SHARED_MUTATIONS", "300"))
NAMES = Names(b"s" * 32)
KEYS = [Key(b"%032d" % i) for i in range(4)]
ALIASES = [NAMES.alias(key, 0) for key in KEYS]


@pytest.fixture(scope="module")
def sealing(tmp_path_factory):
    path = tmp_path_factory.mktemp("seals") / "seal.key"
    path.write_text("2" * 64)
    path.chmod(0o600)
    return Seals({"*": str(path)})


def value(i: int) -> dict[str, torch.Tensor]:
    made_by = torch.Generator().manual_seed(i)
    return {"k": torch.randn(2, 4, 2, 8, generator=made_by), "v": torch.randn(2, 4, 2, 8, generator=made_by)}


def an_object(seals: Seals, i: int, names: Names = NAMES, **facts: Any) -> bytearray:
    of = Facts(**{"namespace": "model@1", "ttl_s": 60.0, "exact": False, "now": 1e9, "namespace_epoch": 3, **facts})
    entry = raw_entry(KEYS[i], value(i))
    return bytearray(b"".join(made(names, names.alias(KEYS[i], 0), entry, of, seals.sealing(()))))


def read(data: bytes | bytearray, i: int, seals: Seals, *, clear: bool = False) -> dict[str, torch.Tensor] | None:
    """What a host would give out for this object under the name of key i."""
    try:
        head = parse_head(NAMES, ALIASES[i], bytes(data[:HEAD_NBYTES]))
        found = opened(NAMES, ALIASES[i], KEYS[i], head, bytearray(data), seals, clear=clear)
    except RecordCorrupt:
        return None
    assert found.entry.key == KEYS[i]
    return {name: t.parts[""] for name, t in found.entry.tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_object_comes_back_as_it_was_made(sealing):
    for seals, clear in ((sealing, False), (NO_SEALS, True)):
        found = read(an_object(seals, 1), 1, seals, clear=clear)
        assert found is not None
        assert same(found, value(1))


@settings(max_examples=TRIED, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_of_an_object_gives_another_value(sealing, data):
    clear = data.draw(st.booleans())
    seals = NO_SEALS if clear else sealing
    own, other = an_object(seals, 0), an_object(seals, 1)
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "splice", "swap", "zero", "shift"]))
    at, end = sorted((data.draw(st.integers(0, len(own))), data.draw(st.integers(0, len(own)))))
    if kind == "flip":
        own[min(at, len(own) - 1)] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del own[at:]
    elif kind == "longer":
        own += data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "splice":
        own[at:end] = other[at:end]
    elif kind == "swap":
        own = other
    elif kind == "zero":
        own[at:end] = bytes(end - at)
    else:
        own[at:end] = own[at + 1 : end + 1]
    found = read(own, 0, seals, clear=clear)
    assert found is None or same(found, value(0))


def forged_record(i: int) -> bytes:
    """A record of other bytes under the right alias, with every xxh3 right and no seal."""
    entry = raw_entry(ALIASES[i], value(3))
    return record.pack(entry, Meta(1e9, 1e9 + 60, 60.0, entry.value_nbytes)).to_bytes()


def with_record(own: bytearray, text: bytes) -> bytearray:
    forged = bytearray(own[:RECORD_AT]) + text
    struct.pack_into("<Q", forged, 8, len(text))
    return forged


def resummed(own: bytearray, at: int) -> bytearray:
    """A byte of sealed data changed, and both checksums of the record made right again."""
    changed = bytearray(own)
    changed[at] ^= 1
    inside = memoryview(changed)[RECORD_AT:]
    (json_nbytes,) = struct.unpack_from("<I", inside, 64)
    data = bytes(inside[record.FIXED_NBYTES + json_nbytes :])
    struct.pack_into("<Q", inside, 88, xxhash.xxh3_64_intdigest(data))
    struct.pack_into("<Q", inside, 8, xxhash.xxh3_64_intdigest(bytes(inside[16 : record.FIXED_NBYTES + json_nbytes])))
    return changed


def of_another_epoch(seals: Seals) -> bytearray:
    of = Facts("model@1", 60.0, exact=False, now=1e9, namespace_epoch=3)
    alias = NAMES.alias(KEYS[0], 1)
    return bytearray(b"".join(made(NAMES, alias, raw_entry(KEYS[0], value(0)), of, seals.sealing(()))))


def with_version(own: bytearray, at: int) -> bytearray:
    struct.pack_into("<H", own, at, 2)
    return own


def spliced(seals: Seals, other: bytearray, start: int, stop: int) -> bytearray:
    own = an_object(seals, 0)
    own[start:stop] = other[start:stop]
    return own


FOREIGN: dict[str, Callable[[Seals], bytearray]] = {
    "another host's secret": lambda seals: an_object(seals, 0, Names(b"t" * 32)),
    "another epoch": of_another_epoch,
    "a record of another version": lambda seals: with_version(an_object(seals, 0), RECORD_AT + 4),
    "an object of another version": lambda seals: with_version(an_object(seals, 0), 4),
    "another object's head": lambda seals: spliced(seals, an_object(seals, 1), 0, HEAD_NBYTES),
    "another namespace's name": lambda seals: spliced(
        seals, an_object(seals, 0, namespace="model@2"), HEAD_NBYTES, RECORD_AT
    ),
    "a record in clear under a good head": lambda seals: an_object(NO_SEALS, 0),
    "a record in clear": lambda seals: with_record(an_object(seals, 0), forged_record(0)),
    "sealed data changed and summed again": lambda seals: resummed(an_object(seals, 0), -5),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_forged_or_foreign_object_is_a_miss(sealing, kind):
    assert read(FOREIGN[kind](sealing), 0, sealing) is None


def test_the_forgeries_would_be_believed_by_checksums_alone(sealing):
    """Or the test above would prove nothing: both have every xxh3 right."""
    record.unpack(forged_record(0), ALIASES[0])
    forged = FOREIGN["sealed data changed and summed again"](sealing)
    with pytest.raises(RecordCorrupt, match="not what was sealed"):
        record.unpack(bytes(forged[RECORD_AT:]), ALIASES[0], seals=sealing)


def test_a_head_tells_no_more_than_its_hosts_secret_can_prove(sealing):
    own = an_object(sealing, 0)
    for at in range(0, HEAD_NBYTES - 32, 3):
        lying = bytearray(own)
        lying[at] ^= 0xFF
        with pytest.raises(RecordCorrupt):
            parse_head(NAMES, ALIASES[0], lying[:HEAD_NBYTES])


def test_an_object_under_a_key_that_is_in_no_file_here_is_kept_for_the_hosts_that_have_it(hosts, tmp_path):
    hosts.published(2)
    other = tmp_path / "other.key"
    other.write_text("3" * 64)
    other.chmod(0o600)
    b = hosts.open(key_files={"*": str(other)})
    assert hosts.namespace(b).get_prefix(prefix(2)[0])[0] == 0
    b.maintain()
    assert len(hosts.server.names()) == 2
    assert issubclass(UnknownSeal, RecordCorrupt)


def swapped(names: list[str], hosts: Hosts) -> None:
    objects = hosts.server.objects
    objects[names[2]], objects[names[3]] = objects[names[3]], objects[names[2]]


def flipped(names: list[str], hosts: Hosts) -> None:
    data, until = hosts.server.objects[names[2]]
    hosts.server.objects[names[2]] = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], until


def cut(names: list[str], hosts: Hosts) -> None:
    data, until = hosts.server.objects[names[2]]
    hosts.server.objects[names[2]] = data[: len(data) // 2], until


@pytest.mark.parametrize("damage", [swapped, flipped, cut])
def test_a_prefix_ends_before_a_damaged_chunk_which_is_then_published_anew(
    hosts, damage: Callable[[list[str], Hosts], None]
):
    hosts.published(5)
    tokens, _, _ = prefix(5)
    names = hosts.server.names()
    damage(names, hosts)
    b = hosts.open()
    b.maintain()
    ns = hosts.namespace(b)
    assert ns.get_prefix(tokens)[0] == 2 * CHUNK
    b.maintain()
    hosts.clock.advance(11)  # whoever published it had claimed it for 10 s
    ns.put_prefix(*prefix(5))  # computed again
    b.maintain()
    assert hosts.namespace(hosts.open()).get_prefix(tokens)[0] == 5 * CHUNK


def test_one_tenant_never_reads_anothers_objects(hosts):
    """Keys are scoped by tenant before they come here: the same prompt has other names, and other bound data."""
    a = hosts.open(tenants={"red": [b"r" * 16], "blue": [b"b" * 16]})
    tensors = {"x": torch.arange(512.0)}
    a.put_many([(b"r" * 16 + b"key", tensors)], chain=True)
    a.maintain()
    b = hosts.open(tenants={"red": [b"r" * 16], "blue": [b"b" * 16]})
    assert b.get_many([b"b" * 16 + b"key"], leading=True) == []
    assert len(b.get_many([b"r" * 16 + b"key"], leading=True)) == 1
    assert next(iter(b.entries())).tenant == "red"
