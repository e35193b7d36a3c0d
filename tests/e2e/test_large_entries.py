"""From one byte to one gibibyte: bit for bit, from every tier and after a restart."""

from pathlib import Path

import pytest
import torch

from kvstore.arrays import as_bytes
from kvstore.config import ColdConfig, HotConfig, StoreConfig
from kvstore.store import Store

MIB, GIB = 1 << 20, 1 << 30

torch.set_num_threads(1)


def some_bytes(nbytes: int) -> torch.Tensor:
    """Bytes that differ from place to place, made quickly: a megabyte of noise, repeated, each time marked."""
    noise = torch.randint(0, 256, (min(nbytes, MIB),), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x = noise.repeat(-(-nbytes // MIB))[:nbytes].clone()
    x[::MIB] = torch.arange(x[::MIB].numel(), dtype=torch.int64).to(torch.uint8)
    return x


def config(path: Path) -> StoreConfig:
    return StoreConfig(
        hot=HotConfig(GIB + 64 * MIB), cold=ColdConfig(path=str(path), capacity_nbytes=3 * GIB), entry_max_nbytes=GIB
    )


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [1, 4097, 3 * MIB + 1, GIB])
def test_an_exact_entry_of_any_size_survives_every_tier_and_a_restart(tmp_path: Path, nbytes: int) -> None:
    x = some_bytes(nbytes)
    with Store.open(config(tmp_path), background=False) as store:
        store.put(b"k", {"x": x}, fidelity="exact")
        for tier in ("hot", "cold"):
            with store.lease(b"k") as hit:
                assert hit is not None
                assert hit.tier == tier
                assert (as_bytes(hit.tensors["x"]) == as_bytes(x)).all()
            store.demote(b"k")
    with Store.open(config(tmp_path), background=False) as store:
        assert store.promote(b"k") == 1
        with store.lease(b"k") as hit:
            assert hit is not None
            assert (hit.tier, hit.lossy) == ("hot", False)
            assert (as_bytes(hit.tensors["x"]) == as_bytes(x)).all()
