"""From [store.shared] to an engine: urls, files with secrets, and an installation without the extra."""

import subprocess
import sys

import pytest

from kvstore.clock import SystemClock
from kvstore.config import SharedConfig
from kvstore.errors import ConfigError
from kvstore.shared import SharedUnavailable
from kvstore.shared.addresses import Address, S3Url, ValkeyUrl, parse_url
from kvstore.shared.open import open_engine
from tests.conftest import ROOT, environment


def config(url, **options):
    return SharedConfig(url=url, secret_file=__file__, clear=True, **options)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("valkey://a", ValkeyUrl((Address("a", 6379),), tls=False)),
        ("redis://a:1,b:2,c", ValkeyUrl((Address("a", 1), Address("b", 2), Address("c", 6379)), tls=False)),
        ("valkeys://10.0.0.1:7000/0", ValkeyUrl((Address("10.0.0.1", 7000),), tls=True)),
        ("rediss://[::1]:6380,[fe80::1]/", ValkeyUrl((Address("::1", 6380), Address("fe80::1", 6379)), tls=True)),
        ("s3://bucket", S3Url("bucket", "")),
        ("s3://my.bucket-1/kv/of-us/", S3Url("my.bucket-1", "kv/of-us")),
        (
            "s3://bucket/p?endpoint=http://127.0.0.1:9000&region=eu-1&path_style=false",
            S3Url("bucket", "p", "http://127.0.0.1:9000", "eu-1", path_style=False),
        ),
    ],
)
def test_a_url_means_servers_or_a_bucket(url, meant):
    assert parse_url(url) == meant


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://a", "must begin with one of valkey://"),
        ("a:6379", "must begin with one of"),
        ("valkey://", "a server is HOST:PORT"),
        ("valkey://a,,b", "a server is HOST:PORT"),
        ("valkey://a:0", "from 1 to 65535, got 0"),
        ("valkey://a:70000", "from 1 to 65535, got 70000"),
        ("valkey://a:x", "a server is HOST:PORT or .*, got 'a:x'"),
        ("valkey://a/3", "only database 0"),
        ("valkey://a?timeout=3", "takes no options"),
        ("valkey://" + ",".join(["a"] * 65), "names 65 servers, at most 64"),
        ("s3://B", "a bucket's name"),
        ("s3://bucket/a//b", "a prefix is"),
        ("s3://bucket/../b", "a prefix is"),
        ("s3://bucket?endpont=http://h", "did you mean endpoint"),
        ("s3://bucket?endpoint=h:9000", "endpoint is http://HOST:PORT"),
        ("s3://bucket?path_style=yes", "path_style is true or false"),
    ],
)
def test_a_url_that_means_nothing_is_refused_with_the_value(url, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "valkey://user:hunter2@a", "valkeys://:hunter2@a:1,b:2", "redis://hunter2@a", "s3://AKIA:hunter2@bucket/p",
        "s3://bucket/p?secret_access_key=hunter2", "s3://bucket?password=hunter2", "valkey://a?password=hunter2",
    ],
)  # fmt: skip
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="credentials_file") as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text, mode=0o600, name="credentials"):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


def test_an_engine_opens_while_its_servers_are_down(file):
    credentials = file('username = "u"\npassword = "p"\n')
    engine = open_engine(config("valkey://127.0.0.1:1", credentials_file=credentials), SystemClock())
    with pytest.raises(SharedUnavailable):
        engine.heads(["a"], 5.0)
    assert "p" not in repr(engine.engine.nodes.login).replace("tls", "").replace("Login", "")
    engine.close()
    keys = file('access_key_id = "a"\nsecret_access_key = "b"\n', name="keys")
    open_engine(config("s3://bucket?endpoint=http://127.0.0.1:1", credentials_file=keys), SystemClock()).close()


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        ('password = "hunter2"', 0o604, "everybody on this host can read .*chmod o-r"),
        ('password = "hunter2"', 0o620, "its group can write"),
        ('password = "hunter2"', 0o606, "everybody on this host can write"),
        ('pasword = "hunter2"', 0o600, "unknown name; did you mean password"),
        ('username = "hunter2"', 0o600, "lacks password"),
        ("password = hunter2", 0o600, "is TOML, lines like password"),
        ("password = 5", 0o600, "password in .* must be text"),
        ('password = ""', 0o600, "password in .* must be text that is not empty"),
        ('access_key_id = "hunter2"', 0o600, "unknown name"),
    ],
)
def test_credentials_that_others_can_read_or_that_say_something_else_are_refused(file, text, mode, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        open_engine(config("valkey://a", credentials_file=file(text, mode)), SystemClock())
    assert "hunter2" not in str(caught.value)
    assert "store.shared.credentials_file" in str(caught.value)


def test_credentials_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match="cannot read /nowhere: No such file"):
        open_engine(config("valkey://a", credentials_file="/nowhere"), SystemClock())


@pytest.mark.parametrize(
    ("url", "options", "sentence"),
    [
        ("valkey://a", {"ca_file": "x"}, "ca_file is set and the url is not valkeys://"),
        ("s3://bucket", {"ca_file": "x"}, "ca_file is for Valkey and Redis"),
        ("valkeys://a", {"ca_file": "/nowhere"}, "ca_file: there is no file /nowhere"),
        ("valkeys://a", {"ca_file": __file__}, "is no PEM certificate"),
    ],
)
def test_files_of_tls_that_cannot_be_used_are_refused(url, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        open_engine(config(url, **options), SystemClock())


BLOCKED = """
import sys
import kvstore.store, kvstore.shared.open
assert not {"redis", "hiredis", "obstore"} & set(sys.modules)
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("redis", "hiredis", "obstore"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from kvstore.clock import SystemClock
from kvstore.config import SharedConfig
from kvstore.errors import ConfigError
for url in ("valkey://a", "rediss://a", "s3://bucket"):
    try:
        kvstore.shared.open.open_engine(SharedConfig(url=url, secret_file="x", clear=True), SystemClock())
    except ConfigError as error:
        assert "pip install 'kvstored[shared]'" in str(error), error
    else:
        raise SystemExit(f"{url} opened")
"""


def test_nothing_of_the_extra_is_imported_before_a_url_asks_for_it_and_without_it_the_answer_is_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
