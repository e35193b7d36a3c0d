"""The prefix layer over each implementation."""

from typing import Any

import numpy as np
import pytest
import torch

from kvstore.errors import InvalidEntry
from kvstore.keys import Identity, chunk_keys
from kvstore.prefix import Namespace
from kvstored_client import aio

from .conftest import Harness

MODEL: dict[str, Any] = {
    "model": "m",
    "revision": "r1",
    "dtype": "float32",
    "layers": 2,
    "kv_heads": 3,
    "head_dim": 8,
    "layout": "lthd",
}


def kv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of so many tokens; the same seed gives the same prefix."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(tokens, 2, 3, 8, generator=generator).transpose(0, 1)
    return k, k + 1


def namespace(harness: Harness, **changes: Any) -> Namespace:
    """A namespace of 16-token chunks."""
    ns = harness.cache.namespace(**{**MODEL, **changes}, chunk_tokens=16)
    assert isinstance(getattr(ns, "of", ns), Namespace | aio.Namespace)
    return ns  # type: ignore[no-any-return]


def test_the_longest_cached_prefix_comes_back(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(40)
    tokens = list(range(40))
    assert ns.put_prefix(tokens, k, v) == 3
    n, got_k, got_v = ns.get_prefix(tokens)
    assert n == 40
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    n, got_k, _ = ns.get_prefix([*range(32), 99, 100])
    assert n == 32
    assert torch.equal(got_k, k[:, :32])


def test_a_longer_prompt_finds_the_partial_tail_of_a_shorter_one(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(40)
    ns.put_prefix(list(range(40)), k, v)
    n, got_k, _ = ns.get_prefix(list(range(70)))
    assert n == 40
    assert torch.equal(got_k, k)


def test_a_miss_is_zero_tokens(harness: Harness) -> None:
    ns = namespace(harness)
    assert ns.get_prefix([1, 2, 3]) == (0, None, None)
    assert ns.get_prefix([]) == (0, None, None)


def test_the_same_tokens_after_another_prefix_are_another_key(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(32)
    ns.put_prefix([*range(16), *range(16)], k, v)
    n, _, _ = ns.get_prefix([*range(100, 116), *range(16)])
    assert n == 0


def test_chunks_already_held_are_not_sent_again(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(48)
    assert ns.put_prefix(list(range(32)), k[:, :32], v[:, :32]) == 2
    assert ns.put_prefix(list(range(48)), k, v) == 1
    assert ns.put_prefix(list(range(48)), k, v) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "r2"},
        {"dtype": "bfloat16"},
        {"model": "n"},
        {"rope": {"theta": 1e6}},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_rank": 0, "pp_size": 2},
        {"fidelity": "exact"},
    ],
)
def test_another_identity_never_hits(harness: Harness, change: dict[str, Any]) -> None:
    k, v = kv(16)
    namespace(harness).put_prefix(list(range(16)), k, v)
    n, _, _ = namespace(harness, **change).get_prefix(list(range(16)))
    assert n == 0


@pytest.mark.timeout(120)
def test_a_prefix_of_several_chunks_is_pinned_as_it_is_put(harness: Harness) -> None:
    """It never returned: the deepest chunk waited for the one before it, which is put after it."""
    ns, (k, v) = namespace(harness), kv(48)
    tokens = list(range(48))
    assert ns.put_prefix(tokens[:16], k[:, :16], v[:, :16]) == 1
    assert ns.put_prefix(tokens, k, v, pin=True) == 2
    infos = [harness.cache.inspect(key) for key in ns.keys(tokens)]
    assert [info is not None and info.pinned for info in infos] == [True, True, True]
    other = list(range(100, 148))
    assert ns.put_prefix(other, k, v, pin=True) == 3
    assert all(info is not None and info.pinned for info in map(harness.cache.inspect, ns.keys(other)))
    assert ns.unpin_prefix(other) == 3


def test_an_exact_namespace_is_exact_below_hot(harness: Harness) -> None:
    ns, (k, v) = namespace(harness, fidelity="exact"), kv(32)
    tokens = list(range(32))
    ns.put_prefix(tokens, k, v)
    harness.cache.demote(*ns.keys(tokens))
    n, got_k, got_v = ns.get_prefix(tokens)
    assert n == 32
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


def test_a_get_refreshes_the_whole_prefix(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(48)
    tokens = list(range(48))
    ns.put_prefix(tokens, k, v, ttl_s=10)
    for _ in range(3):
        harness.clock.advance(7)
        assert ns.get_prefix(tokens)[0] == 48
    harness.clock.advance(11)
    assert ns.get_prefix(tokens)[0] == 0


def test_a_put_of_a_longer_prompt_refreshes_the_part_already_held(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(48)
    ns.put_prefix(list(range(32)), k[:, :32], v[:, :32], ttl_s=10)
    harness.clock.advance(7)
    ns.put_prefix(list(range(48)), k, v, ttl_s=10)
    harness.clock.advance(7)
    assert ns.get_prefix(list(range(48)))[0] == 48


def test_eviction_takes_the_deepest_chunk_first(harness: Harness) -> None:
    ns = harness.cache.namespace(**{**MODEL, "fidelity": "exact"}, chunk_tokens=16)
    tokens = list(range(16 * 40))
    k, v = kv(len(tokens))
    ns.put_prefix(tokens, k, v)
    harness.cache.put(b"flood", {"x": torch.zeros(harness.hot_nbytes - 40_000, dtype=torch.uint8)}, fidelity="exact")
    tiers = [held.tier for held in ns.match_prefix(tokens).held]
    hot = tiers.count("hot")
    assert 0 < hot < 40
    assert tiers[:hot] == ["hot"] * hot


def test_numpy_prefixes_work_too(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(20)
    ns.put_prefix(np.arange(20), k.numpy(), v.numpy())
    n, got_k, _ = ns.get_prefix(torch.arange(20))
    assert n == 20
    assert torch.equal(torch.as_tensor(got_k), k)


def test_forget_takes_the_prefix_out(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(40)
    ns.put_prefix(list(range(40)), k, v)
    assert ns.forget(list(range(40))) == 3
    assert ns.get_prefix(list(range(40)))[0] == 0


def test_tensors_that_are_not_the_identitys_are_refused(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(16)
    for bad_k, bad_v in ((k[:, :15], v), (k.half(), v), (k, v[:1]), (k.transpose(0, 1), v)):
        with pytest.raises(InvalidEntry, match="this namespace holds float32"):
            ns.put_prefix(list(range(16)), bad_k, bad_v)
    with pytest.raises(InvalidEntry, match="token ids"):
        ns.put_prefix([-1] * 16, k, v)


def test_what_somebody_else_put_under_a_chunk_key_is_not_returned(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(32)
    tokens = list(range(32))
    ns.put_prefix(tokens, k, v)
    harness.cache.put(ns.keys(tokens)[1], {"k": torch.zeros(5), "v": torch.zeros(5)})
    assert ns.get_prefix(tokens)[0] == 16


@pytest.mark.parametrize(
    "change", [{"model": ""}, {"layers": 0}, {"layers": "2"}, {"tp_rank": 2}, {"tpu": 1}, {"fidelity": "best"}]
)
def test_an_identity_that_is_not_complete_and_sound_is_refused(harness: Harness, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidEntry):
        harness.cache.namespace(**{**MODEL, **change})
    without_revision = {name: value for name, value in MODEL.items() if name != "revision"}
    with pytest.raises(InvalidEntry, match="revision"):
        harness.cache.namespace(**without_revision)


def test_keys_are_frozen() -> None:
    """A change of this value makes every stored chunk unreachable: raise IDENTITY_VERSION knowingly or not at all."""
    identity = Identity(**MODEL)
    keys = chunk_keys(identity.digest(), [1, 2, 3, 4, 5], chunk_tokens=4)
    assert [key.hex()[:16] for key in keys] == GOLDEN


GOLDEN = ["0724b1ca4c268422", "826163a3931cda3e"]


def test_a_prefix_is_copied_to_where_the_caller_wants_it(harness: Harness) -> None:
    ns = namespace(harness)
    k, v = kv(40)
    ns.put_prefix(range(40), k, v)
    out = torch.full((2, 50, 3, 8), 9.0), torch.full((2, 50, 3, 8), 9.0)
    n, got_k, got_v = ns.get_prefix([*range(40), 100, 101], out=out)
    assert n == 40
    assert got_k.data_ptr() == out[0].data_ptr()
    assert torch.equal(out[0][:, :40], k)
    assert torch.equal(got_v, v)
    assert (out[1][:, 40:] == 9).all()
    arrays = np.zeros((2, 42, 3, 8), np.float32), np.zeros((2, 42, 3, 8), np.float32)
    assert ns.get_prefix(range(42), out=arrays)[0] == 40
    assert np.array_equal(arrays[0][:, :40], k.numpy())
    assert ns.get_prefix([7, 7, 7], out=out) == (0, None, None)


def test_out_that_cannot_take_the_prefix_is_refused(harness: Harness) -> None:
    ns = namespace(harness)
    k, v = kv(40)
    ns.put_prefix(range(40), k, v)
    good = torch.zeros(2, 40, 3, 8)
    for bad in (torch.zeros(2, 39, 3, 8), good.double(), torch.zeros(40)):
        with pytest.raises(InvalidEntry):
            ns.get_prefix(range(40), out=(good, bad))


def test_what_get_prefix_returns_is_the_callers_own(harness: Harness) -> None:
    ns = namespace(harness)
    k, v = kv(16)
    ns.put_prefix(range(16), k, v)
    _, got, _ = ns.get_prefix(range(16))
    got.zero_()
    assert torch.equal(ns.get_prefix(range(16))[1], k)


def test_a_prompt_that_nobody_will_continue_adds_nothing_and_keeps_what_is_held(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(48)
    tokens = list(range(48))
    ns.put_prefix(tokens[:16], k[:, :16], v[:, :16], ttl_s=10)
    harness.clock.advance(7)
    assert ns.put_prefix(tokens, k, v, no_store=True, ttl_s=10) == 0
    harness.clock.advance(7)
    assert ns.get_prefix(tokens)[0] == 16


def test_a_pinned_prefix_outlives_its_deadline_until_the_pin_lapses(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(32)
    tokens = list(range(32))
    ns.put_prefix(tokens, k, v, ttl_s=10)
    assert ns.pin_prefix(tokens, ttl_s=100) == 2
    harness.clock.advance(50)
    assert ns.match_prefix(tokens) == 2
    harness.clock.advance(51)
    assert ns.get_prefix(tokens)[0] == 32  # the lapsed pin's deadline starts anew
    harness.clock.advance(11)
    assert ns.get_prefix(tokens)[0] == 0


def test_letting_go_of_one_prompt_leaves_the_pin_of_another_on_what_they_share(harness: Harness) -> None:
    ns, (k, v) = namespace(harness), kv(48)
    first, second = list(range(32)), [*range(16), *range(100, 116)]
    ns.put_prefix(first, k[:, :32], v[:, :32], ttl_s=10)
    ns.put_prefix(second, k[:, :32], v[:, :32], ttl_s=10)
    assert ns.pin_prefix(first) == ns.pin_prefix(second) == 2
    assert ns.unpin_prefix(first) == 1
    harness.clock.advance(11)
    assert ns.get_prefix(first)[0] == 16
    assert ns.get_prefix(second)[0] == 32
