"""Who is trusted at the other end of a unix socket, and that nothing goes to anybody else."""

import os
import select
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import TierUnavailable
from kvstored_client import Client
from kvstored_client.stream.transport import Line
from kvstored_client.wire import address, trust
from kvstored_client.wire.trust import VARIABLE, Place
from tests.strangers import STRANGER, in_child, why_not

needs_root = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
TENSORS = {"x": np.arange(1000)}


GREETING_MAX_NBYTES = 100
"""HTTP/2's preface and settings; a call waits for the listener's settings, which this one never sends."""


class Listener:
    """A process of another user's that takes connections at both sockets and says how many bytes came."""

    def __init__(self, path: Path, uid: int) -> None:
        self._read, write = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(write)
            assert os.read(self._read, 1) == b"!"
            return
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        ears = []
        for name, kind in ((path, socket.SOCK_STREAM), (address.lease_path(path), socket.SOCK_SEQPACKET)):
            ears.append(socket.socket(socket.AF_UNIX, kind))
            ears[-1].bind(str(name))
            ears[-1].listen()
            name.chmod(0o666)
        os.write(write, b"!")
        made = []
        while True:
            for sock in select.select([*ears, *made], [], [])[0]:
                if sock in ears:
                    made.append(sock.accept()[0])
                elif got := sock.recv(1 << 16):
                    os.write(write, b"%d " % len(got))
                else:
                    made.remove(sock)

    def received(self) -> str:
        os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)
        with os.fdopen(self._read) as pipe:
            return pipe.read()


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="kvt-") as top:  # short: a socket's path has 101 bytes
        Path(top).chmod(0o755)
        yield Path(top)


def try_all(where: Path, token: Path, monkeypatch) -> list[object]:
    token.write_text("kvd_secret")
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(token))
    with Client(f"unix:{where}", timeout_s=0.3, framework="numpy") as client:
        found = [client.put(b"k", TENSORS), client.get(b"k"), client.delete(b"k")]
        found.append(list(client.get_many([b"k"])))
    return found


@needs_root
@pytest.mark.parametrize("made_by", ["the stranger", "root, and left open to all", "the stranger, inside root's own"])
def test_nothing_is_sent_to_a_stranger_who_listens(directory, tmp_path, monkeypatch, made_by):
    inner = directory / "kvstored-0"
    inner.mkdir()
    if made_by == "the stranger":
        os.chown(inner, STRANGER, STRANGER)
    else:
        inner.chmod(0o777)
    listener = Listener(inner / "k.sock", STRANGER)
    if made_by == "the stranger, inside root's own":
        inner.chmod(0o755)
    assert try_all(inner / "k.sock", tmp_path / "t", monkeypatch) == [False, None, 0, [None]]
    assert listener.received() == ""


@needs_root
def test_a_user_who_is_named_is_trusted(directory, tmp_path, monkeypatch):
    inner = directory / "mine"
    inner.mkdir()
    os.chown(inner, STRANGER, STRANGER)
    listener = Listener(inner / "k.sock", STRANGER)
    monkeypatch.setenv(VARIABLE, str(STRANGER))
    try_all(inner / "k.sock", tmp_path / "t", monkeypatch)
    assert listener.received() != "", "the listener hears what is sent: the test above would notice"


def test_a_name_that_is_no_number_is_the_callers_mistake(directory, monkeypatch):
    monkeypatch.setenv(VARIABLE, "kvstored")
    with pytest.raises(ValueError, match="a user's number"):
        Client(f"unix:{directory}/k.sock")


@needs_root
def test_the_owner_of_a_directory_that_only_root_could_have_made_is_trusted():
    made = Path(tempfile.mkdtemp(prefix="kvstored-test-", dir="/run"))
    try:
        made.chmod(0o755)
        os.chown(made, STRANGER, STRANGER)
        assert Place(made / "k.sock", {}).users == {0, STRANGER}
        inner = made / "inner"
        inner.mkdir()
        os.chown(inner, STRANGER + 1, STRANGER + 1)
        with pytest.raises(TierUnavailable, match="its directory belongs to uid 3002"):
            Place(inner / "k.sock", {})
    finally:
        shutil.rmtree(made)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
@pytest.mark.parametrize("above", [False, True])
def test_where_others_may_put_a_socket_each_new_one_is_asked_who_listens(directory, mode, above):
    inner = directory / "open" / "mine" if above else directory / "open"
    inner.mkdir(parents=True)
    inner.chmod(0o700)
    (directory / "open").chmod(mode)
    path = inner / "k.sock"
    if above and mode == 0o1777:  # sticky: nobody renames what is in it
        assert not Place(path, {}).shared
        return
    with pytest.raises(FileNotFoundError):
        Line(f"unix:{path}")
    first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with first, second:
        first.bind(str(path))
        first.listen()
        line = Line(f"unix:{path}")
        assert line.is_current()
        second.bind(str(path) + "2")
        second.listen()
        path.with_name("k.sock2").rename(path)
        assert not line.is_current(), "gRPC would connect to it by itself"
        line.close()
        path.unlink()
        assert not line.is_current()


@needs_root
@pytest.mark.parametrize("at", ["the directory", "above it"])
def test_a_link_that_a_stranger_made_is_not_followed(directory, at):
    (directory / "real" / "mine").mkdir(parents=True)
    # Not in a sticky directory: there fs.protected_symlinks, where it is on, has the kernel refuse before we do.
    (directory / "link").symlink_to(directory / "real" / ("mine" if at == "the directory" else ""))
    os.lchown(directory / "link", STRANGER, STRANGER)
    where = directory / "link" / ("k.sock" if at == "the directory" else "mine/k.sock")
    with pytest.raises(TierUnavailable, match="is a link made by uid 3001"):
        Place(where, {})
    os.lchown(directory / "link", 0, 0)
    assert Place(where, {}).users == {0}


def test_a_line_is_not_used_once_its_directory_is_another_one(directory):
    """gRPC connects again by itself: whoever got a new directory there meanwhile must not be who it finds."""
    inner = directory / "mine"
    inner.mkdir(mode=0o700)
    line = Line(f"unix:{inner}/k.sock")
    assert line.is_current()
    inner.rename(directory / "was")
    assert not line.is_current()
    inner.mkdir(mode=0o700)
    assert not line.is_current(), "not even its inode's number is used again while the line is open"
    line.close()


@needs_root
def test_a_client_leaves_a_directory_that_was_replaced_and_finds_the_next_good_one(directory, tmp_path, monkeypatch):
    inner = directory / "mine"
    inner.mkdir()
    with Client(f"unix:{inner}/k.sock", timeout_s=0.3, framework="numpy", shared_memory=False) as client:
        assert client.get(b"k") is None  # nobody is there, and gRPC goes on trying
        inner.rename(directory / "was")
        inner.mkdir()
        os.chown(inner, STRANGER, STRANGER)
        listener = Listener(inner / "k.sock", STRANGER)
        assert client.get(b"k") is None
        # gRPC may have tried by itself before anybody looked: a greeting, the same for everybody, and no call.
        assert sum(map(int, listener.received().split())) <= GREETING_MAX_NBYTES
        assert client._transport._line == {}


def test_the_overflow_user_is_not_this_user_in_a_namespace(monkeypatch):
    monkeypatch.setattr(trust, "overflow_uid", os.geteuid)
    monkeypatch.setattr(trust, "_WHOLE_MAP", ["another"])
    assert not trust._is_somebody(os.geteuid())
    monkeypatch.undo()
    assert trust._is_somebody(os.geteuid())


def test_a_user_id_over_two_to_the_31_is_read_unsigned():
    class Sock:
        def getsockopt(self, *_):
            return bytes.fromhex("01000000feffffff01000000") if sys.byteorder == "little" else b""

    assert trust.peer_uid(Sock()) == (1 << 32) - 2


@pytest.fixture
def service(directory, monkeypatch):
    monkeypatch.setattr(address, "SERVICE_DIRECTORY", directory / "service")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return directory / "service"


def test_a_client_finds_the_service_where_its_own_daemon_is_not(directory, service):
    environ = {"XDG_RUNTIME_DIR": str(directory)}
    own = directory / "kvstored" / "kvstored.sock"
    assert address.default_address(environ) == f"unix:{own}"
    service.mkdir()
    assert address.default_address(environ) == f"unix:{service}/kvstored.sock"
    assert address.listening_address(environ) == f"unix:{own}", "a daemon listens at its own"
    own.parent.mkdir()
    own.touch()
    assert address.default_address(environ) == f"unix:{own}"
    assert address.default_address({**environ, "KVSTORED_ADDRESS": "tcp:h:1"}) == "tcp:h:1"


@needs_root
def test_who_may_not_enter_the_services_directory_is_sent_there_all_the_same(directory):
    (directory / "service").mkdir(mode=0o700)

    def task() -> int:
        address.SERVICE_DIRECTORY = directory / "service"
        os.setuid(STRANGER)
        sys.stdout.write(address.default_address({"XDG_RUNTIME_DIR": str(directory)}))
        return 0

    assert in_child(task) == (0, f"unix:{directory}/service/kvstored.sock")
