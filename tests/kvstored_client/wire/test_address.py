"""Where the daemon is looked for."""

import os

import pytest

from kvstored_client.wire.address import default_address, parse_address, runtime_directory, socket_path


def test_the_environment_names_the_address():
    assert default_address({"KVSTORED_ADDRESS": "tcp:10.0.0.1:7411"}) == "tcp:10.0.0.1:7411"


def test_the_runtime_directory_of_the_service_manager_comes_first():
    assert (
        default_address({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/x"}) == "unix:/run/a/kvstored.sock"
    )


def test_root_has_run_and_a_user_his_session_or_a_directory_of_his_own(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(runtime_directory({"XDG_RUNTIME_DIR": "/x"})) == "/run/kvstored"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert str(runtime_directory({"XDG_RUNTIME_DIR": "/x"})) == "/x/kvstored"
    assert runtime_directory({}).name == "kvstored-1000"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("/run/k.sock", "unix:/run/k.sock"),
        ("unix:/run/k.sock", "unix:/run/k.sock"),
        ("unix:///run/k.sock", "unix:/run/k.sock"),
        ("tcp:127.0.0.1:7411", "127.0.0.1:7411"),
        ("localhost:7411", "localhost:7411"),
        ("tcp:[::1]:7411", "[::1]:7411"),
    ],
)
def test_addresses_become_targets(text, target):
    assert parse_address(text) == target
    assert (socket_path(target) is None) == (not target.startswith("unix:"))


@pytest.mark.parametrize("text", ["", "unix:", "host", "tcp:host", "host:port", "host:70000", "unix:/" + "x" * 120])
def test_what_is_no_address_is_refused_with_a_sentence(text):
    with pytest.raises(ValueError, match=r"address|socket"):
        parse_address(text)


@pytest.mark.parametrize("text", ["http://localhost:9000", "https://cache-host:7411/", "grpc://host:1"])
def test_an_address_of_the_web_is_refused_and_told_what_to_write(text):
    """It was taken for a host, and every get was a miss with a DNS error in the log."""
    with pytest.raises(ValueError, match=r"speaks gRPC, not (http|https|grpc): write unix:PATH, tcp:HOST:PORT"):
        parse_address(text)
