"""SGLang's own failure injector, and its rules for several pools."""

from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters import conftest, flips, stubs


def test_sglang_own_failure_injector_never_gets_an_exception(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.5")

    class Injected(conftest.SGLangV1):
        def __init__(self) -> None:
            stubs.install()
            super().__init__({})

    original = conftest.SGLang.__init__

    def through_injector(self: Any, settings: dict[str, Any]) -> None:
        try:
            original(self, settings)
        except AttributeError:  # the injector has no _guard of its own
            self.guard = self.backend._backend._guard

    monkeypatch.setattr(conftest.SGLang, "__init__", through_injector)
    handle = Injected()
    assert type(handle.backend).__name__ == "HiCacheStorageFailureInjector"
    handle.guard.cache = store
    page = torch.arange(4096).to(torch.uint8)
    answers = []
    for i in range(30):
        handle.keep({f"k{i}": page})
        answers.append(handle.restore([f"k{i}"])[0])
    assert any(found is None for found in answers)
    assert any(found is not None for found in answers)
    assert all(found is None or torch.equal(found, page) for found in answers)


def test_sglang_pools_shorten_the_prefix_by_their_policies(store: Store) -> None:
    handle = conftest.SGLangV2({"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0})
    handle.guard.cache = store
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    side = conftest.HostPool()
    handle.backend.register_mem_host_pool_v2(side, PoolName.MAMBA)
    names = [f"k{i}" for i in range(5)]
    assert handle.keep({name: torch.full((4096,), i, dtype=torch.uint8) for i, name in enumerate(names)})
    kept = [names[1], names[3]]
    transfer = PoolTransfer(PoolName.MAMBA, host_indices=side.indices(2), keys=kept)
    assert handle.backend.batch_set_v2([transfer]) == {PoolName.MAMBA: [True, True]}

    def ask(policy: PoolHitPolicy) -> Any:
        return handle.backend.batch_exists_v2(names, [PoolTransfer(PoolName.MAMBA, keys=["one"], hit_policy=policy)])

    trailing = ask(PoolHitPolicy.TRAILING_PAGES)
    assert (trailing.kv_hit_pages, trailing.restorable_prefix_pages) == (4, [2, 4])
    assert ask(PoolHitPolicy.ALL_PAGES).kv_hit_pages == 0
    assert handle.backend.batch_exists_v2(names).kv_hit_pages == 5


def test_what_hits_save_is_reported_where_the_prefill_s_speed_was_said(store: Store) -> None:
    """Tokens over tokens a second; without the setting nothing is known, and nothing is reported."""
    for said, due_s in ({}, 0.0), ({"prefill_tokens_per_s": 0.1}, 3 * conftest.HostPool.page_size / 0.1):
        handle = conftest.SGLangV1({"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0, **said})
        handle.guard.cache = store
        names = ["a", "b", "c"]
        assert handle.keep({name: torch.full((conftest.PAGE,), 7, dtype=torch.uint8) for name in names})
        before = store.stats().values["prefill_saved_s"]
        assert [page is not None for page in handle.restore([*names, "absent"])] == [True, True, True, False]
        assert handle.guard.flush()
        saved_s = store.stats().values["prefill_saved_s"] - before
        assert due_s - 20.0 < saved_s <= due_s
        assert (saved_s > 0) == bool(said)


def published() -> Any:
    """SGLang's own resolved configuration of a server, as its processes have it."""
    stubs.install()
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    with pytest.MonkeyPatch.context() as patch:
        # What is derived of it asks for the model.
        patch.setattr(runtime_context, "_install_derived_leaves", lambda *_: None)
        return runtime_context._build_config_bags(ServerArgs(model_path="m"))


def storage(**fields: Any) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    some = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": True, "model_name": "m",
        "extra_config": {"namespace": "n"},
    }  # fmt: skip
    return HiCacheStorageConfig(**{**some, **fields})


def test_each_field_of_the_storage_s_configuration_is_in_the_identity_unless_the_list_names_it() -> None:
    handle = conftest.SGLang({})
    from kvstored_client.integrations import sglang as mine

    del handle
    config = storage()
    assert flips.check(config, mine._HARMLESS, lambda: mine._identity(config)) >= 16
    places = [{"namespace": "n", "address": "a"}, {"namespace": "n", "fetch_timeout_s": 1}]
    assert {mine._identity(storage(extra_config=extra)) for extra in places} == {mine._identity(config)}
    latent = [mine._identity(storage(is_mla_model=True, tp_size=2, tp_rank=rank)) for rank in (0, 1)]
    assert latent[0] == latent[1]  # all ranks hold the same, and one of them writes


def test_each_field_of_the_server_s_configuration_is_in_the_identity_unless_the_list_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FP8 pools of e4m3 and of e5m2 both say uint8: it is the server that knows."""
    bags, config = published(), storage()
    from kvstored_client.integrations import sglang as mine

    monkeypatch.setattr(mine, "_server", lambda: bags)
    before, count = mine._identity(config), 0
    with flips.changed(bags["model"], "kv_cache_dtype", "fp8_e5m2"):
        other = mine._identity(config)
        with flips.changed(bags["model"], "kv_cache_dtype", "fp8_e4m3"):
            assert len({before, other, mine._identity(config)}) == 3
    left_out = {name.partition(".")[2] for name in mine._HARMLESS if name.startswith("server.")}
    assert left_out < bags.keys()
    for name in bags.keys() - left_out:
        one = {name: bags[name]}  # quick: each of them is in the digest of the whole, as the last lines show
        monkeypatch.setattr(mine, "_server", lambda one=one: one)
        alone = mine._identity(config)
        for owner, field in list(every_leaf(bags[name])):
            with flips.changed(owner, field, flips.other(getattr(owner, field))):
                same = mine._identity(config) == alone
            assert same == bool(flips.harmless_name(owner, field, mine._HARMLESS)), f"{name}: {field}"
            count += 1
    assert count > 150
    monkeypatch.setattr(mine, "_server", lambda: bags)
    assert mine._identity(config) == before
    for name in bags.keys() - left_out:
        monkeypatch.setattr(mine, "_server", lambda name=name: {each: x for each, x in bags.items() if each != name})
        assert mine._identity(config) != before
    monkeypatch.setattr(mine, "_server", lambda: {**bags, "invented": {"layout": 1}})
    assert mine._identity(config) != before


def every_leaf(bag: Any) -> Any:
    for sub in bag._subs.values():
        yield from every_leaf(sub)
    for name in bag._fields:
        yield bag, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout", "layer_first"),
        ("layout", "page_first_direct"),
        ("dtype", torch.int8),
        ("page_size", 8),
        ("new", 1),
    ],
)
def test_another_layout_of_the_host_pool_is_another_page(store: Store, name: str, value: Any) -> None:
    """`is_page_first_layout` tells one layout from all others."""

    def handle(**facts: Any) -> Any:
        found = conftest.SGLangV1({"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0})
        found.guard.cache = store
        for fact, x in {"layout": "page_first", "dtype": torch.uint8, **facts}.items():
            setattr(found.pool, fact, x)
        found.backend.register_mem_pool_host(found.pool)
        return found

    assert handle().keep({"k": torch.ones(4096, dtype=torch.uint8)})
    assert handle().held(["k"]) == [True]
    assert handle(size=5).held(["k"]) == [True]
    assert handle(**{name: value}).held(["k"]) == [False]


def test_without_a_published_configuration_and_a_namespace_nothing_is_kept(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    handle = conftest.SGLangV1({"namespace": ""})
    handle.guard.cache = store
    assert not handle.keep({"k": torch.ones(4096, dtype=torch.uint8)})
    assert handle.held(["k"]) == [False]
    assert handle.restore(["k"]) == [None]
    assert caplog.text.count("running without the store") == 1
    assert not list(store.entries())


def test_pages_of_over_4096_keys_are_found(store: Store) -> None:
    handle = conftest.SGLang({"lookup_timeout_s": 60.0, "fetch_timeout_s": 60.0})
    handle.guard.cache = store
    names = [f"k{i}" for i in range(5_000)]
    page = torch.ones(1, dtype=torch.uint8)
    assert handle.backend.batch_set(names, [page] * 5_000)
    assert handle.backend.batch_exists(names) == 5_000
    assert sum(found is not None for found in handle.backend.batch_get(names)) == 5_000
    assert handle.guard.failures == 0
