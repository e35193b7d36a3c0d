"""The short form of `make fuzz`, without atheris: every input of the corpus, and some thousands of mutations."""

import random
import resource

import pytest

from tests.conftest import ROOT

from .targets import TARGETS, seeds

CORPUS = ROOT / "tests/fuzz/corpus"
MUTATIONS = 3000
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)


def inputs(target):
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutated(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.choice((1, 2, 4, 8))] = b""
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
        elif kind == 3:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, "little")
        elif kind == 4:
            out[at:] = out[at : rng.randrange(at, len(out) + 1)]
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randrange(32)]
    return bytes(out)


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_more_than_be_refused(target):
    rng = random.Random(target)
    known = inputs(target)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in known:
        TARGETS[target](data)
    for _ in range(MUTATIONS):
        data = mutated(rng.choice(known), rng)
        try:
            TARGETS[target](data)
        except Exception as error:
            raise AssertionError(f"put this into the corpus: {data.hex()}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB: nothing large was allocated


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_begins_with_valid_inputs(target):
    assert set(seeds()[target]) <= set(inputs(target))
