"""Every kind of tensor or array a caller may hand in: stored right, or InvalidEntry and nothing else."""

import ml_dtypes
import numpy as np
import pytest
import torch

from kvstore import Store, arrays
from kvstore.errors import InvalidEntry

pytestmark = pytest.mark.filterwarnings("ignore")
"""torch and numpy warn of half of the kinds here."""


class Plain(torch.Tensor):
    """A subclass that is memory like any other."""


class Disliking(torch.Tensor):
    """A subclass whose every operation fails."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"no {func.__name__} here")


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def freed():
    x = torch.ones(1000)
    x.untyped_storage().resize_(0)
    return x


def half_freed():
    x = torch.ones(1000)[::2]
    x.untyped_storage().resize_(400)
    return x


REFUSED = {
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": fake,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "masked": lambda: np.ma.masked_array(np.ones(3), [0, 1, 0]),
    "objects": lambda: np.array([1, None], dtype=object),
    "structured": lambda: np.zeros(3, dtype=[("a", "f4"), ("b", "i4")]),
    "records": lambda: np.rec.array([(1, 2.0)]),
    "text": lambda: np.array(["a"]),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "long double": lambda: np.ones(2, np.longdouble),
    "freed": freed,
    "half freed": half_freed,
    "too large a view": lambda: torch.ones(1).expand(1 << 40),
    "a subclass that refuses": lambda: torch.randn(3).as_subclass(Disliking),
    "a list": lambda: [1.0, 2.0],
    "a number": lambda: 1.0,
    "a numpy scalar": lambda: np.float32(1),
    "nothing": lambda: None,
}

STORED = {
    "no dimension": lambda: torch.tensor(7),
    "no value": lambda: torch.ones(3, 0, 2),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(5)),
    "with a gradient": lambda: torch.randn(5, requires_grad=True) * 2,
    "made in inference mode": lambda: torch.inference_mode()(torch.ones)(4),
    "conjugate": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negative view": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.arange(3).expand(4, 3),
    "overlapping": lambda: torch.arange(10.0).as_strided((4, 4), (1, 2)),
    "transposed": lambda: torch.randn(3, 4).t(),
    "every second": lambda: torch.arange(20)[1::2],
    "a subclass": lambda: torch.randn(3).as_subclass(Plain),
    "big-endian": lambda: np.arange(5, dtype=">i4"),
    "backwards": lambda: np.arange(5)[::-1],
    "by columns": lambda: np.asfortranarray(np.random.default_rng(1).random((3, 4))),
    "broadcast": lambda: np.broadcast_to(np.arange(3.0), (4, 3)),
    "a matrix": lambda: np.asmatrix(np.arange(6.0).reshape(2, 3)),
    "no dimension, numpy": lambda: np.array(2.5),
    "read-only": lambda: np.frombuffer(b"abcdefgh", np.uint8),
    "unaligned": lambda: np.frombuffer(b"abcdefghi", np.uint8)[1:].view("<f4"),
    "bfloat16": lambda: np.arange(4).astype(ml_dtypes.bfloat16),
    "another word for int64": lambda: np.arange(4, dtype=np.longlong),
}


def plain(x):
    """The same values, dense."""
    if isinstance(x, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return x.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().clone()
    dense = np.array(x, dtype=x.dtype.newbyteorder("="), order="C", subok=False)
    return arrays.from_bytes(arrays.describe("", dense), dense.reshape(-1).view(np.uint8), "torch")


@pytest.fixture(scope="module")
def store():
    with Store.open(framework="torch", background=False) as held:
        yield held


@pytest.mark.parametrize("own", [False, True], ids=["copied", "handed over"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_numbers_is_an_invalid_entry(store, kind, own):
    """A meta tensor was NotImplementedError, a masked array ValueError; a FakeTensor was taken."""
    with pytest.raises(InvalidEntry):
        store.put(b"k", {"x": REFUSED[kind]()}, own=own)


@pytest.mark.parametrize("own", [False, True], ids=["copied", "handed over"])
@pytest.mark.parametrize("kind", STORED)
def test_what_holds_numbers_comes_back_bit_for_bit(store, kind, own):
    x = STORED[kind]()
    want = plain(x)
    store.put(b"k", {"x": x}, own=own, fidelity="exact")
    got = store.get(b"k").tensors["x"]
    assert type(got) is torch.Tensor
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert arrays.as_bytes(got).tobytes() == arrays.as_bytes(want).tobytes()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_client_refuses_the_same_kinds(kind):
    """What it sends is described and read by these two, before anything is sent."""
    with pytest.raises(InvalidEntry):
        x = REFUSED[kind]()
        arrays.check_specs({"x": arrays.describe("x", x)})
        arrays.as_bytes(x)


@pytest.mark.parametrize("kind", STORED)
def test_a_client_sends_the_same_bytes(kind):
    x = STORED[kind]()
    want = plain(x)
    assert arrays.describe("x", x) == arrays.describe("x", want)
    assert arrays.as_bytes(x).tobytes() == arrays.as_bytes(want).tobytes()


def test_another_default_device_changes_nothing(tmp_path):
    """Inside `torch.device("meta")`, or after `set_default_device`, memory made without a device is elsewhere.

    The compiled kernel was then given addresses of another device, and good records were unreadable.
    """
    x = torch.randn(2, 64, 2, 32, dtype=torch.float32)
    with Store.open(tmp_path / "cold", framework="torch", background=False) as store:
        with torch.device("meta"):
            for key, tensor in ((b"k", x), (b"empty", torch.ones(0, device="cpu"))):
                store.put(key, {"k": tensor})
                store.demote(key)
            store.drain()
            assert store.demote(b"k") == 1
            hit = store.get(b"k")
            assert store.get(b"empty").tensors["k"].device.type == "cpu"
        assert hit.tier == "cold"
        assert torch.linalg.vector_norm(hit.tensors["k"] - x) < 0.2 * torch.linalg.vector_norm(x)


@pytest.mark.parametrize("chain", [False, True])
def test_of_two_entries_under_one_key_the_later_one_is_kept(store, chain):
    """As in a dictionary: a batch is put in reverse, so that the first one stayed."""
    batch = [(b"a", 1.0), (b"b", 2.0), (bytearray(b"a"), 3.0)]
    assert store.put_many([(key, {"x": torch.tensor(value)}) for key, value in batch], chain=chain) == 3
    found = store.get_many([b"a", b"b"])
    assert [float(hit.tensors["x"]) for hit in found] == [3.0, 2.0]
    if chain:
        assert store.delete(b"a") == 1
        assert store.get(b"b") is None
