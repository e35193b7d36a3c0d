"""rANS: every symbol back, hardly more bits than the probabilities ask for, and no stream that is not one."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codecs import rans
from kvstore.codecs.classes import CLASSES, DELTA, expected, reach, tables_of
from kvstore.errors import CodecError
from kvstore.kernels import cpu

TABLES = tables_of(np.zeros((CLASSES, 256)), np.zeros(256))


PATHS = {"reference": None, **{cpu.ISAS[kernel.isa]: kernel for kernel in cpu.kernels()}}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(rans, "host_kernel", lambda: PATHS[request.param])
    return str(request.param)


def drawn(rows: int, width: int, seed: int) -> tuple[rans.Array, rans.Array]:
    """Symbols as their classes expect them."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(1, CLASSES, rows).astype(np.uint8)
    rows_of = [rng.choice(np.arange(-128, 128), width, p=expected(int(of))) for of in classes]
    return np.array(rows_of, np.int8).reshape(rows, width), classes


def test_tables_have_a_frequency_for_all_that_may_come() -> None:
    for of in range(CLASSES):
        found = np.flatnonzero(TABLES.counts[of]) - 128
        assert found[0] == rans.ESCAPE
        assert found[1:].tolist() == list(range(-reach(of), reach(of) + 1))
    assert TABLES.counts[DELTA].min() >= 1
    assert (TABLES.counts.sum(axis=1) == rans.TOTAL).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 40), width=st.integers(1, 90), seed=st.integers(0, 1000))
def test_symbols_come_back(path: str, rows: int, width: int, seed: int) -> None:
    symbols, classes = drawn(rows, width, seed)
    data = np.frombuffer(rans.encode(symbols, classes, TABLES), np.uint8)
    assert data.tobytes() == rans._encoded(symbols, classes, TABLES), "each path writes the reference's bytes"
    assert np.array_equal(rans.decode(data, rows, width, classes, TABLES), symbols)
    for wrong in (data[:-1], data[:-2], np.append(data, [0, 0]).astype(np.uint8), data[:0]):
        with pytest.raises(CodecError):
            rans.decode(wrong, rows, width, classes, TABLES)


def test_it_takes_one_percent_more_than_the_probabilities_say() -> None:
    symbols, classes = drawn(300, 256, 1)
    ideal = float(TABLES.lengths[classes[:, None], symbols.astype(int) + 128].sum())
    assert ideal < 8 * len(rans.encode(symbols, classes, TABLES)) < 1.015 * ideal


def test_many_lanes_give_the_same_bytes(path: str) -> None:
    symbols, classes = drawn(150, 300, 3)
    assert rans.lanes_of(symbols.size) == 16
    data = rans.encode(symbols, classes, TABLES)
    assert data == rans._encoded(symbols, classes, TABLES)
    assert np.array_equal(rans.decode(np.frombuffer(data, np.uint8), 150, 300, classes, TABLES), symbols)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), rows=st.integers(0, 20), width=st.integers(1, 40))
def test_any_bytes_are_symbols_or_a_codec_error(path: str, data: bytes, rows: int, width: int) -> None:
    classes = np.arange(rows, dtype=np.uint8)
    given_ = np.frombuffer(data, np.uint8)
    for length in (len(data), len(data) // 4 * 4):
        with suppress(CodecError):
            assert rans.decode(given_[:length], rows, width, classes, TABLES).shape == (rows, width)


def test_a_symbol_without_a_frequency_is_refused(path: str) -> None:
    with pytest.raises(CodecError, match="no frequency"):
        rans.encode(np.full((1, 4), 100, np.int8), np.full(1, 1, np.uint8), TABLES)


@pytest.mark.parametrize(
    "counts",
    [np.zeros((3, 256), np.uint16), np.full((1, 256), 16, np.int32), np.full((1, 255), 16, np.uint16),
     np.full((2, 256), 17, np.uint16), np.roll(np.eye(1, 256, dtype=np.uint16) * 4096, 5)],
    ids=["zeros", "type", "shape", "sum", "no escape"],
)  # fmt: skip
def test_tables_that_no_decoder_can_use_are_refused(counts: rans.Array) -> None:
    with pytest.raises(CodecError):
        rans.Tables(counts)
