"""TLS, AUTH and ACLs: what a server demands, and what it keeps from being asked."""

import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress

import pytest

from kvstore.clock import SystemClock
from kvstore.config import SharedConfig
from kvstore.shared import SharedUnavailable
from kvstore.shared.open import open_engine

from .servers import Servers

SECRET = "not-a-secret"  # noqa: S105 - a test server's
RIGHTS = "~kvstored:* -@all +get +getrange +set +unlink +strlen +exists +ping +info +cluster +readonly +asking"
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def guarded_server():
    """Wants a password; its user for us may do what docs/shared.md lists, and no CONFIG."""
    servers = Servers()
    client = servers.client(servers.ports[0])
    client.execute_command("ACL", "SETUSER", "kvstored", "on", f">{SECRET}", *RIGHTS.split())
    client.execute_command("ACL", "SETUSER", "default", "off", "resetpass")
    client.close()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, a server for localhost and a client, all of an hour."""
    place = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "1",
            "-subj", "/CN=test authority")  # fmt: skip
    (place / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for who in ("server", "client"):
        new = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        openssl("req", *new)
        by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{who}.csr", *by, "-out", f"{who}.pem")
        (place / f"{who}.key").chmod(0o600)
    return place


class Terminator:
    """Speaks TLS in front of a server that does not: the wheel of Valkey is built without."""

    def __init__(self, certificates, port):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = context.wrap_socket(
            socket.create_server(("127.0.0.1", 0)), server_side=True, do_handshake_on_connect=False
        )
        self.port = self._server.getsockname()[1]
        self._behind = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                outside, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(outside,), daemon=True).start()

    def _serve(self, outside):
        """One thread for both directions: an SSL object is not to be read and written at once by two."""
        with suppress(OSError), outside, socket.create_connection(("127.0.0.1", self._behind)) as inside:
            outside.do_handshake()
            outside.settimeout(0.002)
            inside.settimeout(0.002)
            while True:
                for source, sink in ((outside, inside), (inside, outside)):
                    with suppress(TimeoutError):
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        sink.settimeout(10)
                        sink.sendall(data)
                        sink.settimeout(0.002)

    def close(self):
        self._server.close()


def credentials(tmp_path, password=SECRET):
    path = tmp_path / f"credentials-{password}"
    path.write_text(f'username = "kvstored"\npassword = "{password}"\n')
    path.chmod(0o600)
    return str(path)


def engine_of(url, **options):
    return open_engine(SharedConfig(url=url, secret_file=__file__, clear=True, **options), SystemClock())


def check_that_it_serves(engine):
    value = bytes(range(256)) * 20_000  # more than a piece
    assert engine.put([("kvstored:1:long", [value]), ("kvstored:1:short", [b"x" * 200])], 60, TIMEOUT_S) == [True, True]
    names = ["kvstored:1:long", "kvstored:1:short", "kvstored:1:none"]
    assert engine.get(names, [len(value), 200, 5], TIMEOUT_S) == [value, b"x" * 200, None]
    assert engine.heads(names, TIMEOUT_S) == [value[:96], b"x" * 96, None]
    assert engine.claim(names[:1], 1, TIMEOUT_S) == [True]
    assert engine.delete(names, TIMEOUT_S) == [True] * 3
    assert engine.get(names[:2], [len(value), 200], TIMEOUT_S) == [None, None]


def test_a_user_with_few_rights_can_do_all_that_is_needed(guarded_server, tmp_path):
    engine = engine_of(guarded_server.url, credentials_file=credentials(tmp_path))
    check_that_it_serves(engine)
    engine.close()


def test_what_an_acl_forbids_to_ask_is_a_complaint_that_it_cannot_be_checked(guarded_server, tmp_path):
    engine = engine_of(guarded_server.url, credentials_file=credentials(tmp_path))
    health = engine.health(TIMEOUT_S)
    assert health.nodes_up == 1
    assert any("CONFIG GET cannot be checked" in sentence for sentence in health.complaints)
    assert any("TIME cannot be checked" in sentence for sentence in health.complaints)
    engine.close()


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_and_none_are_told_as_that(guarded_server, tmp_path, password):
    files = {"credentials_file": credentials(tmp_path, password)} if password else {}
    engine = engine_of(guarded_server.url, **files)
    for _ in range(3):
        with pytest.raises(SharedUnavailable) as caught:
            engine.heads(["kvstored:1:a"], TIMEOUT_S)
    assert caught.value.reason == "denied"
    engine.close()


def test_a_name_that_the_acl_does_not_allow_is_refused_in_the_servers_words(guarded_server, tmp_path):
    engine = engine_of(guarded_server.url, credentials_file=credentials(tmp_path))
    with pytest.raises(SharedUnavailable, match="NOPERM"):
        engine.put([("other:a", [b"x"])], 60, TIMEOUT_S)
    engine.close()


def tls_files(certificates):
    return {
        "ca_file": str(certificates / "ca.pem"),
        "cert_file": str(certificates / "client.pem"),
        "key_file": str(certificates / "client.key"),
    }


def test_all_goes_over_tls_with_certificates_on_both_sides(guarded_server, tmp_path, certificates):
    front = Terminator(certificates, guarded_server.ports[0])
    for host in ("localhost", "127.0.0.1"):
        url = f"valkeys://{host}:{front.port}"
        engine = engine_of(url, credentials_file=credentials(tmp_path), **tls_files(certificates))
        check_that_it_serves(engine)
        engine.close()
    front.close()


@pytest.mark.parametrize("lacks", ["ca_file", "cert_file"])
def test_a_server_that_is_not_trusted_and_a_client_that_is_not_get_nothing(
    guarded_server, tmp_path, certificates, lacks
):
    front = Terminator(certificates, guarded_server.ports[0])
    files = tls_files(certificates)
    for name in [lacks] + ["key_file"] * (lacks == "cert_file"):
        del files[name]
    engine = engine_of(f"valkeys://localhost:{front.port}", credentials_file=credentials(tmp_path), **files)
    with pytest.raises(SharedUnavailable):
        engine.heads(["kvstored:1:a"], TIMEOUT_S)
    engine.close()
    front.close()


def test_a_key_file_that_everybody_reads_is_refused(certificates, tmp_path):
    shutil.copy(certificates / "client.key", tmp_path / "open.key")
    (tmp_path / "open.key").chmod(0o644)
    files = tls_files(certificates) | {"key_file": str(tmp_path / "open.key")}
    with pytest.raises(Exception, match="chmod o-r"):
        engine_of("valkeys://localhost", **files)


def test_debians_redis_speaks_tls_itself(certificates, tmp_path):
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server here (Debian's package speaks TLS, the wheel of Valkey does not)")
    servers = Servers(binary=binary, options=("--requirepass", SECRET), tls=certificates)
    try:
        path = tmp_path / "password"
        path.write_text(f'password = "{SECRET}"\n')
        path.chmod(0o600)
        engine = engine_of(
            f"rediss://localhost:{servers.ports[0]}", credentials_file=str(path), **tls_files(certificates)
        )
        check_that_it_serves(engine)
        engine.close()
    finally:
        servers.close()
