"""What every cache promises, embedded or over the wire: one suite, each test over each implementation."""

import ml_dtypes
import numpy as np
import pytest
import torch

from kvstore import errors
from kvstore.arrays import as_bytes
from kvstore.dtypes import BY_NAME
from kvstore.stats import errors_of

from .conftest import Harness


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits of any type: NaN payloads, infinities and denormals included. Bools are 0 or 1."""
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return torch.randint(0, 2, shape, dtype=torch.uint8).to(torch.bool)
    nbytes = BY_NAME[dtype].itemsize
    count = int(np.prod(shape, dtype=np.int64))
    bits = torch.randint(0, 256, (count * nbytes,), dtype=torch.uint8)
    return bits.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


def same_bits(a: object, b: object) -> bool:
    """Equal down to the last bit, NaN payloads included."""
    return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and bool((as_bytes(a) == as_bytes(b)).all())


def test_a_value_comes_back_as_it_was_put(harness: Harness) -> None:
    k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8)
    assert harness.cache.put(b"key", {"k": k, "v": v})
    harness.clock.advance(5)
    hit = harness.cache.get(b"key")
    assert hit is not None
    assert same_bits(hit.tensors["k"], k)
    assert same_bits(hit.tensors["v"], v)
    assert (hit.key, hit.tier, hit.encoding, hit.lossy) == (b"key", "hot", "raw", False)
    assert hit.age_s == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("chain", [False, True])
def test_of_two_entries_under_one_key_the_later_one_is_kept_and_both_count(harness: Harness, chain: bool) -> None:
    """Over the wire a batch is cut into several: a chain that names a key twice became a ring of chunks."""
    others = [b"%d" % n for n in range(514)]  # more than a packet of the lease socket takes
    keys = [b"twice", *others, b"twice"]
    entries = [(key, {"x": torch.full((4,), i)}) for i, key in enumerate(keys)]
    assert harness.cache.put_many(entries, chain=chain) == len(keys)
    hit = harness.cache.get(b"twice")
    assert hit is not None
    assert hit.tensors["x"].tolist() == [len(keys) - 1] * 4
    if chain:
        assert harness.cache.match([b"twice", *others]) == len(keys) - 1
        assert harness.cache.delete(b"twice") == 1
        assert harness.cache.match(others) == 0


def test_an_absent_key_is_none(harness: Harness) -> None:
    assert harness.cache.get(b"nothing") is None
    assert harness.cache.get_many([b"a", b"b"]) == [None, None]
    assert harness.cache.match([b"a"]) == 0
    assert harness.cache.inspect(b"a") is None
    assert harness.cache.delete(b"a") == 0
    assert harness.cache.touch([b"a"]) == 0
    assert harness.cache.pin(b"a") == 0


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_every_dtype_is_exact_in_every_tier(harness: Harness, dtype: str) -> None:
    shapes = {"scalar": (), "empty": (0, 3), "one": (1,), "odd": (3, 5, 7), "block": (2, 64)}
    tensors = {name: random_tensor(dtype, shape) for name, shape in shapes.items()}
    harness.cache.put(b"exact", tensors, fidelity="exact")
    for _ in range(3):
        hit = harness.cache.get(b"exact")
        assert hit is not None
        assert not hit.lossy
        assert {n: same_bits(hit.tensors[n], x) for n, x in tensors.items()} == dict.fromkeys(tensors, True)
        harness.cache.demote(b"exact")


def test_numpy_and_torch_give_the_same_entry(harness: Harness) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    harness.cache.put(b"strided", {"x": x.T[::2]})
    harness.cache.put(b"bf16", {"x": x.astype(ml_dtypes.bfloat16)})
    harness.cache.put(b"big endian", {"x": x.astype(">f4")})
    strided, bf16, big = (harness.cache.get(key) for key in (b"strided", b"bf16", b"big endian"))
    assert strided is not None
    assert bf16 is not None
    assert big is not None
    assert same_bits(strided.tensors["x"], torch.from_numpy(x).T[::2].contiguous())
    assert same_bits(bf16.tensors["x"], torch.from_numpy(x).to(torch.bfloat16))
    assert same_bits(big.tensors["x"], torch.from_numpy(x))


def test_what_the_caller_changes_later_does_not_change_the_entry(harness: Harness) -> None:
    x = torch.ones(100)
    harness.cache.put(b"mine", {"x": x})
    x.zero_()
    first = harness.cache.get(b"mine")
    assert first is not None
    first.tensors["x"].fill_(7)
    second = harness.cache.get(b"mine")
    assert second is not None
    assert second.tensors["x"].eq(1).all()


def test_get_fills_the_tensors_it_is_given(harness: Harness) -> None:
    x = torch.randn(4, 100)
    harness.cache.put(b"out", {"x": x})
    out = {"x": torch.empty(4, 100)}
    hit = harness.cache.get(b"out", out=out)
    assert hit is not None
    assert hit.tensors["x"] is out["x"]
    assert same_bits(out["x"], x)
    array = {"x": np.empty((4, 100), np.float32)}
    assert harness.cache.get(b"out", out=array) is not None
    assert (array["x"] == x.numpy()).all()
    for wrong in ({"x": torch.empty(4, 99)}, {"y": torch.empty(4, 100)}, {"x": torch.empty(4, 100).half()}):
        with pytest.raises(errors.InvalidEntry):
            harness.cache.get(b"out", out=wrong)


def test_a_second_put_replaces_the_first_in_every_tier(harness: Harness) -> None:
    for trips in range(3):
        harness.cache.put(b"key", {"x": torch.full((256,), float(trips))})
        for _ in range(trips):
            harness.cache.demote(b"key")
        harness.cache.put(b"key", {"y": torch.full((128,), 100.0 + trips)})
        hit = harness.cache.get(b"key")
        assert hit is not None
        assert list(hit.tensors) == ["y"]
        assert hit.tensors["y"].eq(100.0 + trips).all()


def test_a_deleted_key_is_gone_from_every_tier(harness: Harness) -> None:
    for trips in range(3):
        harness.cache.put(b"key", {"x": torch.randn(256)})
        for _ in range(trips):
            harness.cache.demote(b"key")
        assert harness.cache.delete(b"key") == 1
        assert harness.cache.get(b"key") is None
        assert harness.cache.inspect(b"key") is None


def test_an_expired_entry_is_never_returned(harness: Harness) -> None:
    harness.cache.put(b"key", {"x": torch.ones(8)}, ttl_s=10)
    harness.clock.advance(9.5)
    assert harness.cache.match([b"key"]) == 1
    harness.clock.advance(0.6)
    assert harness.cache.match([b"key"]) == 0
    assert harness.cache.get(b"key") is None
    assert harness.cache.inspect(b"key") is None


def test_a_get_and_a_touch_move_a_sliding_deadline_but_not_an_absolute_one(harness: Harness) -> None:
    harness.cache.put(b"get", {"x": torch.ones(8)}, ttl_s=10)
    harness.cache.put(b"touch", {"x": torch.ones(8)}, ttl_s=10)
    harness.cache.put(b"fixed", {"x": torch.ones(8)}, ttl_s=10, sliding=False)
    for _ in range(3):
        harness.clock.advance(6)
        harness.cache.get(b"get")
        harness.cache.touch([b"touch"])
        harness.cache.get(b"fixed")
    assert harness.cache.get(b"get") is not None
    assert harness.cache.get(b"touch") is not None
    assert harness.cache.get(b"fixed") is None


def test_touch_can_give_a_longer_life(harness: Harness) -> None:
    harness.cache.put(b"key", {"x": torch.ones(8)}, ttl_s=10)
    assert harness.cache.touch([b"key", b"absent"], ttl_s=100) == 1
    harness.clock.advance(99)
    assert harness.cache.get(b"key") is not None


def test_a_pinned_entry_does_not_expire_until_it_is_unpinned(harness: Harness) -> None:
    harness.cache.put(b"put", {"x": torch.ones(8)}, ttl_s=10, pin=True)
    harness.cache.put(b"pin", {"x": torch.ones(8)}, ttl_s=10)
    assert harness.cache.pin(b"pin", b"absent") == 1
    harness.clock.advance(1000)
    for key in (b"put", b"pin"):
        info = harness.cache.inspect(key)
        assert info is not None
        assert info.pinned
        assert info.ttl_left_s is None
    assert harness.cache.unpin(b"put", b"pin") == 2
    harness.clock.advance(9)
    assert harness.cache.match([b"put"]) == 1
    harness.clock.advance(2)
    assert harness.cache.match([b"put"]) == 0
    assert harness.cache.get(b"pin") is None


def test_match_counts_leading_keys_and_says_where_they_are(harness: Harness) -> None:
    for key in (b"a", b"b", b"d"):
        harness.cache.put(key, {"x": torch.randn(64)})
    harness.cache.demote(b"b")
    match = harness.cache.match([b"a", b"b", b"c", b"d"])
    assert match == 2
    assert [(held.tier, held.nbytes) for held in match.held] == [("hot", 256), ("warm", 256)]
    located = harness.cache.locate([b"a", b"b", b"c", b"d"])
    assert [held and held.tier for held in located] == ["hot", "warm", None, "hot"]


def test_get_many_keeps_the_order_and_stops_at_a_miss_when_asked(harness: Harness) -> None:
    for key in (b"a", b"b", b"d"):
        harness.cache.put(key, {"x": torch.full((64,), float(key[0]))})
    every = harness.cache.get_many([b"d", b"c", b"a"])
    assert [hit and hit.key for hit in every] == [b"d", None, b"a"]
    leading = harness.cache.get_many([b"a", b"b", b"c", b"d"], leading=True)
    assert [hit and hit.key for hit in leading] == [b"a", b"b"]
    assert all(hit is not None and hit.tensors["x"].eq(float(hit.key[0])).all() for hit in leading)


def test_a_demoted_auto_entry_is_nf4_and_says_so(harness: Harness) -> None:
    x = torch.randn(4, 64, 2, 64)
    harness.cache.put(b"key", {"k": x, "position": torch.arange(64)})
    assert harness.cache.demote(b"key") == 1
    hit = harness.cache.get(b"key")
    assert hit is not None
    assert (hit.tier, hit.encoding, hit.lossy) == ("warm", "nf4-kv2", True)
    assert torch.equal(hit.tensors["position"], torch.arange(64))
    error = (hit.tensors["k"] - x).pow(2).mean().sqrt() / x.pow(2).mean().sqrt()
    assert 0.01 < error < 0.12


def test_every_hit_carries_the_error_measured_at_encoding(harness: Harness) -> None:
    """The receipt: of each tensor, in every tier, and the same after a trip up and down."""
    tensors = {"k": torch.randn(2, 64, 2, 64), "v": torch.randn(2, 64, 2, 64), "w": torch.randn(4096)}
    harness.cache.put(b"key", {**tensors, "ids": torch.arange(64)})
    exact = harness.cache.get(b"key")
    assert exact is not None
    assert exact.receipt == dict.fromkeys(("k", "v", "w", "ids"), 0.0)
    assert exact.relative_error == 0.0
    harness.cache.demote(b"key")
    first = harness.cache.get(b"key")
    assert first is not None
    assert first.receipt["ids"] == 0.0
    for name, x in tensors.items():
        # Of keys and values the worst head of a layer, (layers, tokens, heads, dim), as a part of what is left of it
        # without its mean: of random ones nearly all, but for keys' mean, which turns at the speed that takes most.
        of = (1, 3) if x.dim() == 4 else (0,)
        error = float(((first.tensors[name] - x).norm(dim=of) / x.norm(dim=of)).max())
        assert 0.998 * error <= first.receipt[name] <= (1.1 if x.dim() == 4 else 1.002) * error
    assert first.relative_error == max(first.receipt.values())
    harness.cache.promote(b"key")
    hot = harness.cache.get(b"key")
    assert hot is not None and hot.tier == "hot"
    assert hot.receipt == first.receipt
    with harness.cache.lease(b"key") as leased:
        assert leased is not None and leased.receipt == first.receipt
    harness.cache.demote(b"key")
    assert harness.cache.get_many([b"key"])[0].receipt == first.receipt
    info = harness.cache.inspect(b"key")
    assert info is not None and info.receipt == first.receipt
    explained = harness.cache.explain(b"key")[0]
    assert explained.entry is not None and explained.entry.receipt == first.receipt
    counted = errors_of(harness.cache.stats().values)
    assert {name: errors.count for name, errors in counted.items()} == {"nf4-kv2": 2, "nf4": 1, "raw": 1}
    assert counted["nf4"].total == pytest.approx(first.receipt["w"])


def test_the_receipt_is_read_back_from_disk(harness: Harness) -> None:
    """Also without reading the value: `inspect` takes it from the record's head."""
    harness.cache.put(b"key", {"k": torch.randn(2, 64, 2, 64)})
    harness.cache.demote(b"key")
    warm = harness.cache.get(b"key")
    assert warm is not None
    if not harness.cache.demote(b"key"):
        return  # no disk here
    info = harness.cache.inspect(b"key")
    assert info is not None and info.tiers == ("cold",)
    assert info.receipt == warm.receipt
    cold = harness.cache.get(b"key")
    assert cold is not None and (cold.tier, cold.receipt) == ("cold", warm.receipt)


def test_trips_between_tiers_lose_nothing_after_the_first_encoding(harness: Harness) -> None:
    harness.cache.put(b"key", {"k": torch.randn(8, 64)})
    harness.cache.demote(b"key")
    first = harness.cache.get(b"key")
    assert first is not None
    for _ in range(5):
        assert harness.cache.promote(b"key") == 1
        hot = harness.cache.get(b"key")
        assert hot is not None
        assert (hot.tier, hot.encoding, hot.lossy) == ("hot", "raw", True)
        assert same_bits(hot.tensors["k"], first.tensors["k"])
        assert harness.cache.demote(b"key") == 1
        below = harness.cache.get(b"key")
        assert below is not None
        assert below.tier == "warm"
        assert same_bits(below.tensors["k"], first.tensors["k"])


def test_tensors_that_nf4_would_spoil_stay_exact(harness: Harness) -> None:
    bad = torch.randn(128)
    bad[7] = float("nan")
    for key, x in {b"nan": bad, b"int": torch.arange(128), b"f64": torch.randn(128, dtype=torch.float64)}.items():
        harness.cache.put(key, {"x": x})
        harness.cache.demote(key)
        hit = harness.cache.get(key)
        if hit is not None:  # with nothing below warm such an entry may be forgotten, never changed
            assert not hit.lossy
            assert same_bits(hit.tensors["x"], x)


def test_inspect_and_entries_describe_what_is_held(harness: Harness) -> None:
    harness.cache.put(b"app/1", {"k": torch.zeros(2, 64)}, ttl_s=100, fidelity="exact")
    harness.cache.put(b"app/2", {"k": torch.zeros(2, 64)})
    harness.cache.put(b"other", {"k": torch.zeros(2, 64)})
    harness.cache.demote(b"app/2")
    harness.clock.advance(10)
    info = harness.cache.inspect(b"app/1")
    assert info is not None
    assert (info.tiers, info.encoding, info.fidelity, info.value_nbytes) == (("hot",), "raw", "exact", 512)
    assert info.tensors["k"].shape == (2, 64)
    assert info.tier_nbytes[0] > 512
    assert info.ttl_left_s == pytest.approx(90, abs=0.5)
    listed = list(harness.cache.entries(key_prefix=b"app/"))
    assert [entry.key for entry in listed] == [b"app/1", b"app/2"]
    assert [entry.key for entry in harness.cache.entries(tier="warm")] == [b"app/2"]
    assert len(list(harness.cache.entries(limit=1))) == 1


def test_evict_counts_as_eviction_and_delete_does_not(harness: Harness) -> None:
    harness.cache.put(b"a", {"x": torch.ones(8)})
    harness.cache.put(b"b", {"x": torch.ones(8)})
    assert harness.cache.evict(b"a", b"absent") == 1
    assert harness.cache.delete(b"b") == 1
    values = harness.cache.stats().values
    assert (values["evictions"], values["deletes"], values["entries"]) == (1, 1, 0)


def test_stats_count_hits_by_tier_and_misses_by_cause(harness: Harness) -> None:
    harness.cache.put(b"key", {"k": torch.randn(64)}, ttl_s=10)
    harness.cache.get(b"key")
    harness.cache.demote(b"key")
    harness.cache.get(b"key")
    harness.cache.get(b"absent")
    harness.clock.advance(11)
    harness.cache.get(b"key")
    stats = harness.cache.stats()
    assert (stats.tiers["hot"].hits, stats.tiers["warm"].hits) == (1, 1)
    assert (stats.values["misses_absent"], stats.values["misses_expired"]) == (1, 1)
    assert stats.values["hit_ratio"] == 0.5


def test_bad_input_is_refused_with_the_value_and_the_limit(harness: Harness) -> None:
    cache, x = harness.cache, torch.ones(4)
    refused = [
        (lambda: cache.put(b"", {"x": x}), "1 to 256 bytes, got 0"),
        (lambda: cache.put(b"k" * 257, {"x": x}), "1 to 256 bytes, got 257"),
        (lambda: cache.put("text", {"x": x}), "bytes, got str"),
        (lambda: cache.put(b"k", {}), "at least 1 tensor"),
        (lambda: cache.put(b"k", {"x": [1, 2]}), "got list"),
        (lambda: cache.put(b"k", {"": x}), "1 to 64 bytes"),
        (lambda: cache.put(b"k", {"a\nb": x}), "printable"),
        (lambda: cache.put(b"k", {f"t{i}": x for i in range(257)}), "at most 256 tensors, got 257"),
        (lambda: cache.put(b"k", {"x": torch.zeros([1] * 9)}), "at most 8 dimensions, got 9"),
        (lambda: cache.put(b"k", {"x": np.array(["a"])}), "cannot be stored"),
        (lambda: cache.put(b"k", {"x": x}, ttl_s=-1), "got -1"),
        (lambda: cache.put(b"k", {"x": x}, ttl_s=float("nan")), "got nan"),
        (lambda: cache.put(b"k", {"x": x}, fidelity="best"), "got 'best'"),
        (lambda: cache.get(b"k" * 300), "got 300"),
        (lambda: cache.match([b"k"] * 5000), "at most 4096 keys, got 5000"),
        (lambda: cache.match(b"k"), "put it in a list"),
    ]
    for call, message in refused:
        with pytest.raises(errors.InvalidEntry, match=message):
            call()
    assert cache.stats().values["entries"] == 0


def test_an_entry_over_the_limit_is_refused(harness: Harness) -> None:
    with pytest.raises(errors.EntryTooLarge, match=r"at most \d+ bytes, got"):
        harness.cache.put(b"big", {"x": torch.zeros(harness.entry_max_nbytes + 1, dtype=torch.uint8)})


def test_pins_over_their_share_are_refused(harness: Harness) -> None:
    nbytes = harness.hot_nbytes * 2 // 5
    harness.cache.put(b"a", {"x": torch.zeros(nbytes, dtype=torch.uint8)}, pin=True)
    with pytest.raises(errors.OverQuota, match="pinned"):
        harness.cache.put(b"b", {"x": torch.zeros(nbytes, dtype=torch.uint8)}, pin=True)
    assert harness.cache.get(b"b") is None
    assert harness.cache.get(b"a") is not None
