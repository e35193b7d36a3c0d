"""LMCache's own tools over both plug-ins, and the serde."""

import asyncio
import contextlib
import json
import os
import re
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters import conftest, flips, stubs

NOWHERE = "unix:/nonexistent/k.sock"


def address(*, up: bool) -> str:
    return os.environ["KVSTORED_TEST_ADDRESS"] if up else NOWHERE


def l2_spec(where: str) -> str:
    spec = {
        "type": "plugin", "module_path": "kvstored_client.integrations.lmcache", "class_name": "KvstoredL2Adapter",
        "adapter_params": {"address": where, "lookup_timeout_s": 30, "fetch_timeout_s": 30},
    }  # fmt: skip
    return json.dumps(spec)


def run(module: str, *words: str) -> None:
    """`python -m module words`, in this process, where the stand-ins are."""
    sys.argv = [module, *words]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")


def in_process(name: str) -> str:
    """A module of LMCache's engine, where this version has it: 0.5.7 has a package of its own for it."""
    return f"lmcache.{'inprocess.' if find_spec('lmcache.inprocess') is not None else ''}v1.{name}"


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.install()
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("up", [True, False])
def test_basic_check_of_the_l2_adapter_passes_and_fails_where_it_must(
    up: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It exits 0 whatever it found, so its lines are read, and it is run once with no daemon."""
    run(
        in_process("basic_check"),
        "--mode",
        "test_l2_adapter",
        "--l2-adapter",
        l2_spec(address(up=up)),
        "--num-keys",
        "4",
    )
    lines = capsys.readouterr().out
    assert "4/4 correctly absent" in lines
    for phase in ("4/4 found", "(loaded): 4/4", "(content): 4/4"):
        assert (f"Validation: {phase}" in lines or f"Validation {phase}" in lines) == up
    assert ("Batch store OK" in lines) == up


@pytest.mark.parametrize("up", [True, False])
def test_basic_check_of_the_remote_connector_passes_and_fails_where_it_must(
    up: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "lmcache.yaml"
    config.write_text(f"""
chunk_size: 256
local_cpu: false
max_local_cpu_size: 0.1
remote_url: "plugin://kvstored"
remote_serde: naive
remote_storage_plugins: ["kvstored"]
extra_config:
  remote_storage_plugin.kvstored.module_path: kvstored_client.integrations.lmcache
  remote_storage_plugin.kvstored.class_name: KvstoredConnectorAdapter
  kvstored.address: "{address(up=up)}"
  kvstored.lookup_timeout_s: 30
  kvstored.fetch_timeout_s: 30
""")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(config))
    monkeypatch.setattr("lmcache.integration.vllm.utils._config_instance", None)  # it is read once a process
    run(in_process("basic_check"), "--mode", "test_remote", "--num-keys", "3", "--model", f"m-{up}")
    lines = capsys.readouterr().out
    absent, put, exists, _, content = re.findall(r"Validation.*?: (\d)/3", lines)
    # A put that nobody takes passes: it may not raise, and it tells nobody.
    assert (absent, put) == ("3", "3")
    assert (exists, content) == (("3", "3") if up else ("0", "0"))


def test_what_a_request_wishes_for_its_chunks_is_heard(store: Store) -> None:
    """All but a pin, which anybody could write; a wish that cannot be is left out, and the chunk is kept."""
    from lmcache.utils import CacheEngineKey

    init_remote_metadata_info = import_module(in_process("protocol")).init_remote_metadata_info

    from kvstored_client.integrations.guard import Guard
    from kvstored_client.integrations.lmcache import KvstoredConnector

    init_remote_metadata_info(1)
    made = KvstoredConnector.__new__(KvstoredConnector)  # without LMCache's engine, of which this needs nothing
    made._guard, made._root = Guard(store, lookup_timeout_s=60, fetch_timeout_s=60), b"r" * 32

    def put(number: int, **wishes: Any) -> None:
        own = {f"kvstored.{name}": value for name, value in wishes.items()}
        key = CacheEngineKey("m", 1, 0, number, torch.bfloat16, request_configs={"other": 1, **own})
        page = conftest.LMCacheL2._object(torch.full((64,), number, dtype=torch.uint8))
        page.meta.shapes, page.meta.dtypes = [page.meta.shape], [page.meta.dtype]
        asyncio.run(made.put(key, page))

    put(1, ttl_s=500, priority="low")
    (entry,) = store.entries()
    assert entry.ttl_left_s is not None and 400 < entry.ttl_left_s <= 500
    put(2, no_store=True)
    assert len(list(store.entries())) == 1
    for number, wish in ((3, {"pin": True}), (4, {"ttl_s": "long"}), (5, {"colour": 1})):
        put(number, **wish)
    others = [each for each in store.entries() if each.key != entry.key]
    assert len(others) == 3
    assert all(not each.pinned and each.ttl_left_s is not None and each.ttl_left_s > 500 for each in others)


def test_what_hits_save_is_reported_where_the_prefill_s_speed_was_said(store: Store) -> None:
    """By the connector, which knows a chunk's tokens. The second level does not, and takes no such setting."""
    from types import SimpleNamespace

    from lmcache.utils import CacheEngineKey

    init_remote_metadata_info = import_module(in_process("protocol")).init_remote_metadata_info

    from kvstored_client.integrations.lmcache import KvstoredConnector, _guard_of

    init_remote_metadata_info(1)
    page = conftest.LMCacheL2._object(torch.full((64,), 7, dtype=torch.uint8))
    page.meta.shapes, page.meta.dtypes = [page.meta.shape], [page.meta.dtype]
    room = SimpleNamespace(allocate=lambda *_: conftest.LMCacheL2._object(torch.zeros(64, dtype=torch.uint8)))
    for said, due_s in ({}, 0.0), ({"prefill_tokens_per_s": 2}, 128.0):
        made = KvstoredConnector.__new__(KvstoredConnector)  # without LMCache's engine, of which this needs nothing
        made._guard = _guard_of({"address": NOWHERE, **said}, prefill_tokens_per_s=0.0)
        made._guard.cache = store
        made._root, made._chunk_tokens, made._local = b"r" * 32, 256, room
        key = CacheEngineKey("m", 1, 0, 5, torch.bfloat16)
        asyncio.run(made.put(key, page))
        before = store.stats().values["prefill_saved_s"]
        assert asyncio.run(made.get(key)) is not None
        assert asyncio.run(made.get(CacheEngineKey("m", 1, 0, 6, torch.bfloat16))) is None
        assert made._guard.flush()
        saved_s = store.stats().values["prefill_saved_s"] - before
        assert due_s - 20 < saved_s <= due_s
        assert (saved_s > 0) == bool(said)
    with pytest.raises(TypeError, match="unknown setting 'prefill_tokens_per_s'"):
        _guard_of(said)


@pytest.mark.parametrize("up", [True, False])
def test_bench_l2_verifies_every_byte_and_fails_where_it_must(up: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--num-keys",
        "4",
        "--rounds",
        "2",
        "--data-size-kb",
        "64",
        "--no-skip-verify",
        "--lookup-max-hit-rate",
        "1",
    ]
    run("lmcache.cli.main", "bench", "l2", "--l2-adapter", l2_spec(address(up=up)), *words)
    lines = capsys.readouterr().out
    rounds = 3  # one of them to warm up
    for told in ("success_keys", "found", "loaded"):
        assert lines.count(f"{told}={4 if up else 0}/4") == rounds
    assert ("All 4 keys data verified OK" in lines) == up
    assert ("data mismatches" in lines) != up


def test_nf4_serde_makes_a_seventh_and_comes_back_nearly() -> None:
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


def metadata(**fields: Any) -> Any:
    from lmcache.v1.metadata import LMCacheMetadata

    some = {
        "model_name": "m", "world_size": 1, "local_world_size": 1, "worker_id": 0, "local_worker_id": 0,
        "kv_dtype": torch.float8_e4m3fn, "kv_shape": (2, 2, 256, 1, 64),
    }  # fmt: skip
    return LMCacheMetadata(**{**some, **fields})


def test_each_field_of_lmcache_s_metadata_and_configuration_is_in_the_identity_unless_the_list_names_it() -> None:
    from lmcache.v1.config import LMCacheEngineConfig

    from kvstored_client.integrations import configured
    from kvstored_client.integrations import lmcache as mine

    found, config = metadata(), LMCacheEngineConfig.from_defaults()

    def digest() -> bytes:
        return configured.digest("lmcache-remote", {"metadata": found, "config": config}, mine._HARMLESS)

    assert flips.check(found, mine._HARMLESS, digest) > 10
    assert flips.check(config, mine._HARMLESS, digest) > 30
    assert len({digest(), *(other_form(mine, kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2))}) == 3


def other_form(mine: Any, dtype: torch.dtype) -> bytes:
    """What is kept beside an object's bytes to tell what they are."""
    shape = torch.Size([2, 2])
    obj: Any = type(
        "Obj",
        (),
        {"get_shapes": lambda _: [shape], "get_dtypes": lambda _: [dtype], "get_memory_format": lambda _: None},
    )()
    return bytes(mine._form_of(obj).numpy())


def test_each_field_of_a_key_makes_another_key() -> None:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.distributed.api import ObjectKey

    from kvstored_client.integrations import lmcache as mine

    fields: dict[str, Any] = {"chunk_hash": b"a", "model_name": "m", "kv_rank": 0}
    changes = [
        {}, {"chunk_hash": b"b"}, {"model_name": "n"}, {"kv_rank": 1}, {"object_group_id": 1}, {"cache_salt": "s"}
    ]  # fmt: skip
    assert len({mine._key_of(b"r", ObjectKey(**{**fields, **each})) for each in changes}) == len(changes)

    def remote(**tags: str) -> bytes:
        settings = {f"lmcache.tag.{name}": x for name, x in tags.items()}
        return mine._key_of(b"r", CacheEngineKey("m", 1, 0, 1, torch.bfloat16, settings))

    # As LMCache writes them these two are one: m@1@0@1@bfloat16@a%1@b%2.
    assert remote(a="1@b%2") != remote(a="1", b="2")
    assert mine._key_of(b"r", CacheEngineKey("m", 1, 0, 1, torch.bfloat16, {"other": "1"})) == remote()


def test_an_object_of_another_dtype_is_not_filled(store: Store) -> None:
    handle = conftest.LMCacheL2({"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0})
    handle.guard.cache = store
    page = torch.arange(4096).to(torch.uint8)
    assert handle.keep({"k": page.view(torch.float8_e4m3fn)})
    assert handle.restore(["k"]) == [None]
    assert handle.keep({"k": page})
    (found,) = handle.restore(["k"])
    assert found is not None
    assert torch.equal(found, page)
    other = conftest.LMCacheL2({"lookup_timeout_s": 20.0, "namespace": "fp8_e5m2"})
    other.guard.cache = store
    assert other.held(["k"]) == [False]
    handle.close()
    other.close()


def test_five_thousand_keys_are_kept_found_and_deleted(store: Store) -> None:
    handle = conftest.LMCacheL2({"lookup_timeout_s": 60.0, "fetch_timeout_s": 60.0})
    handle.guard.cache = store
    names = [f"k{i}" for i in range(5_000)]
    page = torch.ones(1, dtype=torch.uint8)
    assert handle.keep(dict.fromkeys(names, page))
    assert all(handle.held(names))
    handle.adapter.delete(handle._keys(names))
    assert not list(store.entries())
    assert handle.guard.failures == 0
    handle.close()
