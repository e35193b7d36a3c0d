"""The bytes of tensors and arrays, copied once whatever way they lie."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import arrays
from kvstore.dtypes import BY_NAME
from kvstore.errors import InvalidEntry

WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda x: x,
    "tokens of a whole": lambda x: x[:, 2:5],
    "transposed": lambda x: x.transpose(0, 1),
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1),
    "one number": lambda x: x[0, 0, 0],
    "none": lambda x: x[:, :0, ::2],
}


def source(name: str) -> torch.Tensor:
    numbers = torch.arange(4 * 6 * 8).reshape(4, 6, 8)
    if name == "bool":
        return numbers % 3 == 0
    dtype = getattr(torch, name)
    return numbers.remainder(100).float().to(dtype) if name.startswith("float8") else numbers.remainder(100).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_written_are_the_bytes_of_the_tensor(name: str, way: str) -> None:
    x = WAYS[way](source(name))
    data = np.full(x.nbytes, 0xAA, np.uint8)
    arrays.write_bytes(x, data)
    assert np.array_equal(data, arrays.as_bytes(x.contiguous()))
    numpy = arrays.from_bytes(arrays.describe("x", x), arrays.as_bytes(x).copy(), "numpy")
    strided = np.empty((*numpy.shape, 2), numpy.dtype)[..., 0]
    strided[...] = numpy
    data[:] = 0xAA
    arrays.write_bytes(strided, data)
    assert np.array_equal(data, arrays.as_bytes(x.contiguous()))


def test_what_is_written_of_an_unusual_one_are_its_numbers() -> None:
    z = torch.complex(torch.randn(3, 4), torch.randn(3, 4))
    for x in (
        z.conj().T,
        z.conj().imag.T,
        torch.randn(3, 4, requires_grad=True).T,
        torch.nn.Parameter(torch.ones(2, 3)).T,
    ):
        data = np.empty(x.nbytes, np.uint8)
        arrays.write_bytes(x, data)
        spec = arrays.describe("x", x)
        assert torch.equal(arrays.from_bytes(spec, data, "torch"), x.detach().resolve_conj().resolve_neg())
    swapped = np.arange(12, dtype=">i4").reshape(3, 4).T
    data = np.empty(swapped.nbytes, np.uint8)
    arrays.write_bytes(swapped, data)
    assert np.array_equal(data.view("<i4").reshape(4, 3), swapped)


@pytest.mark.parametrize("x", [torch.zeros(4, 6)[:, :3], torch.zeros(12), np.zeros((4, 6))[:, :3], np.zeros(12)])
def test_a_tensor_of_another_size_is_refused_and_nothing_is_written(x: Any) -> None:
    data = np.full(x.nbytes + 8, 7, np.uint8)
    with pytest.raises(InvalidEntry, match="changed its size"):
        arrays.write_bytes(x, data)
    assert (data == 7).all()


def test_a_strided_tensor_whose_memory_was_freed_is_refused() -> None:
    x = torch.zeros(4, 6)[:, :3]
    x.untyped_storage().resize_(0)
    with pytest.raises(InvalidEntry, match="storage of 0 bytes"):
        arrays.write_bytes(x, np.empty(x.nbytes, np.uint8))


def test_a_strided_tensor_needs_no_second_copy() -> None:
    """Its dense bytes would be memory as large as the tensor, which `as_bytes` takes and this does not."""
    whole, copies = torch.zeros(4, 6, 8), list[int]()
    arrays.write_bytes(whole[:, 2:5], np.empty(384, np.uint8), lambda target, _: copies.append(target.size))
    assert not copies
    arrays.write_bytes(whole, np.empty(768, np.uint8), lambda target, _: copies.append(target.size))
    assert copies == [768]
