"""A key may be any bytes-like object, in every verb: what is checked is what is used."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import errors

from .conftest import Harness

VALUE = {"x": torch.ones(8)}
OTHER = {"x": torch.zeros(8)}


class Liar(bytes):
    """Bytes that say they are others, and longer."""

    def __bytes__(self) -> bytes:
        return b"another key"

    def __len__(self) -> int:
        return 200


KINDS: dict[str, Callable[[bytes], Any]] = {
    "bytearray": bytearray,
    "memoryview": memoryview,
    "every second byte": lambda key: memoryview(b"".join(bytes([c, 0]) for c in key))[::2],
    "a view of words": lambda key: memoryview(key).cast("H"),
    "numpy": np.bytes_,
    "a subclass": Liar,
}
VERBS: dict[str, Callable[[Any, Any], object]] = {
    "put": lambda cache, key: cache.put(key, OTHER),
    "put under a parent": lambda cache, key: cache.put(b"child", OTHER, parent=key),
    "put_many": lambda cache, key: cache.put_many([(key, OTHER)]),
    "put_many from a generator": lambda cache, key: cache.put_many((key, OTHER) for _ in range(1)),
    "put_many, a chain": lambda cache, key: cache.put_many([(key, OTHER), (b"child", OTHER)], chain=True),
    "put_many under a parent": lambda cache, key: cache.put_many([(b"child", OTHER)], chain=True, parent=key),
    "get": lambda cache, key: cache.get(key).key,
    "get_many": lambda cache, key: [hit.key for hit in cache.get_many([key, key])],
    "get_many from a generator": lambda cache, key: [hit.key for hit in cache.get_many(key for _ in range(2))],
    "get_many, leading": lambda cache, key: [hit.key for hit in cache.get_many([key], leading=True)],
    "lease": lambda cache, key: _leased(cache.lease(key)),
    "lease_many": lambda cache, key: _leased(cache.lease_many([key])),
    "match": lambda cache, key: cache.match([key]),
    "locate": lambda cache, key: cache.locate([key]),
    "touch": lambda cache, key: cache.touch([key], ttl_s=5),
    "pin": lambda cache, key: cache.pin(key),
    "unpin": lambda cache, key: cache.unpin(key),
    "demote": lambda cache, key: cache.demote(key),
    "promote": lambda cache, key: cache.promote(key),
    "inspect": lambda cache, key: cache.inspect(key).key,
    "explain": lambda cache, key: cache.explain(key)[0].state,
    "entries": lambda cache, key: [info.key for info in cache.entries(key_prefix=key)],
    "evict": lambda cache, key: cache.evict(key),
    "delete": lambda cache, key: cache.delete(key),
}


def _leased(block: Any) -> list[bytes]:
    with block as hits:
        return [hit.key for hit in ([hits] if hasattr(hits, "key") else hits)]


def held(cache: Any) -> dict[bytes, tuple[float, bool, tuple[str, ...]]]:
    """Every key, its first value, whether it is pinned, and where it is."""
    return {info.key: (float(cache.get(info.key).tensors["x"][0]), info.pinned, info.tiers) for info in cache.entries()}


def test_every_verb_takes_any_bytes_like_key_for_the_bytes_that_it_holds(harness: Harness) -> None:
    """A put of a bytearray stored the value and raised TypeError; put_many of a generator stored nothing."""
    cache = harness.cache

    def seen(call: Callable[[Any, Any], object], key: Any) -> tuple[object, dict[bytes, Any]]:
        cache.delete(b"some key", b"child")
        cache.put(b"some key", VALUE)
        return call(cache, key), held(cache)

    for verb, call in VERBS.items():
        expected = seen(call, b"some key")
        for kind, made in KINDS.items():
            found = seen(call, made(b"some key"))
            assert found == expected, f"{verb} of {kind}"
            assert all(type(key) is bytes for key in found[1]), f"{verb} of {kind}"


NO_KEYS: tuple[Any, ...] = ("text", 5, None, b"", b"x" * 257, bytearray(), bytearray(257), memoryview(b""))


def test_every_verb_refuses_what_is_no_key_and_changes_nothing(harness: Harness) -> None:
    cache = harness.cache
    cache.put(b"some key", VALUE)
    before = held(cache)
    for key, (verb, call) in itertools.product(NO_KEYS, VERBS.items()):
        if key is None and "parent" in verb:
            continue  # no parent
        if verb == "entries" and key is not None and key in (b"", bytearray(), memoryview(b"")):
            continue  # every key begins so
        with pytest.raises(errors.InvalidEntry):
            call(cache, key)
            pytest.fail(f"{verb} took {key!r}")
    assert held(cache) == before


def test_a_view_that_was_released_is_no_key(harness: Harness) -> None:
    view = memoryview(b"some key")
    view.release()
    with pytest.raises(errors.InvalidEntry, match="released"):
        harness.cache.put(view, VALUE)


def test_a_key_that_the_caller_changes_after_the_call_was_taken_as_it_was(harness: Harness) -> None:
    cache = harness.cache
    key, parent = bytearray(b"key"), bytearray(b"parent")
    cache.put(parent, VALUE)
    cache.put(key, VALUE, parent=parent)
    leased = cache.lease_many([key])
    key[:] = b"abc"
    parent[:] = b"nobody"
    assert held(cache).keys() == {b"key", b"parent"}
    assert _leased(leased) == [b"key"]
    assert cache.delete(b"parent") == 1
    assert held(cache) == {}, "the child went with the parent it was put under"


def test_one_key_is_not_a_sequence_of_keys(harness: Harness) -> None:
    cache = harness.cache
    keys: Any
    calls = (cache.get_many, cache.match, cache.locate, cache.touch, cache.lease_many)
    for keys, call in itertools.product((5, None, b"key", bytearray(b"key"), "key"), calls):
        with pytest.raises(errors.InvalidEntry, match="sequence of keys"), _entered(call(keys)):
            pass


def _entered(found: Any) -> Any:
    return found


class Fresh(Mapping[str, Any]):
    """Makes its tensors whenever it is asked: larger ones each time."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked += 1
        return torch.ones(4 * self.asked)

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def test_the_tensors_that_were_measured_are_those_that_are_stored(harness: Harness) -> None:
    assert harness.cache.put(b"key", Fresh())
    hit, info = harness.cache.get(b"key"), harness.cache.inspect(b"key")
    assert hit.tensors["x"].shape == (4,)
    assert info.value_nbytes == 16
