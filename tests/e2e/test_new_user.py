"""tools/new_user.py, which takes minutes: what it takes out of the pages is there, and it tells what a step came to."""

import importlib.util
import re
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def played() -> ModuleType:
    spec = importlib.util.spec_from_file_location("new_user", ROOT / "tools/new_user.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_user"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["new_user"]


def test_the_pages_have_what_the_new_user_takes_out_of_them(played):
    first, second = played.blocks("README.md", "sh")[0].strip().splitlines()
    assert re.search(r"--index-url (\S+)", first)
    assert "[daemon" in second
    assert len([code for code in played.blocks("README.md", "python") if "Client()" in code]) == 1
    five, client = played.blocks("docs/deployment.md", "sh")[:2]
    assert len(five.strip().splitlines()) == 5
    assert "tls:cache-host:7070" in client
    assert "KVSTORED_TLS_CA=ca.pem" in client
    _, settings = played.blocks("docs/deployment.md", "toml")
    assert "/etc/kvstored/tokens.toml" in settings
    (scrape,) = [block for block in played.blocks("docs/operations.md", "yaml") if "scrape_configs" in block]
    assert "127.0.0.1:9411" in scrape


def test_a_step_is_told_with_its_time_and_a_failed_one_ends_with_exit_code_1(played, monkeypatch, capsys, tmp_path):
    def fails(_):
        raise AssertionError("what it said")

    def skips(_):
        raise played.Skipped("no such program here")

    user = played.User(tmp_path, tmp_path, "linked")
    monkeypatch.setattr(played, "STEPS", {"one": lambda _: "fine", "two": skips})
    assert played.play(user)
    told = capsys.readouterr().out
    assert re.search(r"^ok +\d+\.\d s  one: fine$", told, re.MULTILINE)
    assert re.search(r"^skipped +\d+\.\d s  two: no such program here$", told, re.MULTILINE)
    monkeypatch.setattr(played, "STEPS", {"install": fails, "after": lambda _: "never reached"})
    assert not played.play(user)
    told = capsys.readouterr().out
    assert "FAILED" in told and "what it said" in told and "never reached" not in told


def test_more_than_ten_minutes_are_too_long(played, monkeypatch, tmp_path):
    monkeypatch.setattr(played, "STEPS", {"one": lambda _: "fine"})
    monkeypatch.setattr(played, "LIMIT_S", 0.0)
    assert not played.play(played.User(tmp_path, tmp_path, "linked"))
