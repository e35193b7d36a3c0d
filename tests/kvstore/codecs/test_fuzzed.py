"""Any bytes and attributes given to a decoder end in a tensor of its spec or in CodecError, on every path.

`make test` looks at a few hundred cases of each; `make torture` at a million in all, `kernel/sanitize.sh` at some under
AddressSanitizer. A failure prints the seed of its case: KVSTORED_FUZZ_SEED=<seed> runs that one again.
"""

import os
from functools import cache

import numpy as np
import pytest
import torch

from kvstore.codecs import codec_named, rans
from kvstore.codecs.basis import Basis, use
from kvstore.codecs.classes import CLASSES
from kvstore.codecs.hints import Hints
from kvstore.codecs.kv_learned import encoded_in
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from tests.kvstore.codecs import tiny_model as tiny
from tests.kvstore.codecs.test_nf4_kv2 import turned

CASES = 200 if (times := int(os.environ.get("KVSTORED_TORTURE", "0"))) == 0 else 17_000 * times
"""Of each decoder: three times 17,000 at `make torture`'s twenty are a million and more."""
ODD = (None, True, False, -1, 0, 1, 3, 7, 64, 66, 10**6, 10**30, 0.5, float("nan"), "", "x", "0,1", "9,1", "-1", [], {})


@cache
def basis() -> Basis:
    return use(tiny.basis())


@cache
def learned() -> list[EncodedTensor]:
    """A prompt's start, keys from within, values, and halves."""
    made = [
        encoded_in(basis(), "k", tiny.keys(48), Hints(prefix_start=True)),
        encoded_in(basis(), "k", tiny.keys(24, 640), Hints(prefix_start=False)),
        encoded_in(basis(), "v", tiny.values(40), Hints(prefix_start=False)),
        encoded_in(basis(), "v", tiny.values(64).to(torch.bfloat16), Hints(prefix_start=True)),
    ]
    assert any("kept" in some.parts for some in made)
    return made


@cache
def blocks() -> list[EncodedTensor]:
    """Still and turning means, packed halves, tokens kept in the middle, and no means at all."""
    g = torch.Generator().manual_seed(3)
    made = []
    shapes = (100, 2, 64, 1e4), (70, 1, 32, 0.0), (64, 2, 16, 1e4), (9, 2, 16, 0.0)
    for at, (tokens, heads, d, theta) in enumerate(shapes):
        x = torch.randn(2, tokens, heads, d, generator=g) * torch.exp2(torch.randn(d, generator=g))
        x = x + 30 * torch.randn(d, generator=g) if not theta else turned(x + 20, theta)
        if at == 1:  # an outlier within, which is kept
            x[:, tokens // 2] *= 20
        for name in ("k", "v", "kv"):
            made.append(NF4KV2().encode(name, x, Hints(prefix_start=[True, False, None][at % 3])))
    assert any("rotary" in some.attrs for some in made)
    return made


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes replaced, cut off, added, or a piece moved elsewhere."""
    some = np.frombuffer(data, np.uint8).copy()
    way = int(rng.integers(6))
    if way <= 2 and some.size:
        hit = rng.random(some.size) < 10.0 ** -(3 * rng.random())
        some[hit] = rng.integers(0, 256, int(hit.sum())) if way else [0, 255][int(rng.integers(2))]
    elif way == 3:
        some = some[: int(rng.integers(some.size + 1))]
    elif way == 4:
        some = np.concatenate((some, rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8)))
    elif some.size:
        some = np.roll(some, int(rng.integers(some.size)))
    return some.tobytes()


def damaged(encoded: EncodedTensor, rng: np.random.Generator) -> EncodedTensor:
    """One part, one attribute, or the spec changed, or several."""
    parts, attrs, spec = dict(encoded.parts), dict(encoded.attrs), encoded.spec
    for _ in range(1 + int(rng.integers(3))):
        what = int(rng.integers(8))
        if what <= 4 and parts:
            name = sorted(parts)[int(rng.integers(len(parts)))]
            part = parts[name]
            data = damaged_bytes(part.contiguous().view(torch.uint8).numpy().tobytes(), rng)
            data += bytes(-len(data) % part.element_size())
            new = torch.frombuffer(bytearray(data), dtype=part.dtype) if data else torch.empty(0, dtype=part.dtype)
            parts[name] = new.view(part.shape) if new.numel() == part.numel() else new
        elif what == 5:
            name = sorted(attrs)[int(rng.integers(len(attrs)))]
            attrs[name] = ODD[int(rng.integers(len(ODD)))]
        elif what == 6:
            shape = list(spec.shape)
            shape[int(rng.integers(len(shape)))] += int(rng.integers(-2, 3))
            spec = TensorSpec(spec.dtype, tuple(max(0, size) for size in shape))
        elif parts and rng.random() < 0.2:
            del parts[sorted(parts)[int(rng.integers(len(parts)))]]
    if rng.random() < 0.01:
        spec = TensorSpec(["float32", "float16", "bfloat16", "int8"][int(rng.integers(4))], spec.shape)
    return EncodedTensor(spec, encoded.encoding, parts, attrs)


def seeds() -> range:
    only = os.environ.get("KVSTORED_FUZZ_SEED")
    return range(CASES) if only is None else range(int(only), int(only) + 1)


@pytest.mark.parametrize("what", ["nf4-kv2", "kv-learned"])
def test_a_damaged_tensor_decodes_or_is_refused(what: str) -> None:
    whole = blocks() if what == "nf4-kv2" else learned()
    refused = 0
    for seed in seeds():
        rng = np.random.default_rng(seed)
        broken = damaged(whole[seed % len(whole)], rng)
        try:
            assert tuple(codec_named(what).decode(broken).shape) == broken.spec.shape
        except CodecError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"KVSTORED_FUZZ_SEED={seed}: {error!r}") from error
    assert refused or len(seeds()) == 1


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_any_bytes_are_a_stream_of_symbols_or_are_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "reference":
        monkeypatch.setattr(rans, "host_kernel", lambda: None)
    tables = basis().planes["key"].tables
    refused = 0
    for seed in range(0, len(seeds()), 2) if len(seeds()) > 1 else seeds():
        rng = np.random.default_rng(seed)
        rows, width = int(rng.integers(1, 40)), int(rng.integers(1, 70))
        classes = rng.integers(0, CLASSES, rows).astype(np.uint8)
        symbols = np.clip(rng.normal(0, 1, (rows, width)).round(), -1, 1).astype(np.int8) * (classes > 0)[:, None]
        data = np.frombuffer(damaged_bytes(rans.encode(symbols.astype(np.int8), classes, tables), rng), np.uint8)
        try:
            assert rans.decode(data, rows, width, classes, tables).shape == (rows, width)
        except CodecError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"KVSTORED_FUZZ_SEED={seed}: {error!r}") from error
    assert refused or len(seeds()) == 1
