"""Who may call: tokens, rights, tenants, TLS, and what is written down about it."""

import os
import re
import signal
import stat
from collections.abc import Callable

import numpy as np
import pytest

from kvstore.errors import ConfigError, InvalidEntry, PermissionDenied, TierUnavailable
from kvstore.store import Store
from kvstored.access.tenant_view import TenantView, TenantViews
from kvstored.access.tokens import LOCAL, NOBODY, Tokens, digest, make_token, read_tokens
from kvstored_client import Client
from tests.conftest import free_port, wait_until
from tests.kvstored.conftest import running_daemon

TENSORS = {"x": np.arange(64, dtype=np.uint8)}
PEOPLE = {
    "reader": ("team-a", ["read"]),
    "writer-a": ("team-a", ["read", "write"]),
    "writer-b": ("team-b", ["read", "write"]),
    "whole": (None, ["read", "write"]),
    "admin": (None, ["read", "admin"]),
}
OWN = {name: make_token() for name in PEOPLE}


def write_tokens(path, people=PEOPLE):
    text = ""
    for name, (tenant, rights) in people.items():
        text += f'[[token]]\nname = "{name}"\nsha256 = "{digest(OWN[name])}"\nrights = {rights!r}\n'.replace("'", '"')
        text += f'tenant = "{tenant}"\n' if tenant else ""
    path.write_text(text)


@pytest.fixture(scope="module")
def guarded():
    with running_daemon('tokens = "{dir}/tokens.toml"\ntoken_on_unix = true') as daemon:
        write_tokens(daemon.directory / "tokens.toml")
        daemon.start(wait=False)
        wait_until(lambda: daemon.socket_path.exists() or daemon.process.poll() is not None)
        assert daemon.process.poll() is None, daemon.log
        yield daemon


@pytest.fixture
def client_of(guarded, tmp_path, monkeypatch):
    made = []

    def make(name=None, token=None):
        path = tmp_path / f"{name}.token"
        if name is None and token is None:
            monkeypatch.delenv("KVSTORED_TOKEN_FILE", raising=False)
        else:
            path.write_text((token or OWN[name]) + "\n")
            monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(path))
        client = Client(guarded.address, on_error="raise", framework="numpy", timeout_s=60)
        client.locate([b"connect now, while the variable says so"]) if name and name != "nobody" else None
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def test_without_a_token_or_with_a_wrong_one_nothing_is_answered(client_of):
    for client in (client_of(), client_of("nobody", token=make_token())):
        for call in (lambda c: c.get(b"k"), lambda c: c.put(b"k", TENSORS), lambda c: c.stats()):
            with pytest.raises(PermissionDenied, match="token"):
                call(client)


def test_rights_are_those_of_the_file(client_of):
    reader, admin = client_of("reader"), client_of("admin")
    assert reader.get(b"nothing") is None
    for call in (lambda: reader.put(b"k", TENSORS), lambda: reader.delete(b"k"), lambda: reader.pin(b"k")):
        with pytest.raises(PermissionDenied, match=r"reader has the rights read; .* needs write"):
            call()
    for call in (reader.stats, lambda: list(reader.entries()), lambda: reader.evict(b"k"), reader.drain):
        with pytest.raises(PermissionDenied, match="needs admin"):
            call()
    assert admin.stats().values["uptime_s"] > 0
    with pytest.raises(PermissionDenied, match="needs write"):
        admin.put(b"k", TENSORS)


def test_another_tenants_key_is_simply_absent(client_of):
    a, b, reader = client_of("writer-a"), client_of("writer-b"), client_of("reader")
    key = b"the same key"
    assert a.put(key, TENSORS)
    assert np.array_equal(reader.get(key).tensors["x"], TENSORS["x"])  # the same tenant
    assert b.get(key) is None
    assert b.match([key]) == 0
    assert b.locate([key]) == [None]
    assert b.touch([key]) == b.delete(key) == b.pin(key) == b.unpin(key) == 0
    assert a.get(key) is not None
    assert b.put(key, {"x": np.zeros(3, np.uint8)})
    assert a.get(key).tensors["x"].size == 64
    assert a.delete(key) == 1
    assert b.get(key).tensors["x"].size == 3


def test_an_operator_lists_and_evicts_by_tenant(guarded, client_of, monkeypatch):
    a, b, admin = client_of("writer-a"), client_of("writer-b"), client_of("admin")
    assert a.put(b"listed", TENSORS, namespace="model")
    assert b.put(b"listed", TENSORS, namespace="model")
    mine = list(admin.entries(tenant="team-a", namespace="model"))
    assert [(info.tenant, info.namespace, info.key[-6:]) for info in mine] == [("team-a", "model", b"listed")]
    assert {info.tenant for info in admin.entries(namespace="model")} == {"team-a", "team-b"}
    values = admin.stats().values
    assert values["tenant_entries_team-a"] >= 1
    assert values["namespace_entries_team-a/model"] == 1
    assert admin.evict(*[info.key for info in mine]) == 1
    assert a.get(b"listed") is None
    assert b.get(b"listed") is not None


def test_keys_as_long_as_any_are_kept_apart_too(client_of):
    a, b = client_of("writer-a"), client_of("writer-b")
    long = bytes(range(256))
    assert a.put(long, TENSORS)
    assert a.get(long) is not None
    assert b.get(long) is None
    assert a.get(long[:-1]) is None


def test_admin_verbs_and_refusals_are_in_the_audit_log_and_no_secret_is(guarded, client_of):
    admin, reader = client_of("admin"), client_of("reader")
    admin.evict(b"some key", b"another")
    with pytest.raises(PermissionDenied):
        reader.evict(b"some key")
    with pytest.raises(PermissionDenied):
        client_of("nobody", token=make_token()).get(b"k")
    for line in (
        rf"kvstored.audit admin verb=Admin/Evict who=admin peer=unix:\S* keys=2 first={b'some key'.hex()} result=OK",
        r"verb=Admin/Evict who=reader peer=\S+ keys=0 first=- result=PERMISSION_DENIED",
        r"verb=Cache/Get who=nobody peer=\S+ keys=0 first=- result=UNAUTHENTICATED",
    ):
        wait_until(lambda line=line: re.search(line, guarded.log), line)
    log = guarded.log
    for secret in (*OWN.values(), "kvd_", (guarded.directory / "data/tenants.secret").read_bytes().hex()):
        assert secret not in log


def test_a_reload_takes_new_tokens_and_a_broken_file_changes_nothing(guarded, client_of):
    path = guarded.directory / "tokens.toml"
    fresh = make_token()
    client = client_of("nobody", token=fresh)
    with pytest.raises(PermissionDenied):
        client.get(b"k")
    before = path.read_text()
    path.write_text(before + f'[[token]]\nname = "new"\nsha256 = "{digest(fresh)}"\nrights = ["read"]\n')
    try:
        guarded.signal(signal.SIGHUP)
        wait_until(lambda: "reloaded tokens=6" in guarded.log)
        assert client.get(b"k") is None
        path.write_text("[[token]]\nname = 'x'\n")
        guarded.signal(signal.SIGHUP)
        wait_until(lambda: "reload failed" in guarded.log)
        assert client.get(b"k") is None
    finally:
        path.write_text(before)


def test_the_tenants_secret_is_the_daemons_alone(guarded):
    path = guarded.directory / "data/tenants.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[token]]\nname='a'\nsha256='12'\nrights=['read']", "sha256 must be 64"),
        ("[[token]]\nname='a b'\nsha256='" + "0" * 64 + "'\nrights=['read']", "name must be"),
        ("[[token]]\nname='a'\nsha256='" + "0" * 64 + "'\nrights=[]", "rights must name some of read, write, admin"),
        ("[[token]]\nname='a'\nsha256='" + "0" * 64 + "'\nrights=['root']", "rights must"),
        ("[[token]]\nname='a'\nsha256='" + "0" * 64 + "'\nrights=['admin']\ntenant='t'", "sees every tenant"),
        ("[[token]]\nname='a'\nsha256='" + "0" * 64 + "'\nrights=['read']\nextra=1", "unknown key 'extra'"),
        ("[[tokens]]\nname='a'", "unknown table 'tokens'"),
        ("token = 1", r"under \[\[token\]\]"),
    ],
)
def test_a_wrong_tokens_file_is_refused_with_a_sentence(tmp_path, text, message):
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tokens(path)


def test_the_file_holds_no_token_and_a_token_is_found_by_its_digest(tmp_path):
    write_tokens(tmp_path / "tokens.toml")
    text = (tmp_path / "tokens.toml").read_text()
    assert not any(token in text for token in OWN.values())
    tokens = read_tokens(tmp_path / "tokens.toml")
    assert tokens.of_token(OWN["reader"]).name == "reader"
    assert tokens.of_token(OWN["reader"] + "x") is None
    assert Tokens().of_token("") is None


def test_a_tenants_view_has_no_verb_that_sees_others():
    view = TenantView(None, bytes(32), "a")
    for verb in ("entries", "inspect", "stats", "evict", "drain", "namespace", "close"):
        with pytest.raises(PermissionDenied):
            getattr(view, verb)
    other = TenantView(None, bytes(32), "b")
    assert view.own(b"k") != other.own(b"k")
    assert view.own(b"k") != TenantView(None, os.urandom(32), "a").own(b"k")


def test_who_has_not_been_identified_has_no_part_of_the_store():
    with Store.open(background=False) as store:
        views = TenantViews(store, bytes(32))
        assert views[LOCAL.tenant] is views.whole(LOCAL) is store
        for _ in range(2):
            with pytest.raises(InvalidEntry):
                _ = views[NOBODY.tenant]
        with pytest.raises(PermissionDenied):
            views.whole(NOBODY)


def test_tls_with_a_token_and_a_certificate_replaced_without_a_restart(authority, tmp_path, monkeypatch):
    certificate, key = authority.sign("first", "server")
    port = free_port()
    server = f'tokens = "{tmp_path}/tokens.toml"\ntls_certificate = "{certificate}"\ntls_key = "{key}"'
    write_tokens(tmp_path / "tokens.toml")
    (tmp_path / "t").write_text(OWN["whole"])
    with running_daemon(server, address=f"tls:localhost:{port}") as daemon:
        daemon.start()
        monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
        monkeypatch.setenv("KVSTORED_TLS_CA", str(authority.ca))
        with Client(f"tls:localhost:{port}", on_error="raise", framework="numpy", timeout_s=60) as client:
            assert client.put(b"k", TENSORS)
            assert client.get(b"k") is not None
        assert common_name_served(port) == "first"
        authority.sign("second", "server")
        assert common_name_served(port) == "second"
        with Client(f"tls:localhost:{port}", on_error="raise", framework="numpy", timeout_s=60) as client:
            assert client.get(b"k") is not None
        monkeypatch.delenv("KVSTORED_TOKEN_FILE")
        nobody = Client(f"tls:localhost:{port}", on_error="raise", timeout_s=60)
        plain = Client(f"tcp:localhost:{port}", on_error="raise", timeout_s=5)
        with nobody, pytest.raises(PermissionDenied, match="a token is needed"):
            nobody.get(b"k")
        with plain, pytest.raises(TierUnavailable):
            plain.get(b"k")


def common_name_served(port):
    import ssl
    import subprocess

    pem = ssl.get_server_certificate(("localhost", port), timeout=10)
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-subject"], input=pem, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().rpartition("= ")[2].rpartition("=")[2].strip()


def test_mutual_tls_names_the_caller_by_its_certificate(authority, tmp_path, monkeypatch):
    certificate, key = authority.sign("server", "server")
    own, own_key = authority.sign("worker-c", "client")
    stranger, stranger_key = authority.sign("stranger", "stranger")
    port = free_port()
    (tmp_path / "tokens.toml").write_text('[[certificate]]\nname = "worker-c"\nrights = ["read"]\n')
    server = (
        f'tokens = "{tmp_path}/tokens.toml"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n'
        f'tls_client_ca = "{authority.ca}"'
    )
    address = f"tls:localhost:{port}"
    with running_daemon(server, address=address) as daemon:
        daemon.start()
        monkeypatch.setenv("KVSTORED_TLS_CA", str(authority.ca))
        with Client(address, on_error="raise", timeout_s=5) as nobody, pytest.raises(TierUnavailable):
            nobody.get(b"k")
        monkeypatch.setenv("KVSTORED_TLS_CERTIFICATE", str(own))
        monkeypatch.setenv("KVSTORED_TLS_KEY", str(own_key))
        with Client(address, on_error="raise", timeout_s=60) as client:
            assert client.get(b"k") is None
            with pytest.raises(PermissionDenied, match="worker-c has the rights read"):
                client.put(b"k", TENSORS)
        monkeypatch.setenv("KVSTORED_TLS_CERTIFICATE", str(stranger))
        monkeypatch.setenv("KVSTORED_TLS_KEY", str(stranger_key))
        with Client(address, on_error="raise", timeout_s=60) as client, pytest.raises(PermissionDenied):
            client.get(b"k")


def test_a_token_is_never_sent_in_the_clear_to_another_host(tmp_path, monkeypatch):
    (tmp_path / "t").write_text(make_token())
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
    with pytest.raises(ValueError, match="unencrypted"):
        Client("tcp:cache.example.org:7411")


def test_anybody_may_not_be_let_in_by_mistake(tmp_path):
    from kvstored.settings import load_settings

    with pytest.raises(ConfigError, match=r"needs server\.tls_certificate"):
        load_settings(environ={}, address="tls:0.0.0.0:1")
    environ = {"KVSTORED_SERVER__TLS_CERTIFICATE": "c", "KVSTORED_SERVER__TLS_KEY": "k"}
    with pytest.raises(ConfigError, match=r"set server.tokens or server.tls_client_ca"):
        load_settings(environ=environ, address="tls:0.0.0.0:1")
    assert load_settings(environ={**environ, "KVSTORED_SERVER__TLS_CLIENT_CA": "a"}, address="tls:0.0.0.0:1")
    with pytest.raises(ConfigError, match="both or neither"):
        load_settings(environ={"KVSTORED_SERVER__TLS_KEY": "k"})
    with pytest.raises(ConfigError, match=r"needs server\.tokens"):
        load_settings(environ={"KVSTORED_SERVER__TOKEN_ON_UNIX": "true"})


@pytest.mark.parametrize("entry_of", ["mine", "somebody else's"])
def test_shared_memory_is_for_users_the_tokens_file_names(tmp_path, monkeypatch, entry_of):
    """The kernel says whose process is on the lease socket; gRPC's sockets cannot, there it is the token."""
    uid = os.geteuid() if entry_of == "mine" else 424242
    with running_daemon('tokens = "{dir}/tokens.toml"\ntoken_on_unix = true') as daemon:
        people = {name: PEOPLE[name] for name in ("writer-a", "admin")}
        path = daemon.directory / "tokens.toml"
        write_tokens(path, people)
        path.write_text(path.read_text().replace('name = "writer-a"\n', f'name = "writer-a"\nuid = {uid}\n'))
        monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
        (tmp_path / "t").write_text(OWN["admin"])
        daemon.start(wait=False)
        wait_until(daemon.socket_path.exists)
        with Client(daemon.address, on_error="raise", framework="numpy", timeout_s=60) as admin:
            assert admin.stats().values["uptime_s"] >= 0
            (tmp_path / "t").write_text(OWN["writer-a"])
            with Client(daemon.address, on_error="raise", framework="numpy", timeout_s=60) as client:
                assert client.put(b"k", TENSORS)
                assert np.array_equal(client.get(b"k").tensors["x"], TENSORS["x"])
                assert (admin.stats().values["lease_connections"] > 0) == (entry_of == "mine")
            keys = [info.key for info in admin.entries()]
        assert len(keys) == 1
        assert keys[0].endswith(b"k")
        assert len(keys[0]) == 1 + 16  # behind the tenant's prefix, whichever way it came


def test_a_users_rights_hold_on_the_lease_socket_too(tmp_path, monkeypatch):
    with running_daemon('tokens = "{dir}/tokens.toml"\ntoken_on_unix = true') as daemon:
        path = daemon.directory / "tokens.toml"
        write_tokens(path, {"reader": PEOPLE["reader"]})
        path.write_text(path.read_text().replace('name = "reader"\n', f'name = "reader"\nuid = {os.geteuid()}\n'))
        (tmp_path / "t").write_text(OWN["reader"])
        monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
        daemon.start(wait=False)
        wait_until(daemon.socket_path.exists)
        with Client(daemon.address, on_error="raise", framework="numpy", timeout_s=60) as client:
            assert client.get(b"k") is None
            # A put asks for shared memory first, which whoever may not put does not get.
            calls = {"ingest": lambda: client.put(b"k", TENSORS), "delete": lambda: client.delete(b"k")}
            for verb, call in calls.items():
                asked = rf"verb=Lease/{verb} who=reader peer=lease:{os.geteuid()}"
                line = rf"{asked} keys=\d+ first=\S+ result=PERMISSION_DENIED"

                # Again: on a busy machine the lease socket may answer too late, and the stream takes the call.
                def is_refused_there(line: str = line, call: Callable[[], object] = call) -> bool:
                    with pytest.raises(PermissionDenied, match="reader has the rights read"):
                        call()
                    return re.search(line, daemon.log) is not None

                wait_until(is_refused_there, line)
