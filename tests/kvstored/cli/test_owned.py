"""Offline verbs beside other users: root becomes the directory's owner, links are not followed, files are private."""

import errno
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kvstore import Store
from kvstore.clock import SystemClock
from kvstore.disk import SystemDisk
from kvstore.errors import ConfigError
from kvstore.tiers.cold import Cold
from kvstore.tiers.offline import Exported, compact, export, fsck, import_files
from kvstored.cli import cli
from kvstored.host.become import become_owner_of
from tests.strangers import STRANGER, in_child, why_not

needs_root = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def run(*args: object) -> tuple[int, str]:
    result = CliRunner(catch_exceptions=False).invoke(cli, [str(arg) for arg in args])
    return result.exit_code, result.stdout + result.stderr


def fill(path: Path, count: int = 3) -> Path:
    with Store.open(path / "cold") as store:
        for n in range(count):
            store.put(b"k%d" % n, {"x": torch.full((100,), n)})
    return path


def give_to(path: Path, uid: int) -> None:
    for file in (path, *path.rglob("*")):
        os.lchown(file, uid, uid)


def modes(path: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()}


def as_root(*args: object) -> tuple[int, str]:
    """In a process of its own: it gives up its rights for good."""

    def task() -> int:
        result = CliRunner(catch_exceptions=False).invoke(cli, [str(arg) for arg in args])
        sys.stdout.write(result.stdout if "--json" in args else result.stdout + result.stderr)
        return result.exit_code

    return in_child(task)


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A data directory of another user's, as the service's is."""
    top = Path(tempfile.gettempdir())
    for parent in (tmp_path, *(parent for parent in tmp_path.parents if parent != top and top in parent.parents)):
        parent.chmod(0o755)
    give_to(fill(tmp_path / "data"), STRANGER)
    return tmp_path / "data"


@needs_root
def test_root_that_checks_and_compacts_leaves_no_file_of_its_own(strangers: Path, tmp_path: Path) -> None:
    for verb in ("fsck", "compact"):
        code, said = as_root(verb, "--data-dir", strangers)
        assert code == 0, said
    code, said = as_root("export", "--data-dir", strangers, tmp_path / "out", "--json")
    assert json.loads(said) == {"target": str(tmp_path / "out"), "entries": 3, "lost": 0}
    code, said = as_root("import", "--data-dir", strangers, tmp_path / "out")
    assert code == 0, said
    made = [strangers, *strangers.rglob("*"), tmp_path / "out", *(tmp_path / "out").iterdir()]
    assert {file.lstat().st_uid for file in made} == {STRANGER}
    assert modes(strangers) == {0o600}
    assert modes(tmp_path / "out") == {0o600}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


@needs_root
def test_root_is_led_nowhere_by_a_link_of_the_directorys_owner(strangers: Path, tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir(mode=0o700)
    fill(tmp_path / "roots" / "data")
    (strangers / "cold").rename(strangers / "was")
    (strangers / "cold").symlink_to(tmp_path / "roots" / "data" / "cold")
    os.lchown(strangers / "cold", STRANGER, STRANGER)
    before = (tmp_path / "roots/data/cold/STATE").read_bytes()
    code, said = as_root("fsck", "--data-dir", strangers)
    assert code == 2
    assert "Permission denied" in said
    assert (tmp_path / "roots/data/cold/STATE").read_bytes() == before


@needs_root
def test_a_way_through_two_users_directories_is_refused(strangers: Path) -> None:
    os.chown(strangers / "cold", STRANGER + 1, STRANGER + 1)
    with pytest.raises(ConfigError, match="directories of .*3001.* and of .*3002"):
        become_owner_of(strangers / "cold")


@needs_root
def test_a_store_is_not_opened_by_another_than_its_owner(strangers: Path) -> None:
    with pytest.raises(ConfigError, match=r"cold.path: the directory .* belongs to .*3001"):
        Store.open(strangers / "cold")
    os.chown(strangers / "cold", 0, 0)
    with pytest.raises(ConfigError, match=r"index belongs to .*3001.* chown -R 0"):
        Store.open(strangers / "cold")


@pytest.mark.parametrize("name", ["STATE", "LOCK", "index", "segments", "quarantine", "index/data.mdb", "index.new"])
def test_a_link_with_one_of_our_names_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    data = fill(tmp_path / "data")
    at = data / "cold" / name
    if at.exists():
        at.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    at.symlink_to(tmp_path / "elsewhere")
    for verb in (("fsck",), ("compact",), ("export", tmp_path / "out")):
        code, out = run(verb[0], "--data-dir", data, *verb[1:])
        assert (code, "symbolic link" in out) == (2, True), out
    assert at.is_symlink()


def test_the_state_is_written_to_a_new_file_and_not_through_a_link(tmp_path: Path) -> None:
    data = fill(tmp_path / "data")
    (tmp_path / "precious").write_text("mine")
    (data / "cold" / "STATE.new").symlink_to(tmp_path / "precious")
    assert run("fsck", "--data-dir", data)[0] == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert modes(data) == {0o600}


def test_a_lock_file_with_a_second_name_is_refused(tmp_path: Path) -> None:
    data = fill(tmp_path / "data")
    os.link(data / "cold" / "LOCK", tmp_path / "other")
    code, out = run("fsck", "--data-dir", data)
    assert code == 2
    assert "no regular file with one name" in out


def test_an_export_has_a_private_file_for_each_key_and_import_takes_the_directory(tmp_path: Path) -> None:
    prefix = bytes(range(100))
    keys = [prefix + b"%03d" % n for n in range(10)] + [bytes([n]) * 256 for n in range(1, 4)]
    with Store.open(tmp_path / "data" / "cold") as store:
        for n, key in enumerate(keys):
            store.put(key, {"x": torch.full((10,), n)})
    out = tmp_path / "out"
    for _ in range(2):  # the second one replaces the files of the first
        assert export(tmp_path / "data" / "cold", out, SystemClock()) == Exported(13, 0)
        assert len(list(out.iterdir())) == 13
    assert modes(out) == {0o600}
    assert out.stat().st_mode & 0o777 == 0o700
    (tmp_path / "other").mkdir()
    code, said = run("import", "--data-dir", tmp_path / "other", out)
    assert (code, "13 entries" in said) == (0, True), said
    with Store.open(tmp_path / "other" / "cold") as store:
        for n, key in enumerate(keys):
            hit = store.get(key)
            assert hit is not None and int(hit.tensors["x"][0]) == n


def test_an_export_replaces_a_link_and_follows_none(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", 1)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("mine")
    (out / f"{b'k0'.hex()}.safetensors").symlink_to(tmp_path / "precious")
    assert run("export", "--data-dir", data, out)[0] == 0
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / "link").symlink_to(out)
    code, said = run("export", "--data-dir", data, tmp_path / "link")
    assert (code, "a link is not followed" in said) == (2, True), said
    (out / "a.safetensors").symlink_to(next(out.iterdir()))
    assert len(import_files(tmp_path / "other", [out], SystemClock(), ttl_s=60)) == 1


def opened(path: Path, disk: SystemDisk) -> Cold:
    from kvstore.config import ColdConfig

    cold = Cold.open(path, ColdConfig(), SystemClock(), meta_of=lambda _: None, on_drop=lambda *_: None, disk=disk)
    cold.recovered()
    return cold


def test_no_errno_of_a_read_deletes_a_row(tmp_path: Path) -> None:
    fill(tmp_path, 1)

    class Refusing(SystemDisk):
        code = 0

        def read(self, fd, buffers, offset):
            raise OSError(self.code, os.strerror(self.code))

    cold = opened(tmp_path / "cold", Refusing())
    for code in errno.errorcode:
        cold._records._disk.code = code
        assert cold.get(b"k0") is None
    assert cold.stats().counters.read_errors == len(errno.errorcode)
    cold.close()
    cold = opened(tmp_path / "cold", SystemDisk())
    assert cold.get(b"k0") is not None
    assert cold.stats().counters.corrupt_total == 0
    cold.close()


@needs_root
def test_records_of_another_user_are_counted_by_fsck_and_stay(strangers: Path) -> None:
    segment = next((strangers / "cold" / "segments").iterdir())
    os.chown(segment, 0, 0)
    segment.chmod(0o600)
    code, said = as_root("fsck", "--data-dir", strangers, "--json")
    assert code == 4
    assert json.loads(said.splitlines()[-1]) == {"entries": 3, "corrupt": 0, "unreadable": 3, "quarantined": None}
    os.chown(segment, STRANGER, STRANGER)
    code, said = as_root("fsck", "--data-dir", strangers, "--json")
    assert json.loads(said) == {"entries": 3, "corrupt": 0, "unreadable": 0, "quarantined": None}


@needs_root
@pytest.mark.parametrize("name", ["index/data.mdb", "index", "STATE"])
def test_an_index_that_may_not_be_read_ends_the_opening_and_is_not_quarantined(strangers: Path, name: str) -> None:
    os.chown(strangers / "cold" / name, 0, 0)
    (strangers / "cold" / name).chmod(0o700 if name == "index" else 0o600)
    code, said = as_root("fsck", "--data-dir", strangers)
    assert code == 2, said
    assert not (strangers / "cold" / "quarantine").exists()
    os.chown(strangers / "cold" / name, STRANGER, STRANGER)
    code, said = as_root("fsck", "--data-dir", strangers)
    assert code == 0, said


@pytest.mark.parametrize("ending", ["signal", "memory"])
def test_a_check_that_could_not_be_made_deletes_nothing(tmp_path: Path, monkeypatch, ending: str) -> None:
    fill(tmp_path, 1)
    from kvstore.disk import verify_child

    stand_in = tmp_path / "check.py"
    how = "import os\nos.kill(os.getpid(), 9)" if ending == "signal" else "print('out of memory')\nraise SystemExit(4)"
    stand_in.write_text(how)
    monkeypatch.setattr(verify_child, "__file__", str(stand_in))
    with pytest.raises(ConfigError, match=r"could not be checked.*Nothing was deleted"):
        fsck(tmp_path / "cold", SystemClock())
    monkeypatch.undo()
    assert fsck(tmp_path / "cold", SystemClock()).entries == 1
    compact(tmp_path / "cold", SystemClock())
    assert fsck(tmp_path / "cold", SystemClock()).entries == 1


def test_a_file_that_get_writes_is_private(tmp_path: Path) -> None:
    import numpy as np

    from kvstored.cli.tensorfile import write_tensors

    before = os.umask(0)
    try:
        write_tensors(tmp_path / "x.safetensors", {"x": np.arange(3)}, {})
    finally:
        os.umask(before)
    assert modes(tmp_path) == {0o600}
