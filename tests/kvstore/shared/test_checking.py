"""A check of the shared store says what it could not find out."""

from kvstore.shared import SharedUnavailable
from tests.kvstore.shared.memory import MemoryEngine


def test_a_store_whose_servers_do_not_tell_their_settings_in_time_is_not_called_fit(hosts, monkeypatch):
    """On a busy machine a server with `noeviction` passed: its probe was put and read, and its settings never came."""
    store = hosts.open()
    assert store.check_shared() == []

    def health(*_):
        raise SharedUnavailable("unreachable", "no server answers: Timeout")

    monkeypatch.setattr(MemoryEngine, "health", health)
    assert store.check_shared() == ["the servers' settings are not known: no server answers: Timeout"]
