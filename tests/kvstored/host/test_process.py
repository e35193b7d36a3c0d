"""What a daemon locks and writes when others can put names where it works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstored.access.tenant_view import read_secret
from kvstored.host.process import DirectoryLock
from tests.strangers import STRANGER, why_not

needs_root = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_a_lock_truncates_nothing_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for make in (os.symlink, os.link):
        make(tmp_path / "precious", tmp_path / "k.sock.lock")
        with pytest.raises(ConfigError, match="remove it"):
            DirectoryLock(tmp_path / "k.sock.lock", "k.sock")
        (tmp_path / "k.sock.lock").unlink()
        assert (tmp_path / "precious").read_text() == "mine"
    os.mkfifo(tmp_path / "k.sock.lock")
    with pytest.raises(ConfigError, match="remove it"):
        DirectoryLock(tmp_path / "k.sock.lock", "k.sock")


@needs_root
@pytest.mark.parametrize("what", ["directory", "lock", "link"])
def test_what_another_user_made_is_not_used(tmp_path: Path, what: str) -> None:
    # Not sticky: there fs.protected_symlinks, where it is on, has the kernel refuse before we do.
    (tmp_path / "real").mkdir()
    place = tmp_path / "kvstored-0"
    if what == "link":
        place.symlink_to(tmp_path / "real")
        os.lchown(place, STRANGER, STRANGER)
    else:
        place.mkdir()
        (place / "k.sock.lock").write_text("theirs")
        os.chown(place if what == "directory" else place / "k.sock.lock", STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="3001"):
        DirectoryLock(place / "k.sock.lock", "k.sock")
    if what != "link":
        assert (place / "k.sock.lock").read_text() == "theirs"


@pytest.mark.parametrize(("mode", "may"), [(0o777, False), (0o775, True), (0o1777, True), (0o750, True)])
def test_a_directory_where_anybody_may_replace_names_is_not_used(tmp_path: Path, mode: int, may: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    if may:  # /tmp, or a volume made for a pod's group: each file in it is checked by itself
        DirectoryLock(tmp_path / "run" / "k.lock", "k").release()
    else:
        with pytest.raises(ConfigError, match=r"everybody may write to the directory .*chmod"):
            DirectoryLock(tmp_path / "run" / "k.lock", "k")


def test_the_tenants_secret_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "known").write_bytes(bytes(32))
    (tmp_path / "tenants.secret").symlink_to(tmp_path / "known")
    with pytest.raises(ConfigError, match="symbolic link"):
        read_secret(tmp_path / "tenants.secret")
    (tmp_path / "tenants.secret").unlink()
    assert len(read_secret(tmp_path / "tenants.secret")) == 32


SERVES = """
import gc, os, signal, sys
from pathlib import Path
import kvstored.server
from kvstored.settings import load_settings

def notify(text):
    if text.startswith("READY"):
        print(gc.get_freeze_count(), len(gc.get_objects()))
        os.kill(os.getpid(), signal.SIGTERM)

kvstored.server.notify = notify
sys.exit(kvstored.server.serve(load_settings(Path(sys.argv[1]))))
"""


def test_a_collection_of_garbage_does_not_look_at_what_was_there_at_the_start(tmp_path: Path) -> None:
    """Modules alone are 180,000 objects: each full collection stopped every call for a tenth of a second."""
    config = tmp_path / "kvstored.toml"
    config.write_text(
        f'[server]\naddress = "unix:{tmp_path}/k.sock"\ndata_dir = "{tmp_path}/data"\nmetrics_address = ""\n'
        '[store.hot]\ncapacity_nbytes = "16MiB"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", SERVES, str(config)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    frozen, looked_at = map(int, done.stdout.split())
    assert frozen > 20 * looked_at
