"""The Triton kernels and the torch reference on a GPU: the bytes of the CPU reference."""

import pytest
import torch

from kvstore.codecs import kv_learned, nf4_kv
from kvstore.codecs.basis import use
from kvstore.codecs.hints import Hints
from kvstore.codecs.kv_learned import KVLearned, encoded_in
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.entries.entry import EncodedTensor
from kvstore.kernels import reference
from tests.kvstore.codecs import tiny_model

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here: the Triton kernels are not run", allow_module_level=True)


def bits(x):
    return x.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 64 * 17, 100_001])
def test_nf4_on_cuda_writes_and_reads_the_bytes_of_the_cpu(dtype, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    codes, absmax = reference.quantize(x)
    on_cuda = reference.quantize(x.cuda())
    assert [bits(part) for part in on_cuda] == [bits(codes), bits(absmax)]
    expected = reference.dequantize(codes, absmax, torch.empty_like(x))
    assert bits(reference.dequantize(*on_cuda, torch.empty_like(x).cuda())) == bits(expected)


@pytest.mark.parametrize("shape", [(2, 200, 3, 64), (1, 70, 2, 80), (3, 40, 2, 128), (5, 130, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k", "v", "kv"])
def test_nf4_kv_on_cuda_writes_the_bytes_of_the_cpu(name, dtype, shape):
    """By the Triton kernels, and by the reference on the device, which is what answers without Triton."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = (NF4KV().encode(name, at, Hints(prefix_start=True)) for at in (x, x.cuda()))
    assert {s: bits(p) for s, p in here.parts.items()} == {s: bits(p) for s, p in there.parts.items()}
    assert bits(NF4KV().decode(here)) == bits(NF4KV().decode(there))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_kv, "kv_kernel", lambda _x: None)
        plain = NF4KV().encode(name, x.cuda(), Hints(prefix_start=True))
        assert {s: bits(p) for s, p in here.parts.items()} == {s: bits(p) for s, p in plain.parts.items()}
        assert bits(NF4KV().decode(here)) == bits(NF4KV().decode(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_kv_learned_on_cuda_reads_the_bits_of_the_cpu(name, dtype):
    """By Triton, and by the host's kernel, which is what answers without it."""
    basis = use(tiny_model.basis())
    x = tiny_model.keys(77, 300) if name == "k" else tiny_model.values(77)
    x[1, 40, 0] *= 30
    here = encoded_in(basis, name, x.to(dtype), Hints(prefix_start=False))
    there = EncodedTensor(here.spec, here.encoding, {s: p.cuda() for s, p in here.parts.items()}, here.attrs)
    due = bits(KVLearned().decode(here))
    assert bits(KVLearned().decode(there)) == due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_learned, "products_on", lambda _x: None)
        assert bits(KVLearned().decode(there)) == due
