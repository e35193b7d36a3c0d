"""Records encrypted at rest: they come back under their key, and under anything else are a miss, never other bytes."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from kvstore.config import ColdConfig, StoreConfig
from kvstore.entries import sealing
from kvstore.entries.compression import Compression
from kvstore.entries.entry import Entry
from kvstore.entries.record import FIXED_NBYTES, pack, unpack
from kvstore.entries.sealing import HEAD_NBYTES, TAG_NBYTES, Seals, read_keys
from kvstore.errors import ConfigError, RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store

META = Meta(1.0, 2.0, 1.0, 0)
KEY = Key(b"a key")


def key_file(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o640)
    return str(path)


@pytest.fixture
def seals(tmp_path: Path) -> Seals:
    return Seals({"*": key_file(tmp_path / "all", "11" * 32), "team": key_file(tmp_path / "team", "22" * 32)})


def entry(rows: int = 50) -> Entry:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator)
    return raw_entry(KEY, {"k": x, "half": x.to(torch.bfloat16), "n": torch.tensor(7), "none": torch.empty(0, 3)})


def same(a: Entry, b: Entry) -> bool:
    return all(torch.equal(a.tensors[name].parts[""], b.tensors[name].parts[""]) for name in a.tensors)


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_sealed_record_comes_back_and_shows_nothing_of_its_data(
    seals: Seals, compression: Compression, rows: int
) -> None:
    given = entry(rows)
    record = pack(given, META, compression=compression, seal=seals.sealing(["team"])).to_bytes()
    assert same(given, unpack(record, KEY, seals=seals))
    clear = pack(given, META, compression=compression).to_bytes()
    assert len(record) == len(clear) + HEAD_NBYTES + TAG_NBYTES
    for tensor in given.tensors.values():
        data = tensor.parts[""].view(-1).view(torch.uint8).numpy().tobytes()[:64]
        assert len(data) < 16 or data not in record


def test_two_records_of_one_entry_have_nothing_in_common_behind_their_heads(seals: Seals) -> None:
    one, two = (pack(entry(), META, seal=seals.sealing([])).to_bytes() for _ in range(2))
    at = one.rindex(one[-64:]) - 4000
    assert one[at:] != two[at:]
    assert one[-TAG_NBYTES:] != two[-TAG_NBYTES:]


def test_large_sections_are_sealed_in_pieces(seals: Seals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PIECE_NBYTES", 1000)
    given = entry()
    record = pack(given, META, compression=Compression.NONE, seal=seals.sealing([]))
    clear = pack(given, META, compression=Compression.NONE)
    pieces = -(-sum(part.size for part in clear.data) // 1000)
    assert record.nbytes == clear.nbytes + HEAD_NBYTES + pieces * TAG_NBYTES
    assert same(given, unpack(record.to_bytes(), KEY, seals=seals))


def test_another_key_or_none_is_a_miss(seals: Seals, tmp_path: Path) -> None:
    record = pack(entry(), META, seal=seals.sealing(["team"])).to_bytes()
    others = Seals({"*": key_file(tmp_path / "other", "33" * 32)})
    for wrong in (others, sealing.NO_SEALS):
        with pytest.raises(RecordCorrupt, match=r"which is in no file of store\.cold\.key_files"):
            unpack(record, KEY, seals=wrong)


def test_no_bit_of_a_sealed_record_can_be_changed_with_its_checksums_made_good(seals: Seals) -> None:
    """Who writes to the disk can make checksums: what the tag covers has to be all that is believed."""
    given = entry(3)
    record = pack(given, META, compression=Compression.NONE, seal=seals.sealing([])).to_bytes()
    for at in [*range(16, 88), *range(FIXED_NBYTES, len(record), 7)]:
        forged = bytearray(record)
        forged[at] ^= 1
        head_nbytes = FIXED_NBYTES + int.from_bytes(record[64:68], "little")
        forged[88:96] = xxhash.xxh3_64_intdigest(forged[head_nbytes:]).to_bytes(8, "little")
        forged[8:16] = xxhash.xxh3_64_intdigest(forged[16:head_nbytes]).to_bytes(8, "little")
        with pytest.raises(RecordCorrupt):
            unpack(bytes(forged), KEY, seals=seals)


def test_a_sealed_record_under_another_entrys_key_is_refused(seals: Seals) -> None:
    record = bytearray(pack(entry(), META, seal=seals.sealing([])).to_bytes())
    other = Key(b"b key")
    head_nbytes = FIXED_NBYTES + int.from_bytes(record[64:68], "little")
    record[16:32] = xxhash.xxh3_128_digest(other)
    record[8:16] = xxhash.xxh3_64_intdigest(record[16:head_nbytes]).to_bytes(8, "little")
    with pytest.raises(RecordCorrupt, match="not what was sealed"):
        unpack(bytes(record), other, seals=seals)


def test_a_new_key_seals_and_the_old_one_still_opens(tmp_path: Path) -> None:
    before = Seals({"*": key_file(tmp_path / "k", "11" * 32)})
    record = pack(entry(), META, seal=before.sealing([])).to_bytes()
    after = Seals({"*": key_file(tmp_path / "k", "22" * 32, "11" * 32)})
    assert same(entry(), unpack(record, KEY, seals=after))
    fresh = pack(entry(), META, seal=after.sealing([])).to_bytes()
    with pytest.raises(RecordCorrupt):
        unpack(fresh, KEY, seals=before)


def test_the_most_particular_name_has_the_key(seals: Seals) -> None:
    team, everything = seals.sealing(["team/llama", "llama", "team"]), seals.sealing(["other/llama", "llama", "other"])
    assert team is not None and everything is not None
    assert team.id != everything.id
    assert seals.sealing(["", ""]) is everything
    assert sealing.NO_SEALS.sealing(["team"]) is None


@pytest.mark.parametrize("text", ["", "11" * 31, "11" * 32 + "\nnot hex", "zz" * 32])
def test_a_file_that_is_no_key_is_refused_with_how_to_make_one(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        read_keys(key_file(tmp_path / "k", text))


def test_a_key_that_everybody_can_read_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path / "k", "11" * 32)
    os.chmod(path, 0o644)  # noqa: PTH101
    with pytest.raises(ConfigError, match="chmod o-r"):
        read_keys(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none")


def test_a_store_keeps_its_secrets_from_the_disk_and_forgets_without_the_key_but_not_for_good(tmp_path: Path) -> None:
    keys = {"*": key_file(tmp_path / "k", "11" * 32)}
    words = b"nobody who steals the disk may read this. " * 100
    x = torch.frombuffer(bytearray(words), dtype=torch.uint8)

    def opened(key_files: dict[str, str]) -> Store:
        cold = ColdConfig(path=str(tmp_path / "cold"), key_files=key_files)
        return Store.open(StoreConfig(cold=cold), background=False, framework="torch")

    with opened(keys) as store:
        store.put(b"secret", {"x": x}, fidelity="exact")
    on_disk = b"".join(path.read_bytes() for path in (tmp_path / "cold").rglob("*") if path.is_file())
    assert b"steals the disk" not in on_disk
    for key_files in (keys, {}, keys):
        with opened(key_files) as store:
            hit = store.get(b"secret")
            if key_files:
                assert hit is not None and torch.equal(hit.tensors["x"], x)
            else:
                assert hit is None
                values = store.stats().values
                assert (values["cold_read_errors"], values["cold_corrupt_total"], values["misses_lost"]) == (1, 0, 1)


def test_a_store_whose_key_file_is_missing_does_not_open(tmp_path: Path) -> None:
    config = StoreConfig(cold=ColdConfig(path=str(tmp_path / "cold"), key_files={"*": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match=r"store\.cold\.key_files: cannot read"):
        Store.open(config)
    with Store.open(tmp_path / "cold"):  # the directory was let go of
        pass


def test_the_sealed_form_is_that_of_every_version_before(seals: Seals, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a salt that is known. Another one could not open what lies on disks: cut, numbered or bound otherwise."""
    assert sealing.PIECE_NBYTES == 64 << 20
    monkeypatch.setattr(sealing, "PIECE_NBYTES", 1000)
    monkeypatch.setattr(sealing.secrets, "token_bytes", lambda nbytes: bytes(range(nbytes)))  # type: ignore[attr-defined]
    x = torch.arange(2500).to(torch.uint8)
    record = pack(raw_entry(KEY, {"x": x}), META, compression=Compression.NONE, seal=seals.sealing([])).to_bytes()
    assert hashlib.sha256(record).hexdigest() == "fbe6492676d42d0c91c0fe3e6c40b3e98e0f47d9c957213033c8fff8725e598f"
    assert sealing.sealed_nbytes(2500) == 2500 + HEAD_NBYTES + 3 * TAG_NBYTES


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 1001, 2000, 2001])
def test_a_sealed_section_has_a_tag_a_piece_and_at_least_one(
    seals: Seals, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(sealing, "PIECE_NBYTES", 1000)
    key = seals.sealing([])
    assert key is not None
    data = np.arange(nbytes).astype(np.uint8)
    sealed = np.concatenate(key.seal([data[: nbytes // 3], data[nbytes // 3 :]], b"bound"))
    assert sealed.size == sealing.sealed_nbytes(nbytes)
    assert np.array_equal(seals.open(sealed, b"bound"), data)
    for wrong in (sealed[:-1], np.concatenate([sealed, sealed[-1:]]), sealed[: sealed.size - 1000]):
        with pytest.raises(RecordCorrupt):
            seals.open(wrong, b"bound")


def test_what_is_too_short_to_be_sealed_is_damaged_and_not_of_another_key() -> None:
    """An unknown key's record is kept until its key is there again; damage is dropped."""
    with pytest.raises(RecordCorrupt, match="sealed data of 47 bytes"):
        sealing.NO_SEALS.open(np.zeros(HEAD_NBYTES + TAG_NBYTES - 1, np.uint8), b"")
    with pytest.raises(sealing.UnknownSeal):
        sealing.NO_SEALS.open(np.zeros(HEAD_NBYTES + TAG_NBYTES, np.uint8), b"")


def test_pieces_do_not_change_places(seals: Seals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PIECE_NBYTES", 1000)
    key = seals.sealing([])
    assert key is not None
    sealed = np.concatenate(key.seal([np.arange(3000).astype(np.uint8)], b"bound"))
    step, at = 1000 + TAG_NBYTES, HEAD_NBYTES
    one, two = sealed[at : at + step].copy(), sealed[at + step : at + 2 * step].copy()
    sealed[at : at + step], sealed[at + step : at + 2 * step] = two, one
    with pytest.raises(RecordCorrupt, match="not what was sealed"):
        seals.open(sealed, b"bound")
