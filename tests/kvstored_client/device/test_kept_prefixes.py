"""What transformers' adapter keeps of layers on a GPU: all of it computed, and no second copy on the device."""

from types import SimpleNamespace

import pytest
import torch

from kvstore.device.deferred import Deferred
from kvstored_client.integrations.guard import Guard
from tests.kvstored.inside import daemon_inside

from .tensors import COPIES, on_gpu

pytest.importorskip("transformers")


def test_a_prefix_on_a_gpu_is_kept_layer_by_layer_and_once_it_is_computed() -> None:
    from kvstored_client.integrations.transformers.attention import Attention
    from kvstored_client.integrations.transformers.probe import Shape
    from kvstored_client.integrations.transformers.rows import Rows

    driver, rows = Deferred(), Rows([list(range(20))], [0], 20)
    computed = [(torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)) for _ in range(3)]
    there = [tuple(on_gpu(torch.zeros_like(x)) for x in layer) for layer in computed]

    def compute() -> None:
        for layer, numbers in zip(there, computed, strict=True):
            for x, due in zip(layer, numbers, strict=True):
                x.numbers.copy_(due)

    with daemon_inside() as daemon, daemon.client(framework="torch", driver=driver) as client:
        guard = Guard(client, lookup_timeout_s=60, fetch_timeout_s=60)
        fields = {"model": "m", "revision": "r", "fidelity": "exact"}
        attention = Attention(guard, fields, 16, Shape(3, 2, 8, 8, torch.float32))
        cache = SimpleNamespace(layers=[SimpleNamespace(keys=k, values=v) for k, v in there])
        cache.get_seq_length = lambda: 20
        COPIES.clear()
        driver.compute(0, compute)  # a kernel that has been started and has not run
        attention.keep(rows, rows, cache)
        assert guard.flush(60)
        assert COPIES == {"d2h": 2 * 3}
        kept = attention.restore(rows, torch.device("cpu"))
        assert kept[:2] == (19, True)
        for layer, (k, v) in zip(kept.layers, computed, strict=True):
            assert torch.equal(layer.keys, k[:, :, :19])
            assert torch.equal(layer.values, v[:, :, :19])
