"""docs/api.md: what the docstrings say now, and all that is public. Its links are checked with the other pages'."""

import inspect
import re
import subprocess
import sys

import pytest

import kvstore
import kvstored_client
from kvstore import Store
from kvstore.errors import KvstoreError
from kvstored_client import Client
from tests.conftest import ROOT

PAGE = ROOT / "docs/api.md"


def sections() -> dict[str, str]:
    """By heading, what is below it."""
    parts = re.split(r"^#{2,4} (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_is_what_the_docstrings_say():
    done = subprocess.run([sys.executable, "tools/api_docs.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == PAGE.read_text(), "docs/api.md is behind the docstrings; run: make docs"


def test_everything_that_the_packages_offer_is_in_it():
    told = sections()
    names = {*kvstore.__all__, *kvstored_client.__all__} - {"__version__", "aio", "errors", "TensorInfo"}
    assert names <= set(told)
    assert "TensorSpec" in told  # TensorInfo is another name of it
    assert "kvstored_client.aio.Client" in PAGE.read_text()  # the same verbs


@pytest.mark.parametrize("kind", [Store, Client])
def test_every_verb_has_a_signature_and_a_sentence(kind):
    told = sections()
    verbs = [name for name, _ in inspect.getmembers(kind) if not name.startswith("_") and name != "config"]
    assert len(verbs) > 20
    for name in verbs:
        text = told[f"{kind.__name__}.{name}"]
        assert re.search(rf"```python\n{name}[(:]", text), name
        assert len(text.partition("```\n")[2].strip()) > 15, name


def test_every_error_says_when_it_is_raised():
    told = sections()
    due, seen = [KvstoreError], set()
    while due:
        kind = due.pop()
        seen.add(kind.__name__)
        due += [each for each in kind.__subclasses__() if each.__module__ == "kvstore.errors"]
    assert all(len(told[name].strip()) > 15 for name in seen)
