"""Records, rows and files that somebody wrote who knows the checksums: a right value, a miss, or an error of ours.

Each record begins valid and is changed in its header, its attributes or its data, and sealed again. Wrong values of the
right shape cannot be told from right ones then, so what is asked is: nothing else is raised, shapes and types are those
announced, the record is gone after one meeting, and was counted.
"""

import copy
import json
import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import inf, nan
from pathlib import Path

import pytest
import torch
import xxhash

from kvstore import Store
from kvstore.clock import ManualClock
from kvstore.codecs import check_entry, codec_named, decode_entry, encode_entry
from kvstore.codecs.hints import Hints
from kvstore.codecs.layers import encode_runs
from kvstore.disk.columns import columns
from kvstore.disk.rows import FIELDS, SUM, Row, Rows, _checksum, pack_row, parse_row
from kvstore.disk.segments import Place
from kvstore.dtypes import TensorSpec
from kvstore.entries import record as records
from kvstore.entries.compression import Compression
from kvstore.entries.entry import EncodedTensor, Entry, error_in
from kvstore.entries.sealing import Seals
from kvstore.errors import CodecError, KvstoreError, RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.tiers.offline import export, import_files

KEY = Key(b"a stranger's")
META = Meta(created_at=1000.0, expires_at=4e9, ttl_s=3600.0, value_nbytes=0)
FORMS = (
    "raw",
    "nf4",
    "nf4-kv",
    "nf4-kv packed",
    "nf4-kv2",
    "nf4-kv2 turning",
    "nf4-kv2 packed",
    "int8",
    "layers",
    "zstd",
    "sealed",
)
NUMBERS = (0, 1, -1, 2, 63, 64, 2**31, 2**32 - 1, 2**62, 2**63, 10**400, 0.5, -0.0, nan, inf, 1e308, True, None)
ODD = (*NUMBERS, "", "0", "-1", "0,1", "raw", "nf4", "\x1b[2J", "\u202e", "a\0b", "\ud800", [], [1], {}, {"a": 1}, [[]])


@cache
def seals() -> Seals:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("ab" * 32)
        file.flush()
        return Seals({"*": file.name})


@cache
def entry_of(form: str) -> Entry:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 72, 2, 32, generator=generator, dtype=torch.float32).to(torch.float16)
    encoding = form.partition(" ")[0]
    name = "kv" if form.endswith("packed") else "k"
    if encoding in ("raw", "zstd", "sealed"):
        x = x if encoding == "raw" else torch.arange(4096, dtype=torch.float32)
        tensors = {"k": EncodedTensor(TensorSpec(str(x.dtype)[6:], tuple(x.shape)), "raw", {"": x})}
        tensors["c"] = EncodedTensor(TensorSpec("complex64", (2,)), "raw", {"": torch.ones(2, dtype=torch.complex64)})
        return Entry(KEY, tensors)
    if encoding == "layers":
        runs = [(0, 1, codec_named("int8")), (1, 3, codec_named("nf4-kv")), (3, 4, codec_named("raw"))]
        return Entry(KEY, {"k": encode_runs("k", x, Hints(), runs)}, lossy=True)
    if form.endswith("turning"):
        at = torch.arange(72.0)[:, None]
        x[..., 0], x[..., 16] = 30 * at.cos(), 30 * at.sin()
    raw = EncodedTensor(TensorSpec("float16", tuple(x.shape)), "raw", {"": x})
    whole = Entry(KEY, {name: raw, "z": EncodedTensor(TensorSpec("int64", (3,)), "raw", {"": torch.arange(3)})})
    return encode_entry(whole, codec_named(encoding))


@cache
def record_of(form: str) -> bytes:
    how = Compression.ZSTD_SHUFFLE_4 if form == "zstd" else None
    seal = seals().sealing(["*"]) if form == "sealed" else None
    return records.pack(entry_of(form), META, compression=how, seal=seal).to_bytes()


def cut(record: bytes) -> tuple[list, bytes, bytes]:
    """Fields of the fixed header, the JSON header, the data section."""
    fields = list(records._FIXED.unpack_from(record))
    start = records.FIXED_NBYTES
    return fields, record[start + 8 : start + fields[9]], record[start + fields[9] :]


def joined(fields: list, text: bytes, data: bytes, key: bytes = KEY) -> bytes:
    """A record of them whose checksums, lengths and key are right."""
    text = text + b" " * (-len(text) % 8)
    fields = list(fields)
    fields[4], fields[12] = records._key_hash(key), len(key)
    fields[9], fields[14], fields[15] = 8 + len(text), len(data), xxhash.xxh3_64_intdigest(data)
    head = records._FIXED.pack(*fields) + struct.pack("<Q", len(text)) + text
    fields[3] = xxhash.xxh3_64_intdigest(head[16:])
    return records._FIXED.pack(*fields) + head[records.FIXED_NBYTES :] + data


def places_in(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to each value of a JSON tree."""
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inner:
        yield from places_in(value, (*path, name))


def changed(tree: object, rng: random.Random) -> object:
    """A copy with one place changed, taken out, doubled, or put elsewhere."""
    tree = copy.deepcopy(tree)
    paths = [path for path in places_in(tree) if path]
    if not paths:
        return rng.choice(ODD)
    path = rng.choice(paths)
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    at = path[-1]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[at]
    elif kind == 1 and isinstance(parent, dict) and isinstance(at, str):
        parent[rng.choice(["", "x", "\x1b[0m", "absmax", at + "~1", "0.scale"])] = copy.deepcopy(parent[at])
    elif kind == 2 and isinstance(parent, list):
        parent.insert(at, copy.deepcopy(parent[at]))
    elif kind == 3 and isinstance(parent[at], int) and not isinstance(parent[at], bool):
        parent[at] += rng.choice([-1, 1, 7, 2**32, 2**62])
    else:
        parent[at] = copy.deepcopy(rng.choice(ODD))
    return tree


def mutated(record: bytes, rng: random.Random) -> bytes:
    """A record that is wrong somewhere and says of itself that it is right."""
    fields, text, data = cut(record)
    kind = rng.randrange(8)
    if kind == 0 and data:
        at = bytearray(data)
        for _ in range(rng.choice((1, 4, 64))):
            at[rng.randrange(len(at))] ^= 1 << rng.randrange(8)
        data = bytes(at)
    elif kind == 1:
        at = bytearray(text)
        at[rng.randrange(len(at))] ^= 1 << rng.randrange(8)
        text = bytes(at)
    elif kind == 2:
        field = rng.choice([5, 6, 7, 8, 10, 11, 13])
        number = rng.choice([0, 1, 2, 3, 15, 31, 2**31, 2**33, 2**62, 2**64 - 1])
        width = {5: 0, 6: 0, 7: 0, 10: 8, 11: 8}.get(field, 64)
        fields[field] = float(rng.choice([nan, inf, -1.0, 1e300])) if width == 0 else number % 2**width
    elif kind == 3:
        data = data[: rng.randrange(len(data) + 1)]
        fields[13] = rng.choice([fields[13], len(data)])
    else:
        header = json.loads(text)
        facts = header["__metadata__"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.randrange(5):
                facts["kvstored.tensors"] = json.dumps(changed(json.loads(facts["kvstored.tensors"]), rng))
            else:
                facts.pop("kvstored.tensors", None)
                rest = changed({name: row for name, row in header.items() if name != "__metadata__"}, rng)
                facts = {**facts, "kvstored.tensors": json.loads(text)["__metadata__"]["kvstored.tensors"]}
                header = {"__metadata__": facts, **rest}
        text = json.dumps(header).encode()
        if rng.randrange(4) == 0:
            text = text.replace(b'"k', b'"k\\u0007', 1)
    return joined(fields, text, data)


def mutations(count: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(10)
    for n in range(count):
        form = FORMS[n % len(FORMS)]
        yield form, mutated(record_of(form), rng)


def test_what_is_sealed_again_is_a_value_or_corrupt_and_nothing_else():
    """Any record: unpacked it is an entry whose tensors decode to their specs, or RecordCorrupt, or CodecError."""
    outcomes = {"value": 0, "corrupt": 0, "undecodable": 0}
    for form, record in mutations(int(os.environ.get("KVSTORED_STRANGERS", "800"))):
        try:
            entry = records.unpack(record, KEY, seals=seals(), limit_nbytes=1 << 20)
        except RecordCorrupt:
            outcomes["corrupt"] += 1
            continue
        assert all(0 <= error <= inf for error in entry.receipt.values())
        try:
            decoded = decode_entry(entry)
        except CodecError:
            outcomes["undecodable"] += 1
            if entry.lossy:
                with pytest.raises(CodecError):
                    check_entry(entry)
            continue
        outcomes["value"] += 1
        for name, spec in entry.specs.items():
            assert decoded[name].dtype == getattr(torch, spec.dtype), form
            assert tuple(decoded[name].shape) == spec.shape, form
        if entry.lossy or entry.encoding == "raw":
            check_entry(entry)
    assert min(outcomes.values()) > 8, outcomes  # all three were reached


class Directory:
    """A cold directory whose one record is written by a stranger."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: bytes, **row: object) -> None:
        segments = self.path / "segments"
        with Store.open(self.path, clock=ManualClock(1000.0), background=False) as store:
            store.delete(KEY)
            store.put(KEY, {"x": torch.zeros(4)}, fidelity="exact")
            store.drain()
        rows = Rows(self.path / "index", 1 << 20)
        try:
            held = rows.get(KEY)
            number = held.place.segment
            place = Place(number, 1 << 20, len(record))
            with (segments / f"{number:08d}.seg").open("r+b") as file:
                file.seek(place.offset)
                file.write(record)
            fields = records._FIXED.unpack_from(record)
            meta = replace(held.meta, value_nbytes=min(fields[8], 2**63 - 1))
            found = replace(held, place=place, head_nbytes=records.FIXED_NBYTES + fields[9], meta=meta)
            rows.write({KEY: replace(found, **row)}, [])
        finally:
            rows.close()


def by_get(store: Store) -> object:
    return store.get(KEY)


def by_held(store: Store) -> object:
    return next(store.read(store.plan([KEY], accept={"nf4", "nf4-kv2", "nf4-kv", "int8", "layers"})))


def by_promote(store: Store) -> object:
    return store.promote(KEY) or None


def test_a_hostile_record_is_met_once_and_counted(tmp_path: Path) -> None:
    """Through each door of the store: get, get of what stays encoded, promote. After it the key is gone for good."""
    rng = random.Random(11)
    directory = Directory(tmp_path / "cold")
    met = dict.fromkeys(("by_get", "by_held", "by_promote"), 0)
    for n in range(24):
        form = FORMS[n % (len(FORMS) - 1)]  # sealed ones need a key file in the configuration
        directory.write(mutated(record_of(form), rng))
        door = (by_get, by_held, by_promote)[n % 3]
        with Store.open(directory.path, clock=ManualClock(1000.0), background=False) as store:
            held = store.inspect(KEY) is not None
            found = door(store)
            if found is not None:
                continue
            met[door.__name__] += 1
            assert store.locate([KEY]) == [None]
            assert store.get(KEY) is None
            values = store.stats().values
            assert values["misses_corrupt"] + values["cold_corrupt_total"] >= 1 or door is by_promote or not held
        with Store.open(directory.path, clock=ManualClock(1000.0), background=False) as store:
            assert store.explain(KEY)[0].state == "never put", form
    assert min(met.values()) >= 2, met


@pytest.mark.parametrize(
    ("encoding", "attrs"),
    [
        ("nf4", {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 10**400}),
        ("nf4", {"blocksize": 64, "nested_blocksize": 256, "nested_offset": nan}),
        ("nf4-kv", {"role": [], "token_axis": -3}),
        ("nf4-kv", {"role": {}, "token_axis": -3, "kept": ""}),
        ("nf4-kv", {"role": "key", "token_axis": -(10**30), "kept": "9" * 5000}),
        ("nf4-kv2", {"role": [], "token_axis": -3}),
        ("nf4-kv2", {"role": "key", "token_axis": -3, "kept": "", "rotary": 10**30, "interleaved": True}),
        ("nf4-kv2", {"role": "key", "token_axis": -3, "kept": "", "rotary": {}, "interleaved": []}),
        ("raw", {}),
        ("layers", {"runs": [[0, 1, "nf4-kv", {"role": []}]]}),
        ("layers", {"runs": [[0, 1, "nf4-kv2", {"role": []}]]}),
        ("int8", {"relative_error": 10**400}),
    ],
    ids=str,
)
def test_attributes_of_no_codec_are_a_codec_error(encoding: str, attrs: dict) -> None:
    """An integer without end, a list for a role, parts that are not there: each was another exception."""
    tensor = EncodedTensor(TensorSpec("float16", (1, 64, 1, 32)), encoding, {"x": torch.zeros(3)}, attrs)
    entry = Entry(KEY, {"k": tensor}, lossy=True)
    assert entry.receipt["k"] >= 0
    for reads in (decode_entry, check_entry):
        with pytest.raises(CodecError):
            reads(entry)


def test_a_receipt_without_end_counts_as_never_measured() -> None:
    assert error_in("nf4", {"relative_error": 10**400}) == inf


def test_memory_that_runs_out_is_not_the_records_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A good record that could not be decoded just now is kept, and the next get has it."""
    with Store.open(tmp_path / "cold", background=False) as store:
        store.put(KEY, {"x": torch.arange(100.0)}, fidelity="exact")
        store.drain()
        store.demote(KEY)
        ran_out: list[Callable[..., object]] = []

        def no_memory(*_: object, **__: object) -> torch.Tensor:
            ran_out.append(no_memory)
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", no_memory)
            assert store.get(KEY) is None
        assert ran_out
        assert store.get(KEY) is not None
        assert store.stats().values["cold_corrupt_total"] == 0


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """A small frame that says it holds gigabytes, for a value that has a few bytes."""
    fields, text, data = cut(record_of("zstd"))
    fields[13] = 7 << 30
    with pytest.raises(RecordCorrupt, match="bytes for a value of"):
        records.unpack(joined(fields, text, data), KEY)


ROW = replace(META, encoding="nf4", value_nbytes=8)


@pytest.mark.parametrize(
    "change",
    [
        {"place": Place(1, 0, 2**62)},
        {"place": Place(1, 2**62, 5000)},
        {"head_nbytes": 2**32 - 1},
        {"meta": replace(ROW, encoding="\udcff" * 0 + "a\u00e9")},
    ],
    ids=str,
)
def test_a_row_of_no_record_of_ours_is_damaged_not_believed(change: dict, tmp_path: Path) -> None:
    """A place of 2**62 bytes was counted block by block at the start, or read."""
    row = replace(Row(Place(1, 0, 5000), 200, 7, ROW), **change)
    data = pack_row(KEY, row)
    whole = columns([KEY, Key(b"other")], [data, pack_row(Key(b"other"), Row(Place(1, 0, 5000), 200, 7, ROW))])
    assert Key(b"other") in whole.keys
    if "meta" in change:
        assert parse_row(KEY, data) is not None
        return
    assert parse_row(KEY, data) is None
    assert whole.damaged == [KEY]


def test_a_row_without_its_zero_is_damaged() -> None:
    body = pack_row(KEY, Row(Place(1, 0, 5000), 200, 7, ROW))[: FIELDS.size] + b"n" * 40
    data = body + SUM.pack(_checksum(KEY, body))
    assert parse_row(KEY, data) is None
    assert columns([KEY], [data]).damaged == [KEY]


def exported(tmp_path: Path, **tensors: torch.Tensor) -> bytes:
    with Store.open(tmp_path / "from") as store:
        store.put(KEY, tensors or {"k": torch.randn(2, 64, 2, 32)})
        store.demote(KEY)
    export(tmp_path / "from", tmp_path / "files", ManualClock(1000.0))
    return next((tmp_path / "files").iterdir()).read_bytes()


def refused_by_import(tmp_path: Path, file: bytes, name: str = "f.safetensors") -> list[str]:
    path = tmp_path / name
    path.write_bytes(file)
    return import_files(tmp_path / "to", [path], ManualClock(1000.0), ttl_s=60)


def with_facts(file: bytes, change: Callable[[dict], None]) -> bytes:
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def in_row(name: str, value: object) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        rows = json.loads(header["__metadata__"]["kvstored.tensors"])
        rows[0][name] = value
        header["__metadata__"]["kvstored.tensors"] = json.dumps(rows)

    return change


def fact(name: str, value: str) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        fact("kvstored.key", ""),
        fact("kvstored.key", "ab" * 257),
        fact("kvstored.key", "not hexadecimal"),
        fact("kvstored.tensors", "[]"),
        fact("kvstored.tensors", "[" * 100_000),
        fact("kvstored.lossy", "false"),
        in_row("encoding", "nf5"),
        in_row("encoding", "nf4\0"),
        in_row("encoding", "int8"),
        in_row("name", "k\x1b[2J"),
        in_row("name", "k" * 65),
        in_row("name", 7),
        in_row("attrs", {"role": [], "token_axis": -3}),
        in_row("attrs", {"role": "key", "token_axis": -3, "kept": 7}),
        in_row("attrs", {"n": 10**400}),
        in_row("attrs", {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}),
        in_row("dtype", "float64"),
        in_row("dtype", ["float16"]),
        in_row("shape", [2**31, 2**31, 2**31]),
        in_row("shape", ""),
        in_row("shape", [2.0, 64, 2, 32]),
    ],
    ids=lambda change: getattr(change, "__name__", "case"),
)
def test_import_refuses_what_no_store_would_hold_and_says_why(change: Callable[[dict], None], tmp_path: Path) -> None:
    """An import with odd attributes was an INTERNAL error at each get; an empty key stopped the import."""
    file = exported(tmp_path)
    refused = refused_by_import(tmp_path, with_facts(file, change))
    assert len(refused) == 1
    assert refused[0].startswith(f"{tmp_path / 'f.safetensors'}: ")
    assert refused[0].isprintable()
    assert refused_by_import(tmp_path, file) == []
    with Store.open(tmp_path / "to", clock=ManualClock(1000.0)) as store:
        assert store.get(KEY) is not None


def test_import_of_any_mutation_is_a_line_or_an_entry_that_decodes(tmp_path: Path) -> None:
    file = exported(tmp_path)
    rng = random.Random(12)
    paths = []
    for n in range(60):
        data = bytearray(file)
        if n % 2:
            data = bytearray(with_facts(file, lambda h: h.update(changed(h, rng))))
        for _ in range(rng.choice((0, 1, 8))):
            data[rng.randrange(len(data) if n % 4 == 0 else min(len(data), 600))] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{n}.safetensors")
        paths[-1].write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
    refused = import_files(tmp_path / "to", paths, ManualClock(1000.0), ttl_s=60)
    assert 10 < len(refused) <= len(paths)
    assert all(line.isprintable() for line in refused)
    with Store.open(tmp_path / "to", clock=ManualClock(1000.0)) as store:
        for info in list(store.entries()):
            assert store.get(info.key) is not None


def test_import_goes_on_after_a_pipe_a_device_a_folder_and_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A pipe nobody writes to was waited for without end, /dev/zero read without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\x1b[2J\n.safetensors"))
    odd.write_bytes(b"\0")
    good = tmp_path / "good.safetensors"
    good.write_bytes(exported(tmp_path))
    files = [tmp_path / "pipe", Path("/dev/zero"), tmp_path / "folder", tmp_path / "dangling", odd, good]
    done: list[int] = []
    refused = import_files(tmp_path / "to", files, ManualClock(1000.0), ttl_s=60, progress=lambda n, _: done.append(n))
    assert len(refused) == 5
    assert all(line.isprintable() for line in refused)
    assert done == [1, 2, 3, 4, 5, 6]


def test_a_chunk_imported_over_itself_keeps_its_parent(tmp_path: Path) -> None:
    """Else it would outlive the chunk that it continues."""
    clock = ManualClock(1000.0)
    with Store.open(tmp_path / "cold", clock=clock) as store:
        store.put_many([(b"root", {"k": torch.ones(64)}), (b"next", {"k": torch.ones(64)})], chain=True)
    export(tmp_path / "cold", tmp_path / "files", clock)
    assert import_files(tmp_path / "cold", sorted((tmp_path / "files").iterdir()), clock, ttl_s=60) == []
    with Store.open(tmp_path / "cold", clock=clock) as store:
        assert store.delete(b"root") == 1
        assert store.get(b"next") is None


def test_export_gives_each_key_a_file_of_its_own(tmp_path: Path) -> None:
    """Keys of 256 bytes that differ in their last byte had one name between them."""
    clock = ManualClock(1000.0)
    with Store.open(tmp_path / "cold", clock=clock) as store:
        for n in range(3):
            store.put(bytes(255) + bytes([n]), {"k": torch.full((3,), n)})
    assert export(tmp_path / "cold", tmp_path / "files", clock).entries == 3
    files = sorted((tmp_path / "files").iterdir())
    assert len(files) == 3
    assert import_files(tmp_path / "to", files, clock, ttl_s=60) == []


def test_numpy_reads_nothing_that_shapes_over_2_to_63_promise() -> None:
    record = cut(record_of("raw"))
    header = json.loads(record[1])
    header["k"]["shape"] = [2**31, 2**31, 2**31]
    with pytest.raises(KvstoreError):
        records.unpack(joined(record[0], json.dumps(header).encode(), record[2]), KEY)
