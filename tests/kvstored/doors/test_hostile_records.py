"""Records that a stranger wrote, met through a running daemon: by both doors, decoded by the daemon and by the client.

Each is a value of the shape that it names, or a miss that the daemon counts once; its key is gone then, for good. None
is an internal error, and none is sent to a client that has to refuse it: the client could not have it dropped.
"""

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch

from kvstore import Store
from kvstore.codecs import codec_named
from kvstore.codecs.hints import Hints
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Place
from kvstore.entries import record as records
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.errors import EntryTooLarge
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstored_client import Client
from tests.conftest import DaemonFactory, DaemonProcess
from tests.kvstore.entries.test_strangers import FORMS, cut, joined, mutated, record_of

COUNT = int(os.environ.get("KVSTORED_STRANGERS", "96"))
WAYS = [(door, decode) for door in ("lease", "stream") for decode in ("client", "daemon")]
META = Meta(created_at=1.0, expires_at=4e9, ttl_s=3e9, value_nbytes=0)


def fill(cold: Path, found: dict[bytes, bytes], **rows: Callable[[Row], Row]) -> None:
    """Have a cold directory hold these records, by key. rows: what to change in the row of a key, by its text."""
    with Store.open(cold, background=False) as store:
        for key in found:
            store.put(key, {"x": torch.zeros(4)}, fidelity="exact")
        store.drain()
    table = Rows(cold / "index", 1 << 20)
    try:
        for at, (key, record) in enumerate(found.items()):
            held = table.get(Key(key))
            assert held is not None
            place = Place(held.place.segment, (1 + at) << 20, len(record))
            with (cold / "segments" / f"{place.segment:08d}.seg").open("r+b") as file:
                file.seek(place.offset)
                file.write(record)
            fields = records._FIXED.unpack_from(record)
            meta = replace(held.meta, value_nbytes=min(fields[8], 2**63 - 1))
            row = replace(held, place=place, head_nbytes=records.FIXED_NBYTES + fields[9], meta=meta)
            table.write({Key(key): rows.get(key.decode(), lambda row: row)(row)}, [])
    finally:
        table.close()


def cold_of(daemon: DaemonProcess) -> Path:
    return daemon.directory / "data" / "cold"


def client_by(daemon: DaemonProcess, door: str, decode: str) -> Client:
    return daemon.client(shared_memory=door == "lease", decode=decode, framework="torch")


def counted(client: Client) -> int:
    """Records that the daemon dropped for what was in them."""
    values = client.stats().values
    return int(values["cold_corrupt_total"])


def met(client: Client, key: bytes) -> bool:
    """Ask for a key; False: a miss, after which the key is gone."""
    described = client.inspect(key)
    hit = client.get(key)
    if hit is None:
        assert client.locate([key]) == [None], key
        assert client.get_many([key, key]) == [None, None]
        with client.lease(key) as leased:
            assert leased is None
        return False
    assert described is not None
    for name, x in hit.tensors.items():
        assert hit.receipt[name] >= 0
        assert float(x.to(torch.float64).abs().sum() if not x.is_complex() else 0.0) >= 0 or not x.isfinite().all()
    return True


def test_a_strangers_record_is_a_value_or_a_miss_that_is_counted_once(daemon_factory: DaemonFactory) -> None:
    daemon = daemon_factory(start=False)
    rng = random.Random(13)
    found = {}
    for n in range(COUNT):
        form = FORMS[n % (len(FORMS) - 1)]  # a sealed one needs a key file in the configuration
        key = b"%s %d" % (form.encode(), n)
        found[key] = joined(*cut(mutated(record_of(form), rng)), key=key)
    fill(cold_of(daemon), found)
    daemon.start()
    missed = set()
    clients = {way: client_by(daemon, *way) for way in WAYS}
    for n, key in enumerate(found):
        client = clients[WAYS[n // (len(FORMS) - 1) % len(WAYS)]]
        before = counted(client)
        held = client.locate([key]) != [None]
        if not met(client, key):
            missed.add(key)
            assert counted(client) <= before + held, key
            assert client.put(key, {"x": torch.ones(3)})
            assert met(client, key)
    assert len(found) // 3 < len(missed) < len(found)
    assert_quiet(daemon, missed)
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client() as client:
        assert client.match([next(iter(missed))]) == 1
        assert counted(client) == 0


def assert_quiet(daemon: DaemonProcess, missed: set[bytes]) -> None:
    log = daemon.log
    assert "Traceback" not in log
    assert "call failed" not in log
    for key in missed:
        assert sum(f"key={key.hex()} " in line for line in log.splitlines()) <= 1, key


def with_parts(entry: Entry, **changes: Callable[[EncodedTensor], EncodedTensor]) -> Entry:
    """The entry with one tensor changed by name."""
    tensors = {name: changes.get(name, lambda held: held)(held) for name, held in entry.tensors.items()}
    return Entry(entry.key, tensors, lossy=entry.lossy)


def set_part(suffix: str, value: float) -> Callable[[EncodedTensor], EncodedTensor]:
    """One number of a part is another one."""

    def change(held: EncodedTensor) -> EncodedTensor:
        part = held.parts[suffix].clone()
        part.view(-1)[-1] = value
        return replace(held, parts={**held.parts, suffix: part})

    return change


def in_means(at: slice, written: bytes) -> Callable[[EncodedTensor], EncodedTensor]:
    """Other bytes in the means of nf4-kv2: codes, exponents, which pairs turn, and angles as the last ones."""

    def change(held: EncodedTensor) -> EncodedTensor:
        part = held.parts["mean"].clone()
        part[at] = torch.tensor(list(written), dtype=torch.uint8)
        return replace(held, parts={**held.parts, "mean": part})

    return change


def more_parts(*suffixes: str) -> Callable[[EncodedTensor], EncodedTensor]:
    def change(held: EncodedTensor) -> EncodedTensor:
        return replace(held, parts={**held.parts, **{suffix: torch.zeros(3) for suffix in suffixes}})

    return change


def more_attrs(**attrs: object) -> Callable[[EncodedTensor], EncodedTensor]:
    return lambda held: replace(held, attrs={**held.attrs, **attrs})


def layered(change: Callable[[EncodedTensor], EncodedTensor]) -> bytes:
    """A record in `layers`, changed."""
    x = torch.randn(4, 72, 2, 32).to(torch.float16)
    runs = [(0, 1, codec_named("int8")), (1, 4, codec_named("nf4-kv"))]
    from kvstore.codecs.layers import encode_runs

    held = encode_runs("k", x, Hints(), runs)
    return records.pack(Entry(Key(b"k"), {"k": change(held)}, lossy=True), META).to_bytes()


def in_header(record: bytes, change: Callable[[list], None]) -> bytes:
    """A record whose tensors are described otherwise, its checksums right."""
    fields, text, data = cut(record)
    header = json.loads(text)
    rows = json.loads(header["__metadata__"]["kvstored.tensors"])
    change(rows)
    header["__metadata__"]["kvstored.tensors"] = json.dumps(rows)
    return joined(fields, json.dumps(header).encode(), data)


def odd_encoding(rows: list) -> None:
    """A name that no codec has, and that would become one of the daemon's numbers."""
    rows[0]["encoding"] = 'nf5"} 7'


def odd_suffix(rows: list) -> None:
    """A name that UTF-8 cannot write: the answer to a get could not be made."""
    rows[0]["parts"]["\ud800"] = rows[0]["parts"].pop("absmax")


def form(name: str, **changes: Callable[[EncodedTensor], EncodedTensor]) -> bytes:
    from tests.kvstore.entries.test_strangers import entry_of

    return records.pack(with_parts(entry_of(name), **changes), META).to_bytes()


def lies(**meta: object) -> Callable[[Row], Row]:
    return lambda row: replace(row, meta=replace(row.meta, **meta))


LIE_NBYTES = 3 << 30


def says_it_is_large(record: bytes) -> bytes:
    fields, text, data = cut(record)
    fields[8] = LIE_NBYTES
    return joined(fields, text, data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nf4 scale that is no number": lambda: form("nf4", k=set_part("nested_absmax", nan)),
    "nf4 scale beyond its type": lambda: form("nf4", k=set_part("nested_absmax", 1e30)),
    "nf4 negative scale beyond its type": lambda: form("nf4", k=set_part("nested_absmax", -1e30)),
    "nf4 more parts than a client takes": lambda: form("nf4", k=more_parts(*(f"p{n}" for n in range(20)))),
    "nf4 one part more": lambda: form("nf4", k=more_parts("x")),
    "an encoding of nobody's": lambda: in_header(form("nf4"), odd_encoding),
    "nf4 part of an odd name": lambda: in_header(form("nf4"), odd_suffix),
    "nf4 attributes over a client's limit": lambda: form("nf4", k=more_attrs(text="x" * 5000)),
    "nf4-kv mean that is no number": lambda: form("nf4-kv", k=set_part("mean_scale", nan)),
    "nf4-kv endless mean": lambda: form("nf4-kv", k=set_part("mean_scale", inf)),
    "nf4-kv kept value that is no number": lambda: form("nf4-kv", k=set_part("kept", nan)),
    "nf4-kv one part more": lambda: form("nf4-kv", k=more_parts("v.mean")),
    "nf4-kv packed, kept value without end": lambda: form("nf4-kv packed", kv=set_part("v.kept", inf)),
    "nf4-kv2 exponent of a mean without end": lambda: form("nf4-kv2", k=in_means(slice(-1, None), b"\xff")),
    "nf4-kv2 angle that is no number": lambda: form(
        "nf4-kv2 turning", k=in_means(slice(-4, None), struct.pack("<f", nan))
    ),
    "nf4-kv2 endless angle": lambda: form("nf4-kv2 turning", k=in_means(slice(-4, None), struct.pack("<f", inf))),
    "nf4-kv2 kept value that is no number": lambda: form("nf4-kv2", k=set_part("kept", nan)),
    "nf4-kv2 one part more": lambda: form("nf4-kv2", k=more_parts("scale_top")),
    "nf4-kv2 more channels that turn than there are": lambda: form("nf4-kv2 turning", k=more_attrs(rotary=34)),
    "nf4-kv2 packed, kept value without end": lambda: form("nf4-kv2 packed", kv=set_part("v.kept", inf)),
    "int8 scale that is no number": lambda: form("int8", k=set_part("scale", nan)),
    "int8 scale beyond its type": lambda: form("int8", k=set_part("scale", 1e30)),
    "layers with a part of no run": lambda: layered(more_parts("7.scale")),
    "layers with a scale that is no number": lambda: layered(set_part("0.scale", nan)),
    "a size that is not its tensors'": lambda: says_it_is_large(form("nf4")),
}
ROWS: dict[str, Callable[[Row], Row]] = {
    "row of a value of 16 EiB": lies(value_nbytes=2**64 - 1),
    "row of a value over the bytes in flight": lies(value_nbytes=LIE_NBYTES),
    "row of an age that is no number": lies(created_at=nan),
    "row of an endless age": lies(created_at=-inf),
    "row of a life that is no number": lies(ttl_s=nan, pinned=True),
    "row of a pin that is no number": lies(pinned=True, pinned_until=nan),
    "row of a file that is not there": lambda row: replace(row, place=row.place._replace(segment=2**31 - 1)),
    "row of a file beyond all numbers": lambda row: replace(row, place=row.place._replace(segment=2**32 - 1)),
    "row beyond all numbers": lambda row: replace(row, seq=2**64 - 1),
    "row of another place": lambda row: replace(row, place=row.place._replace(offset=row.place.offset + 64)),
    "row of no encoding of ours": lies(encoding="\x1b[2J" * 9),
}
HARMLESS = {"row of no encoding of ours"}
"""What is said there is shown to an operator, and means nothing to a get."""


def test_what_no_version_of_ours_writes_is_a_miss_by_each_door(daemon_factory: DaemonFactory) -> None:
    """Some were sent to a client that refused them at each get; a size alone was refused by the daemon at each get."""
    daemon = daemon_factory(start=False)
    found, rows = {}, {}
    for way in WAYS:
        for name in (*HOSTILE, *ROWS):
            key = f"{'-'.join(way)} {name}"
            record = HOSTILE[name]() if name in HOSTILE else form("nf4")
            found[key.encode()] = joined(*cut(record), key=key.encode())
            rows |= {key: ROWS[name]} if name in ROWS else {}
    fill(cold_of(daemon), found, **rows)
    daemon.start()
    missed = set()
    for way in WAYS:
        client = client_by(daemon, *way)
        missed |= {key for key in found if key.startswith("-".join(way).encode()) and not met(client, key)}
    assert {key.decode().partition(" ")[2] for key in found.keys() - missed} == HARMLESS
    values = client.stats().values
    assert values["misses_corrupt"] + values["cold_corrupt_total"] >= len(missed)
    assert not any("nf5" in name for name in values)
    assert_quiet(daemon, missed)
    # What was numbered beyond a row's fields would have ended all writing.
    assert client.put(b"after", {"x": torch.ones(64)}, fidelity="exact")
    client.demote(b"after")
    assert client.drain() >= 0
    values = client.stats().values
    assert (values["cold_healthy"], values["in_flight_nbytes"]) == (1, 0)
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client() as again:
        assert torch.equal(again.get(b"after").tensors["x"], torch.ones(64))


def test_a_size_that_is_true_and_too_large_is_said_and_stays(daemon_factory: DaemonFactory) -> None:
    """Only what a record says falsely is dropped for it."""
    daemon = daemon_factory(server='in_flight_nbytes = "4MiB"', start=False)
    with Store.open(cold_of(daemon), background=False) as store:
        store.put(b"large", {"x": torch.zeros(2 << 20)}, fidelity="exact")
    daemon.start()
    with daemon.client() as client:
        for _ in range(2):
            with pytest.raises(EntryTooLarge, match=r"server\.in_flight_nbytes"):
                client.get(b"large")
        assert client.match([b"large"]) == 1
