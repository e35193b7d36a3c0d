"""A caller's torch modes: a store called inside one neither loses a sound entry nor gives anything but its value.

Inside FakeTensorMode a record on the disk could not be decoded, so it was dropped as damaged; an entry that was on its
way down a tier was lost.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvstore import Store
from kvstore.codecs import check_entry, decode_entry
from kvstore.errors import InvalidEntry
from kvstore.hit import Hit

KV = torch.randn(2, 64, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
TENSORS = {"k": KV, "ids": torch.arange(5)}
VERBS = ("get", "out", "lease", "held", "promote", "demote", "drain", "put")


class Refusing(TorchDispatchMode):
    """A mode in which no operation works."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise RuntimeError(f"no {func} here")


class RefusingCalls(TorchFunctionMode):
    """The same, one level up."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise RuntimeError(f"no {func} here")


def within(mode):
    def run(work):
        with mode():
            return work()

    return run


def transformed(transform):
    def run(work):
        found = []

        def traced(x):
            found.append(work())
            return x.sum()

        transform(traced)(torch.ones(2, 2))
        return found[0]

    return run


MODES = {
    "fake tensors": within(FakeTensorMode),
    "a dispatch mode": within(Refusing),
    "a function mode": within(RefusingCalls),
    "inference": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "vmap": transformed(torch.func.vmap),
    "grad": transformed(torch.func.grad),
}


def done(store, verb, key, out):
    if verb in ("get", "out"):
        return store.get(key, out=out if verb == "out" else None).tensors
    if verb == "lease":
        with store.lease(key) as hit:
            return hit.tensors
    if verb == "held":
        found = next(store.read(store.plan([key], accept={"nf4-kv2", "nf4-kv", "nf4"})))
        if isinstance(found, Hit):
            return found.tensors
        check_entry(found.entry)
        return decode_entry(found.entry)
    if verb == "put":
        return store.put(key, TENSORS)
    return getattr(store, verb)(*([] if verb == "drain" else [key]))


def near(tensors):
    assert all(type(x) is torch.Tensor for x in tensors.values())
    assert torch.equal(tensors["ids"], TENSORS["ids"])
    return float(torch.linalg.vector_norm(tensors["k"] - KV)) < 0.2 * float(torch.linalg.vector_norm(KV))


@pytest.mark.parametrize("mode", MODES)
def test_a_callers_mode_changes_nothing(mode, tmp_path):
    with Store.open(tmp_path, framework="torch", background=False) as store:
        for verb in VERBS:
            for deep, key in enumerate((b"hot", b"warm", b"cold")):
                store.put(key, TENSORS)
                assert sum(store.demote(key) for _ in range(deep)) == deep
            if verb != "drain":
                store.drain()
            for key in (b"hot", b"warm", b"cold"):
                out = {name: torch.zeros_like(x) for name, x in TENSORS.items()}
                got = MODES[mode](lambda verb=verb, key=key, out=out: done(store, verb, key, out))
                assert not isinstance(got, dict) or near(got), (verb, key)
                assert near(store.get(key).tensors), (verb, key)
        assert store.stats().values["cold_corrupt_total"] == 0


@pytest.mark.parametrize("tier", ["hot", "warm", "cold"])
@pytest.mark.parametrize(
    "unfit",
    [
        lambda x: x.requires_grad_(),
        torch.inference_mode()(torch.zeros_like),
        lambda x: x[:1].expand(2, -1),
    ],
    ids=["a leaf with a gradient", "made in inference mode", "expanded"],
)
def test_an_out_that_cannot_be_written_is_the_callers_error_and_the_entry_stays(unfit, tier, tmp_path):
    """torch's refusal was taken for a record that does not decode: the entry was dropped."""
    x = torch.randn(2, 64, dtype=torch.float32)
    with Store.open(tmp_path / "cold", framework="torch", background=False) as store:
        store.put(b"k", {"x": x}, fidelity="exact")
        for _ in range(("hot", "warm", "cold").index(tier)):
            store.demote(b"k")
        with pytest.raises(InvalidEntry, match="out: RuntimeError"):
            store.get(b"k", out={"x": unfit(torch.zeros(2, 64))})
        assert torch.equal(store.get(b"k").tensors["x"], x)
