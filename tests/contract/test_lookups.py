"""Lookups of prefixes are counted where a prefix is asked for, each once, over each implementation."""

from typing import Any

import pytest
import torch

from kvstore.errors import InvalidEntry
from kvstore.lookup import Lookup

from .conftest import Harness
from .test_prefix import kv, namespace

X = {"x": torch.ones(8)}


def counted(harness: Harness, *names: str) -> tuple[float, ...]:
    """Some numbers of the store; without names keys asked for and found, then tokens."""
    values = harness.cache.stats().values
    names = names or ("lookup_keys", "lookup_hit_keys", "lookup_tokens", "lookup_hit_tokens")
    return tuple(values[name] for name in names)


def chain(harness: Harness, count: int) -> list[bytes]:
    """A chain of keys, put."""
    keys = [b"chain %d" % i for i in range(count)]
    harness.cache.put_many([(key, X) for key in keys], chain=True)
    return keys


def test_a_hundred_prompts_that_nobody_put_are_a_hundred_misses(harness: Harness) -> None:
    ns = namespace(harness)
    ns.put_prefix(list(range(32)), *kv(32))
    assert ns.get_prefix(list(range(32)))[0] == 32
    assert counted(harness, "hit_ratio", "token_hit_ratio") == (1, 1)
    for i in range(100):
        assert ns.get_prefix([1000 + i] * 32)[0] == 0
    assert counted(harness) == (202, 2, 101 * 32, 32)
    assert counted(harness, "lookup_misses_absent") == (100,)
    assert counted(harness, "hit_ratio")[0] < 0.01


def test_a_match_that_says_that_gets_follow_answers_and_counts_as_any_other(harness: Harness) -> None:
    keys = chain(harness, 3)
    assert harness.cache.match([*keys, b"absent"], lookup=Lookup(4, 64, 16, prefetch=True)) == 3
    assert counted(harness) == (4, 3, 64, 48)


@pytest.mark.parametrize("tokens", [1, 7, 15, 16, 17, 40])
def test_prompts_of_any_length_are_counted_with_all_their_tokens(harness: Harness, tokens: int) -> None:
    ns, prompt = namespace(harness), list(range(tokens))
    keys = -(-tokens // 16)
    assert ns.get_prefix(prompt)[0] == 0
    assert counted(harness) == (keys, 0, tokens, 0)
    ns.put_prefix(prompt, *kv(tokens))
    for verb in (ns.get_prefix, ns.get_prefix_hits):
        assert verb(prompt)[0] == tokens
    assert counted(harness) == (3 * keys, 2 * keys, 3 * tokens, 2 * tokens)


def test_the_partial_tail_of_a_shorter_prompt_counts_with_its_own_tokens(harness: Harness) -> None:
    ns = namespace(harness)
    ns.put_prefix(list(range(21)), *kv(21))
    assert ns.get_prefix(list(range(40)))[0] == 21
    assert counted(harness) == (3, 2, 40, 21)


@pytest.mark.parametrize("tokens", [9, 32, 40])
def test_a_match_followed_by_its_get_is_one_lookup(harness: Harness, tokens: int) -> None:
    ns, prompt = namespace(harness), list(range(tokens))
    keys = -(-tokens // 16)
    ns.match_prefix(prompt)
    ns.get_prefix(prompt)
    assert counted(harness) == (keys, 0, tokens, 0)
    assert counted(harness, "lookup_misses_absent") == (1,)
    ns.put_prefix(prompt, *kv(tokens))
    for i in range(2, 4):
        ns.match_prefix(prompt)
        ns.get_prefix(prompt)
        assert counted(harness) == (i * keys, (i - 1) * keys, i * tokens, (i - 1) * tokens)


GETS: dict[str, Any] = {
    "of all keys": lambda cache, keys, held: cache.get_many(keys, leading=True),
    "of what is held": lambda cache, keys, held: cache.get_many(keys[:held], leading=True),
    "in no order": lambda cache, keys, held: cache.get_many(keys[:held][::-1]),
    "one by one": lambda cache, keys, held: [cache.get(key) for key in keys[:held]],
}


@pytest.mark.parametrize("how", GETS)
def test_who_says_nothing_of_it_is_not_counted_twice_either(harness: Harness, how: str) -> None:
    keys = [*chain(harness, 4), b"more", b"still more"]
    held = harness.cache.match(keys)
    GETS[how](harness.cache, keys, held)
    assert counted(harness) == (6, 4, 0, 0)
    assert counted(harness, "lookup_misses_absent") == (1,)
    harness.cache.get(keys[0])
    assert counted(harness) == (7, 5, 0, 0)


def test_a_get_long_after_a_match_is_a_lookup_of_its_own(harness: Harness) -> None:
    keys = chain(harness, 2)
    harness.cache.match(keys)
    harness.clock.advance(61)
    harness.cache.get_many(keys)
    assert counted(harness)[:2] == (4, 4)


def test_a_get_of_what_was_put_since_the_match_is_a_lookup_of_its_own(harness: Harness) -> None:
    assert harness.cache.match([b"key"]) == 0
    harness.cache.put(b"key", X)
    assert harness.cache.get(b"key") is not None
    assert counted(harness)[:2] == (2, 1)


def test_putting_pinning_and_locating_look_nothing_up(harness: Harness) -> None:
    ns, prompt = namespace(harness), list(range(40))
    ns.put_prefix(prompt[:20], *kv(20))
    ns.put_prefix(prompt, *kv(40))
    ns.pin_prefix(prompt)
    ns.unpin_prefix(prompt)
    ns.forget(prompt)
    harness.cache.locate(ns.keys(prompt))
    assert counted(harness) == (0, 0, 0, 0)


def test_what_lies_behind_the_first_miss_of_a_long_chain_is_asked_for_too(harness: Harness) -> None:
    ns = namespace(harness)
    many = list(range(16 * 4200))  # in two calls, and each in several packets
    assert ns.get_prefix(many)[0] == 0
    assert counted(harness) == (4200, 0, len(many), 0)
    assert ns.match_prefix([5, *many[1:]]) == 0
    assert counted(harness) == (8400, 0, 2 * len(many), 0)
    harness.cache.get_many([b"%d" % i for i in range(1000)], leading=True)
    assert counted(harness)[0] == 9400


def test_a_miss_says_why_the_key_is_gone(harness: Harness) -> None:
    cache = harness.cache
    for key in (b"expired", b"evicted", b"deleted", b"parent"):
        cache.put(key, X, ttl_s=10 if key == b"expired" else 1000)
    cache.put(b"orphaned", X, parent=b"parent")
    cache.evict(b"evicted")
    cache.delete(b"deleted", b"parent")
    harness.clock.advance(11)
    gone = (b"expired", b"evicted", b"deleted", b"orphaned", b"absent")
    for key in gone:
        assert cache.match([key]) == 0
    names = [f"misses_{key.decode()}" for key in gone]
    assert counted(harness, *(f"lookup_{name}" for name in names)) == (1, 1, 1, 1, 1)
    assert cache.get_many(gone) == [None] * 5
    assert counted(harness, *names) == (1, 1, 1, 1, 1)
    assert counted(harness, *(f"lookup_{name}" for name in names)) == (1, 1, 1, 1, 1)  # of the same lookups


def test_prefill_saved_is_added_up(harness: Harness) -> None:
    cache = harness.cache
    cache.report(prefill_saved_s=2.5)
    for wrong in (-1.0, 86401.0, float("nan")):
        with pytest.raises(InvalidEntry, match="from 0 to 86400"):
            cache.report(prefill_saved_s=wrong)


def test_a_lookup_of_numbers_that_cannot_be_is_refused(harness: Harness) -> None:
    with pytest.raises(InvalidEntry, match=f"tokens must be from 0 to {1 << 30}, got {1 << 40}"):
        harness.cache.match([b"key"], lookup=Lookup(1, 1 << 40, 1))
    with pytest.raises(InvalidEntry, match="key_tokens must be from 0"):
        harness.cache.get_many([b"key"], lookup=Lookup(1, 1, 1 << 31))
    assert counted(harness)[:2] == (0, 0)
