"""A client of the last release against this daemon, and this client against a daemon of the last release: all verbs.

Through shared memory, over the unix socket's stream and over TCP, each answer is what a client of the daemon's own
version gets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstored.access.tokens import digest, make_token
from tests.conftest import environment, factory, free_port, wait_until

from .conftest import HERE, release_daemon

pytestmark = pytest.mark.slow


def every_verb(python, *doors, **extra):
    """What the client of an interpreter answered: where its package is, and for each door verb by verb."""
    environ = environment(**extra)
    if python != sys.executable:
        del environ["PYTHONPATH"]
    done = subprocess.run(
        [str(python), str(HERE / "every_verb.py"), *doors],
        env=environ, cwd="/", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, *told = json.loads(done.stdout)
    assert [one["failures"] for one in told] == [0] * len(told)
    return where, told


def doors(daemon):
    """Shared memory, the unix socket's stream, TCP."""
    unix, tcp = daemon.address.split(",")
    return "shared", unix, "stream", unix, "stream", tcp


def differences(told, wanted):
    """(door, verb, answer, the answer wanted), where they differ."""
    assert len(told) == len(wanted)
    return [
        (door, verb, one.get(verb), other.get(verb))
        for door, (one, other) in enumerate(zip(told, wanted, strict=True))
        for verb in one.keys() | other.keys()
        if one.get(verb) != other.get(verb)
    ]


@pytest.fixture(scope="module")
def today():
    """A daemon of today's that nobody else fills: what is told depends on what it holds."""
    with factory() as make:
        yield make(tcp=True)


@pytest.fixture(scope="module")
def wanted(today):
    """What this client is told by this daemon."""
    _, told = every_verb(sys.executable, *doors(today))
    assert [one["leased"] for one in told] == [1, 0, 0]  # in shared memory
    return told


def test_the_venv_of_the_last_release_has_its_client_and_nothing_of_today(release_python):
    code = "import kvstored_client, kvstore; print(kvstored_client.__file__, kvstore.__file__)\nimport torch"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(release_python), "-c", code], env=environ, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert "No module named 'torch'" in done.stderr
    assert done.stdout.count(str(release_python.parents[1])) == 2


def test_a_client_of_the_last_release_is_served_by_this_daemon(release_python, today, wanted):
    where, told = every_verb(release_python, *doors(today))
    assert where.startswith(str(release_python.parents[1]))
    assert differences(told, wanted) == []
    assert "Traceback" not in today.log


def test_this_client_is_served_by_a_daemon_of_the_last_release(release, wanted):
    with release_daemon(release, "insecure_tcp = true", f",tcp:127.0.0.1:{free_port()}") as daemon:
        daemon.start()
        mapped = Path(f"/proc/{daemon.pid}/environ").read_bytes()
        assert f"PYTHONPATH={release}".encode() in mapped
        assert Path(f"/proc/{daemon.pid}/cwd").readlink() == Path("/")
        _, told = every_verb(sys.executable, *doors(daemon))
        assert differences(told, wanted) == []
        assert "Traceback" not in daemon.log


ASK = """
import os, sys
import numpy as np
from kvstored_client import Client
for token in sys.argv[2:]:
    if token:
        os.environ["KVSTORED_TOKEN_FILE"] = token
    with Client(sys.argv[1], on_error="raise", framework="numpy", timeout_s=60) as cache:
        try:
            cache.put(b"k", {"x": np.arange(9)})
            print(cache.get(b"k").tensors["x"].tolist())
        except Exception as error:
            print(type(error).__name__, error)
"""


def test_a_client_of_the_last_release_is_asked_for_a_token_and_its_rights_hold(
    release_python, daemon_factory, tmp_path
):
    daemon = daemon_factory(server=f'tokens = "{tmp_path}/tokens.toml"\ntoken_on_unix = true', start=False)
    rights = {"reader": '["read"]', "writer": '["read", "write"]'}
    text = ""
    for name, right in rights.items():
        (tmp_path / name).write_text(token := make_token())
        text += f'[[token]]\nname = "{name}"\nsha256 = "{digest(token)}"\nrights = {right}\n'
    for path, content in ((tmp_path / "tokens.toml", text), (tmp_path / "wrong", make_token())):
        path.write_text(content)
    for path in tmp_path.iterdir():
        path.chmod(0o600)
    daemon.start(wait=False)
    wait_until(lambda: daemon.socket_path.exists() or daemon.process.poll() is not None)
    files = [str(tmp_path / name) for name in ("writer", "reader", "wrong")]
    done = subprocess.run(
        [str(release_python), "-c", ASK, daemon.address, "", *files],
        env={name: value for name, value in environment().items() if name != "PYTHONPATH"},
        cwd="/", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    without, writer, reader, wrong = done.stdout.splitlines()
    assert "PermissionDenied a token is needed" in without
    assert writer == str(list(range(9)))
    assert "PermissionDenied reader has the rights read; " in reader
    assert "PermissionDenied" in wrong
    assert "tokens file" in wrong
