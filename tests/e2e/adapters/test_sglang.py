"""SGLang's own failure injector, and its rules for several pools."""

from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters import conftest, stubs


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
