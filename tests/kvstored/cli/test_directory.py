"""The verbs for a cold directory that no daemon has open."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from kvstore import Store
from kvstored.cli import cli


def run(*args: object) -> tuple[int, str]:
    result = CliRunner(catch_exceptions=False).invoke(cli, [str(arg) for arg in args])
    return result.exit_code, result.stdout + result.stderr


def test_fsck_compact_export_import(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data" / "cold") as store:
        for n in range(3):
            store.put(b"k%d" % n, {"x": torch.full((100,), n)})
        assert run("fsck", "--data-dir", tmp_path / "data")[0] == 2  # in use
    code, out = run("fsck", "--data-dir", tmp_path / "data", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[0]) == {"entries": 3, "corrupt": 0, "unreadable": 0, "quarantined": None}
    assert run("compact", "--data-dir", tmp_path / "data")[0] == 0
    assert run("export", "--data-dir", tmp_path / "data", tmp_path / "out")[0] == 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 3
    (tmp_path / "other").mkdir()
    assert run("import", "--data-dir", tmp_path / "other", *files)[0] == 0
    with Store.open(tmp_path / "other" / "cold") as store:
        hit = store.get(b"k2")
        assert hit is not None and torch.equal(hit.tensors["x"], torch.full((100,), 2))


def test_a_damaged_record_is_exit_code_4(tmp_path: Path) -> None:
    with Store.open(tmp_path / "cold") as store:
        store.put(b"k", {"x": torch.arange(100, dtype=torch.uint8)})
    segment = next((tmp_path / "cold" / "segments").iterdir())
    data = bytearray(segment.read_bytes())
    data[data.find(bytes(range(50, 90)))] ^= 1
    segment.write_bytes(data)
    assert run("fsck", "--data-dir", tmp_path / "cold")[0] == 4
    assert run("fsck", "--data-dir", tmp_path / "cold")[0] == 0


def test_a_directory_without_a_cold_tier_is_bad_usage(tmp_path: Path) -> None:
    code, out = run("fsck", "--data-dir", tmp_path)
    assert code == 2
    assert "no STATE file" in out
