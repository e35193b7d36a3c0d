"""The last release on what this version wrote, and this version on it again: nothing is lost, nothing comes back."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from kvstore.config import ColdConfig, StoreConfig
from kvstore.store import Store
from kvstored.access.tokens import digest, make_token

from .conftest import HERE, environment_of, release_daemon
from .contents import SEAL_KEY, kv

pytestmark = pytest.mark.slow


@pytest.fixture
def seal_key(tmp_path):
    (tmp_path / "seal.key").write_text(SEAL_KEY)
    (tmp_path / "seal.key").chmod(0o600)
    return tmp_path / "seal.key"


def run(monkeypatch, capsys, script, *arguments):
    """What a script prints that older versions run too, here in this process."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    importlib.import_module(script).main()
    return json.loads(capsys.readouterr().out)


def test_the_last_release_reads_what_this_version_wrote_and_this_one_what_that_left(
    tmp_path, release, seal_key, monkeypatch, capsys
):
    cold, deleted = tmp_path / "cold", {"root", "child", "grandchild", "other child", "kinds"}
    digests = run(monkeypatch, capsys, "write_directory", 2, cold, seal_key)
    done = subprocess.run(
        [sys.executable, str(HERE / "read_directory.py"), str(cold), str(seal_key), "root", "kinds"],
        env=environment_of(release), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs["version"].startswith(str(release))
    assert {name: theirs[name] for name in digests} == digests
    ours = run(monkeypatch, capsys, "read_directory", cold, seal_key)
    assert {name: ours[name] for name in digests if name not in deleted} == {
        name: digests[name] for name in digests if name not in deleted
    }
    assert not {"deleted", "deleted with its parent", "expired"} & set(theirs)
    assert not {*deleted, "deleted", "deleted with its parent", "expired"} & set(ours)


GET = """
import sys
from kvstore.config import ColdConfig, StoreConfig
from kvstore.store import Store
with Store.open(StoreConfig(cold=ColdConfig(path=sys.argv[1])), framework="numpy", background=False) as store:
    print(store.__class__.__module__, *(store.get(key.encode()) is not None for key in sys.argv[2:]))
"""


def test_what_auto_encodes_is_a_miss_to_the_last_release_and_never_another_value(release, tmp_path):
    """nf4-kv2 came after it. It deletes what it is asked for and cannot decode; the rest is there on the way back."""
    config = StoreConfig(cold=ColdConfig(path=str(tmp_path / "cold")))
    with Store.open(config, framework="numpy", background=False) as store:
        for key in (b"asked for", b"not asked for"):
            store.put(key, kv(24))
            assert store.demote(key) == 1
        store.put(b"exact", kv(24), fidelity="exact")
        store.drain()
        assert store.inspect(b"asked for").encoding == "nf4-kv2"
        decoded = store.get(b"asked for").tensors["k"].tobytes()
    done = subprocess.run(
        [sys.executable, "-c", GET, str(tmp_path / "cold"), "asked for", "exact"],
        env=environment_of(release), cwd="/", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["kvstore.store", "False", "True"], done.stderr
    with Store.open(config, framework="numpy", background=False) as store:
        assert store.get(b"asked for") is None
        assert store.get(b"not asked for").tensors["k"].tobytes() == decoded
        assert store.get(b"exact").tensors["k"].tobytes() == kv(24)["k"].tobytes()


OWN = {"red": make_token(), "blue": make_token(), "operator": make_token()}
X = {"x": np.arange(300_000, dtype=np.uint8)}


def test_daemons_of_both_versions_in_turn_keep_tenants_apart_and_their_entries(release, tmp_path, monkeypatch):
    """Old, new, old: each start reads what the one before it kept, for its tenant and for nobody else."""
    with release_daemon(release, 'tokens = "{dir}/tokens.toml"\ntoken_on_unix = true') as daemon:
        tokens = daemon.directory / "tokens.toml"
        text = ""
        for name, token in OWN.items():
            rights = 'rights = ["admin"]' if name == "operator" else f'tenant = "{name}"\nrights = ["read", "write"]'
            text += f'[[token]]\nname = "{name}"\nsha256 = "{digest(token)}"\n{rights}\n'
            (tmp_path / name).write_text(token)
            (tmp_path / name).chmod(0o600)
        tokens.write_text(text)
        tokens.chmod(0o600)

        def client_of(name):
            monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / name))
            client = daemon.client(framework="numpy")
            client.locate([b"connects, while the variable names the token"])
            return client

        for turn, version in enumerate((release, None, release)):
            daemon.release = version
            monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "operator"))
            daemon.start()
            red, blue = client_of("red"), client_of("blue")
            for before in range(turn):
                hit = red.get(b"key %d" % before)
                assert hit is not None, (turn, before)
                assert (hit.tensors["x"].tobytes(), hit.tier) == ((X["x"] + before).tobytes(), "cold")
                # Deleted from the disk by the version after the one that wrote it, and gone from then on.
                assert red.delete(b"to delete %d" % before) == (before == turn - 1)
            assert blue.get_many([b"key %d" % before for before in range(3)]) == [None] * 3
            assert red.put(b"key %d" % turn, {"x": X["x"] + turn}, fidelity="exact", namespace="model@1")
            assert red.put(b"to delete %d" % turn, X, fidelity="exact")
            for client in (red, blue):
                client.close()
            assert daemon.stop() == 0, daemon.log
        assert "corrupt" not in daemon.log
