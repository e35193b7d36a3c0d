"""Rows: what is written is what comes back, one by one and by columns, and what is none of ours is no row."""

import struct
from itertools import product
from math import inf
from pathlib import Path

import pytest

from kvstore.disk.columns import columns
from kvstore.disk.rows import OFFSET_MAX, PLACE_MAX_NBYTES, Row, Rows, _checksum, pack_row, parse_row
from kvstore.disk.segments import Place
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import labelled

KEY = Key(b"a key")


def row_of(n: int = 0, place: Place | None = None, head_nbytes: int = 100, **fields: object) -> Row:
    values = {"last_hit_at": 4.5, "encoding": "nf4-kv", "hits": 3, **fields}
    meta = Meta(1.5, 2.5, 3.5, 7, **values)  # type: ignore[arg-type]
    return Row(place or Place(2, 4096, 500), head_nbytes, n, meta)


FLAGS = [dict(zip(("sliding", "pinned", "exact", "lossy"), on, strict=True)) for on in product([False, True], repeat=4)]
MORE: list[dict[str, object]] = [
    {},
    {"parent": Key(b"p")},
    {"owner": labelled("name")},
    {"owner": labelled("n" * 96), "parent": Key(b"p" * 256)},
    {"pinned_until": 99.5},
    {"encoding": "raw", "hits": 0},
]


def test_every_flag_parent_namespace_and_pin_comes_back() -> None:
    rows = {
        Key(b"%d" % n): row_of(n, **{**flags, **more})  # type: ignore[arg-type]
        for n, (flags, more) in enumerate(product(FLAGS, MORE))
    }
    datas = {key: pack_row(key, row) for key, row in rows.items()}
    for key, row in rows.items():
        read = parse_row(key, datas[key])
        assert read is not None
        assert (read.place, read.head_nbytes, read.seq) == (row.place, row.head_nbytes, row.seq)
        assert read.meta == row.meta
    found = columns(list(datas), list(datas.values()))
    assert found.keys == list(rows)
    assert found.damaged == []
    parents = list(found.parents)
    for i, row in enumerate(rows.values()):
        m, f = row.meta, found.fields[i]
        assert (parents[i], found.namespaces[i], found.encodings[i]) == (m.parent, m.owner.namespace, m.encoding)
        assert found.pinned_until[i] == m.pinned_until
        assert f["flags"] & 15 == m.sliding + 2 * m.pinned + 4 * m.exact + 8 * m.lossy
        assert (f["seq"], f["segment"], f["offset"], f["nbytes"], f["head_nbytes"]) == (i, 2, 4096, 500, 100)
        assert (f["created_at"], f["expires_at"], f["ttl_s"], f["last_hit_at"], f["value_nbytes"], f["hits"]) == (
            1.5, 2.5, 3.5, 4.5, 7, m.hits,
        )  # fmt: skip


def test_the_bytes_are_those_of_every_version_before() -> None:
    data = pack_row(KEY, row_of(9, sliding=True, lossy=True, parent=Key(b"p"), owner=labelled("n")))
    fixed = struct.pack("<QddddQIIQQIB", 9, 1.5, 2.5, 3.5, 4.5, 7, 3, 2, 4096, 500, 100, 1 | 8 | 16)
    body = fixed + b"nf4-kv\0" + struct.pack("<d", inf) + b"\1n" + b"p"
    assert data == body + struct.pack("<I", _checksum(KEY, body))
    assert data[-4:].hex() == "dba5752d"


def test_more_hits_than_a_row_can_tell_are_the_most_it_can() -> None:
    read = parse_row(KEY, pack_row(KEY, row_of(hits=1 << 40)))
    assert read is not None
    assert read.meta.hits == 0xFFFFFFFF


def test_no_flipped_bit_and_no_other_key_passes() -> None:
    data = pack_row(KEY, row_of(parent=Key(b"p"), owner=labelled("n")))
    keys, datas = [], []
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        keys.append(Key(b"%d" % at))
        datas.append(bytes(flipped))
        assert parse_row(KEY, bytes(flipped)) is None
    assert parse_row(Key(b"b key"), data) is None
    assert columns([KEY] * len(datas), datas).damaged == [KEY] * len(datas)
    assert columns([Key(b"b key")], [data]).damaged == [b"b key"]
    for nbytes in range(len(data)):
        assert parse_row(KEY, data[:nbytes]) is None
        assert columns([KEY], [data[:nbytes]]).damaged == [KEY]


@pytest.mark.parametrize(
    ("row", "sound"),
    [
        (row_of(place=Place(1, 0, 500), head_nbytes=500), True),
        (row_of(place=Place(1, 0, 499), head_nbytes=500), False),
        (row_of(place=Place(1, OFFSET_MAX, 500)), True),
        (row_of(place=Place(1, OFFSET_MAX + 1, 500)), False),
        (row_of(place=Place(1, 0, PLACE_MAX_NBYTES)), True),
        (row_of(place=Place(1, 0, PLACE_MAX_NBYTES + 1)), False),
    ],
    ids=lambda value: str(value.place) + str(value.head_nbytes) if isinstance(value, Row) else str(value),
)
def test_a_place_that_no_record_of_ours_has_is_no_row(row: Row, sound: bool) -> None:
    data = pack_row(KEY, row)
    assert (parse_row(KEY, data) is not None) == sound
    assert columns([KEY], [data]).damaged == ([] if sound else [KEY])


def test_writing_gives_back_the_places_that_no_row_names_any_more(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "index", 1 << 20)
    try:
        a, b, c = (Place(1, 4096 * n, 500) for n in range(3))
        assert rows.write({Key(b"a"): row_of(place=a), Key(b"b"): row_of(place=b)}, []) == []
        assert rows.write({Key(b"a"): row_of(1, place=a)}, []) == [], "the same place, used again"
        assert rows.write({Key(b"a"): row_of(2, place=c)}, [Key(b"b"), Key(b"absent")]) == [b, a]
        assert rows.get(Key(b"b")) is None
        found = rows.get(Key(b"a"))
        assert found is not None
        assert found.place == c
        assert rows.of_segment(1) == [b"a"]
        assert rows.of_segment(2) == []
        assert [key for keys, _ in rows.scan() for key in keys] == [b"a"]
        before = rows.map_nbytes
        rows.grow(2 * before)
        assert rows.map_nbytes == 2 * before
        rows.reopen()
        assert rows.map_nbytes == 2 * before
        assert rows.get(Key(b"a")) == found
        assert rows.check_readers() == 0
        assert rows.disk_nbytes() > 0
    finally:
        rows.close()
