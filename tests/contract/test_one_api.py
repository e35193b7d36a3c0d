"""Embedded and remote are one API: the same verbs with the same parameters."""

import inspect

import pytest

from kvstore.prefix import Namespace
from kvstore.store import Store
from kvstored_client import Client, aio

VERBS = [
    "put", "put_many", "get", "get_many", "match", "locate", "touch", "delete", "evict", "pin", "unpin",
    "demote", "promote", "inspect", "entries", "stats", "namespace", "close",
]  # fmt: skip
EMBEDDED_ONLY = {"local", "own"}
"""own: tensors are handed over without a copy. local: the daemon's own, where no thread may wait for other hosts."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_the_same_parameters_on_both(verb: str) -> None:
    embedded, remote = (
        {
            name: (p.kind, p.default)
            for name, p in inspect.signature(getattr(kind, verb)).parameters.items()
            if name not in EMBEDDED_ONLY
        }
        for kind in (Store, Client)
    )
    assert embedded == remote


@pytest.mark.parametrize("verb", [name for name in vars(Client) if not name.startswith("_")])
def test_an_asyncio_client_has_every_verb_with_the_same_parameters(verb: str) -> None:
    theirs, ours = (inspect.signature(getattr(kind, verb)) for kind in (Client, aio.Client))
    assert list(theirs.parameters.values()) == list(ours.parameters.values())


def test_an_asyncio_namespace_has_every_verb() -> None:
    assert {name for name in vars(Namespace) if not name.startswith("_")} <= set(dir(aio.Namespace))
