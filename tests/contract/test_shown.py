"""What a reader sees of the objects: a repr that says state and asks nobody, a bar for a notebook, sizes as text."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import torch

from kvstore import ConfigError, Hit, InvalidEntry, Match, Store
from kvstore.dtypes import BY_NAME, DTypeName
from kvstore.hit import Held
from kvstore.keys import LAYOUTS, Identity
from kvstore.stats import Stats, TierStats
from kvstored_client import Client
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.simple import SimpleKVCache

IDENTITY: dict[str, Any] = {
    "model": "tiny", "revision": "1", "dtype": "float32", "layers": 4, "kv_heads": 2, "head_dim": 64, "layout": "lthd",
}  # fmt: skip


def test_the_types_name_the_same_dtypes_and_layouts_as_the_check() -> None:
    assert get_args(DTypeName) == tuple(BY_NAME)
    assert LAYOUTS == ("lthd",)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("dtype", "fp32", r"dtype must be one of float32, float16, .* got 'fp32'; did you mean 'float32'\?"),
        ("dtype", "torch.float16", r"got 'torch.float16'; did you mean 'float16'\?"),
        ("dtype", "BF16", r"got 'BF16'; did you mean 'bfloat16'\?"),
        ("dtype", "float33", r"got 'float33'$"),
        ("dtype", torch.float32, "dtype must be a non-empty string"),
        (
            "layout",
            "bhsd whatever",
            r'layout must be "lthd", \(layers, tokens, kv_heads, head_dim\), got .bhsd',
        ),
        ("layout", "lhtd", "arrange k and v so"),
        ("layers", "four", "layers must be an integer"),
        ("heads_dim", 64, "unexpected keyword argument 'heads_dim'"),
    ],
)
def test_a_wrong_word_in_an_identity_is_refused_by_both_and_the_set_is_named(
    field: str, value: object, sentence: str
) -> None:
    """They were other keys, that is misses for ever."""
    with Store.open() as store, Client("unix:/nowhere/k.sock") as client:
        for cache in (store, client):
            with pytest.raises(InvalidEntry, match=sentence):
                cache.namespace(**{**IDENTITY, field: value})


def test_an_adapter_may_have_a_layout_of_its_own() -> None:
    assert Identity(**{**IDENTITY, "layout": "snapshot"}).layout == "snapshot"


def test_a_store_opens_with_sizes_as_text(tmp_path: Any) -> None:
    with Store.open(tmp_path, hot="8MiB", warm=0, cold="1.5GB", ttl_s=60) as store:
        config = store.config
        assert (config.hot.capacity_nbytes, config.warm.capacity_nbytes) == (8 << 20, 0)
        assert (config.cold.capacity_nbytes, config.ttl_s) == (1_500_000_000, 60)
        assert config.cold.path == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hot": "lots"}, "hot: not a size: 'lots'"),
        ({"hot": 0}, "hot.capacity_nbytes must be from 1"),
        ({"cold": "8GiB"}, r"cold='8GiB' needs a directory to write to: Store.open\(PATH, cold=...\)"),
        ({"ttl_s": -1}, "ttl_s must be from"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_its_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Store.open(**options)


def test_the_repr_of_a_store_says_how_full_it_is_and_asks_no_lock_and_no_disk(tmp_path: Any, monkeypatch: Any) -> None:
    store = Store.open(tmp_path / "cold", hot="8MiB", framework="numpy")
    store.put(b"k", {"x": np.zeros(1 << 18, np.float32)}, fidelity="exact")
    store.get(b"k")
    store.get(b"no")
    monkeypatch.setattr(type(store._r.cold), "disk_nbytes", lambda _: pytest.fail("asked the disk"))
    with store._r.lock, ThreadPoolExecutor(1) as another:  # as a debugger finds it
        shown = another.submit(repr, store).result(60)
    assert re.search(r"Store\(1 entries; hot 1\.0 MiB of 8\.0 MiB; warm 0 B of .*; cold .* of 16\.0 GiB; ", shown)
    assert "hit ratio 50.0% of keys at " in shown
    html = store._repr_html_()
    assert html.count("<tr>") == 3 and "width:12.5%" in html and "hit ratio 50.0%" in html
    assert "http" not in html and "<script" not in html
    store.close()
    assert repr(store) == "Store(closed)" and "closed" in store._repr_html_()


def test_the_repr_of_a_client_says_its_state_and_makes_no_call() -> None:
    client = Client("unix:/nowhere/k.sock", timeout_s=2, on_error="raise")
    shown = "Client('unix:/nowhere/k.sock', open, timeout_s=2, on_error='raise', shared memory, failures=0)"
    assert repr(client) == shown
    space = client.namespace(**IDENTITY)
    assert repr(space) == (
        f"Namespace({space.name!r}, float32 (4 layers, tokens, 2 kv_heads, 64), 256 tokens a chunk, in {shown})"
    )
    assert repr(Guard(client)).startswith(f"Guard({shown}, failures=")
    client.close()
    assert ", closed, " in repr(client)


def test_the_repr_of_a_hit_has_types_and_shapes_and_no_values() -> None:
    x = torch.zeros(4, 16, 2, 64)
    assert repr(Hit(b"any key", {"k": x, "v": x.numpy()}, "warm", "nf4", True, 1.25, {"k": 0.071})) == (
        "Hit(key=b'any key', tensors={'k': float32 (4, 16, 2, 64), 'v': float32 (4, 16, 2, 64)}, tier='warm', "
        "encoding='nf4', lossy=True, age_s=1.25, relative_error=0.071)"
    )
    assert "key=00ff00ff00ff00ff.. (32 bytes)" in repr(Hit(b"\0\xff" * 16, {}, "hot", "raw", False, 0.0))


def test_a_match_is_a_number_in_a_sentence_and_says_where_in_its_repr() -> None:
    match = Match((Held("hot", 1), Held("hot", 1), Held("cold", 1)))
    assert repr(match) == "Match(3, hot: 2, cold: 1)"
    assert f"{match} {match!s}" == "3 3"
    assert repr(Match(())) == "Match(0)"


def test_stats_in_a_notebook_are_a_bar_for_each_tier_and_hold_no_markup_of_a_daemon_that_lies() -> None:
    tiers = {"hot": TierStats(1, 3 << 20, 4 << 20), "<b>": TierStats(1, 5, 0), "bad": TierStats(1, 9, 3)}
    values = {"entries": 12.0, "lookup_tokens": 1000.0, "lookup_hit_tokens": 935.0}
    stats = Stats(values, tiers)
    assert repr(stats) == (
        "Stats(12 entries; hot 3.0 MiB of 4.0 MiB; <b> 5 B of 0 B; bad 9 B of 3 B; hit ratio 93.5% of tokens)"
    )
    html = stats._repr_html_()
    assert "width:75.0%" in html and "width:100%" in html and "hit ratio 93.5% of tokens" in html
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert "no lookup yet" in repr(Stats({}, {}))
    assert "width:100%" in Stats({}, {"hot": TierStats(0, float("nan"), 1)})._repr_html_()  # type: ignore[arg-type]


def test_the_repr_of_the_drop_in_cache_counts() -> None:
    cache = SimpleKVCache(16)
    x = torch.zeros(2, 3)
    cache.cache_kv("prompt", 0, x, x)
    cache.get_cached_kv("prompt", 0)
    cache.get_cached_kv("other", 0)
    assert re.match(r"SimpleKVCache\(1 put, 1 hits, 1 misses, in Store\(1 entries; ", repr(cache))
