"""A snapshot of a running daemon: whole or not there, private, and a data directory for another daemon."""

import json
import re
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from kvstore import Store
from kvstore.disk import copying
from kvstore.errors import ConfigError
from kvstored.cli import cli
from tests.conftest import environment
from tests.kvstored.conftest import running_daemon


@pytest.fixture(scope="module")
def daemon():
    with running_daemon() as found:
        found.start()
        yield found


def value(i):
    return {"x": np.full(1000, i, np.float32)}


def run(daemon, *words, code=0, where=None):
    where = ("--address", daemon.address.split(",")[0], "--timeout-s", "60") if where is None else where
    done = CliRunner().invoke(cli, [*map(str, words), *where], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_snapshot_made_under_load_is_a_data_directory_in_which_every_entry_is_read(daemon):
    client = daemon.client(framework="numpy")
    for i in range(120):
        client.put(b"stays:%d" % i, value(i), fidelity="exact")
        client.put(b"goes:%d" % i, value(i))
    stop = threading.Event()

    def load():
        worker = daemon.client(framework="numpy")
        n = 0
        while not stop.wait(0.001):
            worker.put(b"new:%d" % (n % 50), value(n))
            worker.put(b"stays:%d" % (n % 120), value(n % 120), fidelity="exact")
            worker.delete(b"goes:%d" % (n % 120))
            n += 1

    thread = threading.Thread(target=load)
    thread.start()
    target = daemon.directory / "backup"
    try:
        told = json.loads(run(daemon, "snapshot", target, "--json"))
    finally:
        stop.set()
        thread.join()
    assert told["verb"] == "snapshot" and told["directory"] == str(target) and told["lost"] == 0
    assert told["entries"] >= 120 and told["nbytes"] > 0
    assert mode(target) == mode(target / "cold") == 0o700
    assert all(mode(file) & 0o077 == 0 for file in target.rglob("*"))
    with running_daemon() as other:
        other.config.write_text(other.config.read_text().replace(f"{other.directory}/data", str(target)))
        other.start()
        restored = other.client(framework="numpy")
        for i in range(120):
            hit = restored.get(b"stays:%d" % i)
            assert hit is not None, i
            assert np.array_equal(hit.tensors["x"], value(i)["x"])
        assert list(restored.verify())[-1].corrupt == 0


def test_what_is_deleted_or_put_anew_meanwhile_is_never_old_in_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "BATCH_MAX", 4)
    with Store.open(tmp_path / "data", framework="numpy") as store:
        for i in range(12):
            store.put(b"%02d" % i, value(i), fidelity="exact")
        steps = store.snapshot(tmp_path / "copy")
        assert any(step.copied >= 4 for step in iter(lambda: next(steps), None))
        store.delete(b"00", b"11")
        store.put(b"01", value(100), fidelity="exact")
        store.drain()
        last = list(steps)[-1]
        assert (last.copied, last.lost) == (10, 0)
    with Store.open(tmp_path / "copy", framework="numpy") as copy:
        assert copy.match([b"00"]) == copy.match([b"11"]) == 0
        assert copy.get(b"01").tensors["x"][0] == 100
        assert all(copy.get(b"%02d" % i).tensors["x"][0] == i for i in range(2, 11))


def test_records_that_leave_and_move_after_the_copy_leave_the_copy_alone(tmp_path):
    with Store.open(tmp_path / "data", framework="numpy") as store:
        for i in range(20):
            store.put(b"%d" % i, {"x": np.full(40_000, i, np.float32)}, fidelity="exact")
        list(store.snapshot(tmp_path / "copy"))
        store.delete(*[b"%d" % i for i in range(20)])  # punches their blocks: a hard link would lose them here
    with Store.open(tmp_path / "copy", framework="numpy") as copy:
        assert sum(copy.get(b"%d" % i) is not None for i in range(20)) == 20
        copy.delete(b"0")
    with Store.open(tmp_path / "data", framework="numpy") as store:
        assert store.get(b"0") is None


def test_a_chain_keeps_its_order_and_facts_in_a_snapshot(tmp_path):
    with Store.open(tmp_path / "data", framework="numpy") as store:
        store.put_many([(b"root", value(1)), (b"leaf", value(2))], chain=True, namespace="llama@01")
        store.pin(b"leaf")
        list(store.snapshot(tmp_path / "copy"))
    with Store.open(tmp_path / "copy", framework="numpy") as copy:
        info = copy.inspect(b"leaf")
        assert info.namespace == "llama@01" and info.pinned
        copy.unpin(b"leaf")
        copy.delete(b"root")
        assert copy.get(b"leaf") is None  # the link is there: it went with its root


def test_a_damaged_record_is_left_out_and_counted(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, 200_000, np.uint8)  # over 64 KiB: it is not gathered meanwhile
    with Store.open(tmp_path / "data", framework="numpy") as store:
        store.put(b"good", value(1), fidelity="exact")
        store.put(b"bad", {"x": noise}, fidelity="exact")
    with Store.open(tmp_path / "data", framework="numpy") as store:  # in memory there is a good copy no more
        for segment in (tmp_path / "data" / "segments").iterdir():
            data = segment.read_bytes()
            segment.write_bytes(data.replace(noise[5000:5040].tobytes(), bytes(40)))
        last = list(store.snapshot(tmp_path / "copy"))[-1]
        assert (last.copied, last.lost) == (1, 1)


@pytest.mark.parametrize("kind", ["full", "file", "link", "relative", "no parent", "partial"])
def test_a_directory_that_cannot_take_a_snapshot_is_refused_with_a_sentence(tmp_path, kind):
    target = tmp_path / "copy"
    wanted = {
        "full": "not empty", "file": "no directory", "link": "no directory", "relative": "absolute path",
        "no parent": "is not there", "partial": "interrupted; remove it",
    }[kind]  # fmt: skip
    if kind == "full":
        target.mkdir()
        (target / "mine").touch()
    elif kind == "file":
        target.touch()
    elif kind == "link":
        (tmp_path / "other").mkdir()
        target.symlink_to(tmp_path / "other")
    elif kind == "relative":
        target = target.relative_to(tmp_path)
    elif kind == "no parent":
        target = target / "below"
    else:
        (tmp_path / "copy.partial").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Store.open(tmp_path / "data") as store:
        with pytest.raises(ConfigError, match=wanted):
            store.snapshot(target)
    assert [path for path in sorted(tmp_path.rglob("*")) if "data" not in path.parts] == before


def test_a_file_system_without_room_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(copying.SystemDisk, "room", lambda *_: (1000, 10**9))
    with Store.open(tmp_path / "data") as store:
        with pytest.raises(ConfigError, match="has room for 1,000 bytes"):
            list(store.snapshot(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.partial").exists()


def test_a_snapshot_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "BATCH_MAX", 2)
    with Store.open(tmp_path / "data", framework="numpy") as store:
        for i in range(10):
            store.put(b"%d" % i, value(i))
        steps = store.snapshot(tmp_path / "copy")
        while next(steps).copied < 2:
            pass
        assert (tmp_path / "copy.partial").is_dir()
        steps.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


KILLED = """
import os, signal, sys
import numpy as np
from kvstore import Store
from kvstore.disk import copying
copying.BATCH_MAX = 2
with Store.open(sys.argv[1] + "/data", framework="numpy") as store:
    for i in range(10):
        store.put(b"%d" % i, {"x": np.full(1000, i, np.float32)})
    for step in store.snapshot(sys.argv[1] + "/copy"):
        if step.copied >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_snapshot_that_is_killed_is_never_taken_for_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, "10"], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "copy").exists()
    with Store.open(tmp_path / "data") as store, pytest.raises(ConfigError, match=r"copy\.partial is there"):
        store.snapshot(tmp_path / "copy")


def test_the_command_line_says_where_and_how_much_and_refuses_with_exit_code_2(daemon):
    client = daemon.client(framework="numpy")
    client.put(b"k", value(1))
    target = daemon.directory / "there"
    target.mkdir(mode=0o755)
    assert re.search(r"there: [1-9]\d* entries, \d", run(daemon, "snapshot", target))
    assert mode(target) == 0o700 and (target / "tenants.secret").stat().st_size == 32
    assert re.search(rf"snapshot made directory={target} entries=[1-9]", daemon.log)
    assert re.search(r"admin verb=Admin/Snapshot who=local peer=unix:\S* keys=0 first=- result=OK", daemon.log)
    assert "not empty" in run(daemon, "snapshot", target, code=2)
    assert "is not there: make it" in run(daemon, "snapshot", daemon.directory / "no" / "parent", code=2)
    assert json.loads(run(daemon, "fsck", "--data-dir", target, "--json", where=()))["corrupt"] == 0


def test_a_client_that_goes_away_ends_its_snapshot(daemon):
    client = daemon.client(framework="numpy")
    for i in range(20):
        client.put(b"%d" % i, value(i))
    target = daemon.directory / "given-up"
    steps = client.snapshot(str(target))
    next(steps)
    steps.close()
    told = json.loads(run(daemon, "snapshot", daemon.directory / "second", "--json"))  # after it on the daemon
    assert told["entries"] >= 20
    assert not (target / "cold").exists() or (target / "cold" / "STATE").exists()


@pytest.mark.parametrize("below", ["", "cold"])
def test_import_puts_a_snapshot_into_another_directory_and_chains_stay_chains(tmp_path, below):
    with Store.open(tmp_path / "data", framework="numpy") as store:
        store.put_many([(b"root", value(1)), (b"leaf", value(2))], chain=True, namespace="llama@01")
        (tmp_path / "copy").mkdir()
        list(store.snapshot(tmp_path / "copy" / below))
    with Store.open(tmp_path / "new" / "cold", framework="numpy") as store:
        store.put(b"own", value(3))
    words = ["import", "--data-dir", str(tmp_path / "new"), "--ttl-s", "86400", "--json", str(tmp_path / "copy")]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(done.stdout) == {"entries": 2, "refused": []}
    with Store.open(tmp_path / "new" / "cold", framework="numpy") as store:
        assert store.get(b"own") is not None
        info = store.inspect(b"leaf")
        assert info.namespace == "llama@01" and 86_000 < info.ttl_left_s <= 86_400
        assert store.get(b"root").tensors["x"].shape == (1000,)
        store.delete(b"root")
        assert store.get(b"leaf") is None
