"""[store.shared]: what is refused, with the setting and the value in the message."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from kvstore.config import SharedConfig, StoreConfig, from_mapping
from kvstore.errors import ConfigError
from kvstore.store import Store

GOOD: dict[str, Any] = {"url": "valkeys://a:6379,b:6379", "secret_file": "share.key", "key_files": {"*": "seal.key"}}


def shared(**settings: Any) -> SharedConfig:
    return from_mapping(StoreConfig, {"shared": {**GOOD, **settings}}).shared


def test_three_lines_are_enough():
    found = shared(buffer_nbytes="16MiB")
    assert (found.buffer_nbytes, found.ttl_s, found.tokens_min, found.admission) == (16 << 20, 3600.0, 512, "all")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": ""}, "store.shared.secret_file is set and store.shared.url is not"),
        ({"url": "memcached://a:1"}, r"one of valkey://, valkeys://, redis://, rediss://, s3://, got 'memcached'"),
        ({"url": "valkey://me:hunter2@a:1"}, r"credentials_file"),
        ({"secret_file": ""}, r"store\.shared\.secret_file is missing"),
        ({"key_files": {}}, r"or set clear = true"),
        ({"clear": True}, r"contradict"),
        ({"ttl_s": 0}, r"store\.shared\.ttl_s must be from 1"),
        ({"lookup_s": 0}, r"store\.shared\.lookup_s"),
        ({"fetch_s": 1e9}, r"store\.shared\.fetch_s"),
        ({"admission": "some"}, r"store\.shared\.admission must be one of all, reused, ghost"),
        ({"buffer_nbytes": 5}, r"store\.shared\.buffer_nbytes"),
        ({"prefill_tokens_per_s": -1}, r"store\.shared\.prefill_tokens_per_s"),
        ({"cert_file": "c.pem"}, r"belong together"),
        ({"tokens_mim": 1}, r"did you mean shared\.tokens_min"),
    ],
)
def test_a_mistake_is_refused_with_the_setting_in_the_message(settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        shared(**settings)
    assert "hunter2" not in str(refused.value)


def test_a_secret_that_is_missing_open_to_others_or_no_secret_is_refused(hosts):
    hosts.secret.write_text("not 64 digits")
    with pytest.raises(ConfigError, match="must hold 64 hexadecimal digits"):
        hosts.open()
    hosts.secret.write_text("1" * 64)
    hosts.secret.chmod(0o644)
    with pytest.raises(ConfigError, match=r"store\.shared\.secret_file"):
        hosts.open()
    hosts.secret.unlink()
    with pytest.raises(ConfigError, match=r"store\.shared\.secret_file: cannot read"):
        hosts.open()


def test_a_refused_store_leaves_its_directory_to_the_next(hosts, tmp_path):
    text = hosts.secret.read_text()
    hosts.secret.write_text("none")
    with pytest.raises(ConfigError):
        hosts.open(cold=tmp_path / "cold")
    hosts.secret.write_text(text)
    assert hosts.open(cold=tmp_path / "cold").shares


def test_a_seal_key_that_is_missing_is_refused_by_its_own_setting(hosts):
    hosts.seal.unlink()
    with pytest.raises(ConfigError, match=r"store\.shared\.key_files: cannot read"):
        hosts.open()


def test_an_engine_without_an_url_is_refused(hosts):
    with pytest.raises(ConfigError, match=r"store\.shared\.url"):
        Store.open(replace(StoreConfig()), engine=object(), background=False)


def test_a_store_that_shares_nothing_imports_no_client_of_a_shared_store():
    code = (
        "import sys; from kvstore.store import Store; Store.open(background=False).close(); "
        "print([m for m in ('redis', 'hiredis', 'obstore', 'kvstore.shared.open') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
