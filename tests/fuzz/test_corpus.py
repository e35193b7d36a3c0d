"""The short form of `make fuzz`, without atheris: every input of the corpus, and some thousands of mutations."""

import random
import resource

import pytest

from tests.conftest import ROOT

from .mutation import mutated
from .targets import TARGETS, seeds

CORPUS = ROOT / "tests/fuzz/corpus"
MUTATIONS = 3000


def inputs(target):
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


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
