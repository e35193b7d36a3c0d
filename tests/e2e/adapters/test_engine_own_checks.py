"""Each engine's own tools against its adapter, where the wheel has some."""

import contextlib
import os
import runpy
import sys
from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters import conftest, stubs


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--engine"))


def test_sglang_own_failure_injector_never_gets_an_exception(
    engine: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine != "sglang":
        pytest.skip("SGLang's")
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


def test_sglang_pools_shorten_the_prefix_by_their_policies(engine: str, store: Store) -> None:
    if engine != "sglang":
        pytest.skip("SGLang's")
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


@pytest.mark.parametrize("up", [True, False])
def test_lmcache_basic_check_passes_and_fails_where_it_must(
    engine: str, up: bool, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits 0 whatever it found, so its lines are read, and it is run once with no daemon."""
    if engine != "lmcache":
        pytest.skip("LMCache's")
    stubs.install()
    address = os.environ["KVSTORED_TEST_ADDRESS"] if up else "unix:/nonexistent/k.sock"
    spec = (
        '{"type":"plugin","module_path":"kvstored_client.integrations.lmcache","class_name":"KvstoredL2Adapter",'
        f'"adapter_params":{{"address":"{address}","lookup_timeout_s":10,"fetch_timeout_s":10}}}}'
    )
    monkeypatch.setattr(sys, "argv", ["check", "--mode", "test_l2_adapter", "--l2-adapter", spec, "--num-keys", "4"])
    with contextlib.suppress(SystemExit):
        runpy.run_module("lmcache.v1.basic_check", run_name="__main__")
    lines = capsys.readouterr().out
    assert "4/4 correctly absent" in lines
    for phase in ("4/4 found", "(loaded): 4/4", "(content): 4/4"):
        assert (f"Validation: {phase}" in lines or f"Validation {phase}" in lines) == up
    assert ("Batch store OK" in lines) == up


def test_lmcache_nf4_serde_makes_a_seventh_and_comes_back_nearly(engine: str) -> None:
    if engine != "lmcache":
        pytest.skip("LMCache's")
    stubs.install()
    from lmcache.v1.distributed.serde.factory import get_registered_serde_types
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    from kvstored_client.integrations.lmcache import Nf4Deserializer, Nf4Serializer

    def wrap(x: torch.Tensor) -> Any:
        meta = MemoryObjMetadata(
            shape=x.shape, dtype=x.dtype, address=x.data_ptr(), phy_size=x.numel() * x.element_size(),
            fmt=MemoryFormat.KV_2LTD, ref_count=1,
        )  # fmt: skip
        return TensorMemoryObj(x.flatten(), meta, parent_allocator=None)

    assert "nf4" in get_registered_serde_types()
    x = torch.randn(2, 30, 256, 192)
    layout: Any = type("Layout", (), {"shapes": [x.shape]})()
    limit = Nf4Serializer().estimate_serialized_size(layout)
    packed = torch.zeros(limit, dtype=torch.uint8)
    written = Nf4Serializer().serialize(wrap(x), wrap(packed), None)
    assert written <= limit
    assert x.numel() * 4 / written > 7
    back = torch.zeros_like(x)
    target = wrap(back)
    Nf4Deserializer().deserialize(wrap(packed), target, None)
    cosine = torch.nn.functional.cosine_similarity(target.tensor.flatten(), x.flatten(), dim=0)
    assert float(cosine) > 0.99
