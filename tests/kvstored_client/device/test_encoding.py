"""vLLM's puts in four bits: chunks are encoded on the GPU before the trip, to the bytes that the store would make.

That nothing is lost where the encoder fails or the daemon refuses is tested with vLLM (tests/e2e/adapters).
"""

import pytest
import torch

from kvstore import decode
from kvstore.device.deferred import Deferred
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_encoding import FAILURES_MAX, encoding_of
from kvstored_client.integrations.vllm_filling import Filling

from .tensors import COPIES, on_gpu
from .test_paged import BLOCKS, GROUPS, caches, chunk, due_in, same


def gathered(chunks):
    """The entries of chunks in paged buffers on the GPU, as the connector's writer has them."""
    layers, places = caches(), [list(range(n, 20, 5))[:BLOCKS] for n in range(len(chunks))]
    for name, x in due_in(layers, zip(places, chunks, strict=True)).items():
        layers[name].numbers.copy_(x)
    buffers = GroupedBuffers(layers, GROUPS)
    return [(b"%d" % n, buffers.entry(buffers.gather((own,)))) for n, own in enumerate(places)]


def test_chunks_are_encoded_to_the_bytes_that_the_store_makes_of_them(guard, daemon):
    chunks = [chunk(n) for n in range(3)]
    made = encoding_of({"encode_on_gpu": True}, "auto", guard).packed(gathered(chunks), starts=True)
    assert [key for key, _ in made] == [b"0", b"1", b"2"]
    daemon.store.put_many([(b"raw %d" % n, tensors) for n, tensors in enumerate(chunks)], chain=True)
    daemon.store.demote(*(b"raw %d" % n for n in range(3)))
    for n, (_, packed) in enumerate(made):
        due = daemon.store.get(b"raw %d" % n, packed=True).tensors
        assert packed.keys() == due.keys() == {"k", "v"}
        for name, x in packed.items():
            assert (x.encoding, x.attrs) == ("nf4-kv2", due[name].attrs)
            assert x.parts.keys() == due[name].parts.keys()
            assert all(torch.equal(part, due[name].parts[suffix]) for suffix, part in x.parts.items())


def test_a_quarter_of_the_bytes_crosses_the_bus_and_they_come_back_as_they_were_encoded(guard, driver):
    chunks = [chunk(10 + n) for n in range(3)]
    made = encoding_of({"encode_on_gpu": True}, "auto", guard).packed(gathered(chunks), starts=False)
    on_the_gpu = [
        (key, {name: type(x)(x.spec, x.encoding, {s: on_gpu(p) for s, p in x.parts.items()}, x.attrs)
               for name, x in tensors.items()}) for key, tensors in made
    ]  # fmt: skip
    assert guard.cache.put_many(on_the_gpu, chain=True, parent=None, fidelity="auto") == 3
    assert 0 < driver.stored_nbytes < 0.32 * 3 * sum(x.nbytes for x in chunks[0].values())
    assert dict(COPIES).keys() <= {"d2d"}
    layers = caches()
    wanted = [(key, 0, (list(range(n, 20, 5))[:BLOCKS],)) for n, (key, _) in enumerate(made)]
    assert Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS).filled(wanted) == [True] * 3
    assert same(
        layers, due_in(caches(), [(own, decode(x)) for (_, _, (own,)), (_, x) in zip(wanted, made, strict=True)])
    )


def test_an_encoder_that_fails_is_not_asked_for_ever(guard, monkeypatch, caplog):
    encoding, entries, asked = encoding_of({"encode_on_gpu": True}, "auto", guard), gathered([chunk(1)]), []

    def fails(*_args, **_how):
        asked.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("kvstored_client.device.encoded_there", fails)
    for _ in range(FAILURES_MAX + 2):
        assert encoding.packed(entries, starts=True) is None
    assert len(asked) == FAILURES_MAX
    assert caplog.text.count("put as they are from now on") == 1


def test_after_a_success_failures_count_anew(guard):
    encoding = encoding_of({"encode_on_gpu": True}, "auto", guard)
    for _ in range(FAILURES_MAX):
        encoding.failed("the daemon did not take them")
        encoding.taken()
    assert encoding.packed(gathered([chunk(1)]), starts=True) is not None


def test_what_is_not_on_a_gpu_or_has_no_kernels_there_is_put_as_it_is(guard, daemon):
    encoding = encoding_of({"encode_on_gpu": True}, "auto", guard)
    assert encoding.packed([(b"k", chunk(1))], starts=True) is None
    nan = {name: on_gpu(torch.full_like(x, float("nan"))) for name, x in chunk(1).items()}
    assert encoding.packed([(b"k", nan)], starts=True) is None
    other = Guard(daemon.client(framework="torch", driver=Deferred(kernels=False)))
    assert encoding_of({"encode_on_gpu": True}, "auto", other).packed(gathered([chunk(1)]), starts=True) is None
    other.cache.close()


@pytest.mark.parametrize(("extra", "fidelity"), [({}, "auto"), ({"encode_on_gpu": True}, "exact")])
def test_who_does_not_ask_for_it_or_wants_every_bit_does_not_get_it(guard, extra, fidelity):
    assert encoding_of(extra, fidelity, guard) is None
