"""LMCache's own tools over both plug-ins, and the serde."""

import contextlib
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.adapters import stubs

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
        "lmcache.v1.basic_check",
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
    run("lmcache.v1.basic_check", "--mode", "test_remote", "--num-keys", "3", "--model", f"m-{up}")
    lines = capsys.readouterr().out
    absent, put, exists, _, content = re.findall(r"Validation.*?: (\d)/3", lines)
    # A put that nobody takes passes: it may not raise, and it tells nobody.
    assert (absent, put) == ("3", "3")
    assert (exists, content) == (("3", "3") if up else ("0", "0"))


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
