"""What every engine does, over real servers: a dictionary, Valkey alone, a Valkey Cluster of six, S3."""

import os
import threading

import pytest

from kvstore.shared import HEAD_NBYTES, AsksAndClaims
from kvstore.shared.names import PREFIX

TIMEOUT_S = 20.0
MIB = 1 << 20


@pytest.fixture
def names():
    """Names that no other test has."""
    return [PREFIX + os.urandom(32).hex() for _ in range(24)]


def test_what_was_put_is_found_by_its_head_and_got_whole(engine, names):
    values = [os.urandom(size) for size in (96, 97, 1000, 1024, 1025, 65536, 1_550_000)]
    objects = [(name, [value]) for name, value in zip(names, values, strict=False)]
    assert engine.put(objects, 60, TIMEOUT_S) == [True] * len(values)
    asked = names[: len(values) + 2]
    assert engine.heads(asked, TIMEOUT_S) == [*(value[:HEAD_NBYTES] for value in values), None, None]
    got = engine.get(asked, [*map(len, values), 100, 5 * MIB], TIMEOUT_S)
    assert got == [*values, None, None]
    assert all(isinstance(value, bytearray) for value in got[: len(values)])


def test_the_buffers_of_an_object_are_stored_one_behind_the_other_without_regard_to_their_type(engine, names):
    head, body = os.urandom(200), bytearray(os.urandom(70_000))
    parts = [head, memoryview(body)[:40_000], b"", memoryview(body)[40_000:]]
    assert engine.put([(names[0], parts)], 60, TIMEOUT_S) == [True]
    assert engine.get([names[0]], [70_200], TIMEOUT_S) == [head + bytes(body)]


@pytest.mark.parametrize("nbytes", [8 * MIB, 9 * MIB + 1, 13 * MIB + 77])
def test_a_long_value_comes_back_whole(engine, names, nbytes):
    value = os.urandom(nbytes)
    short = os.urandom(500)
    half = nbytes // 3
    assert engine.put([(names[0], [value[:half], value[half:]]), (names[1], [short])], 60, TIMEOUT_S) == [True, True]
    assert engine.heads(names[:2], TIMEOUT_S) == [value[:HEAD_NBYTES], short[:HEAD_NBYTES]]
    assert engine.get(names[:3], [nbytes, 500, nbytes], TIMEOUT_S) == [value, short, None]


def test_an_object_of_another_size_than_asked_for_is_a_miss(engine, names):
    engine.put([(names[0], [os.urandom(5000)]), (names[1], [os.urandom(9 * MIB)])], 60, TIMEOUT_S)
    for other in (4999, 5001, 96, 9 * MIB):
        assert engine.get([names[0]], [other], TIMEOUT_S) == [None]
    for other in (9 * MIB - 1, 9 * MIB + 1, 4 * MIB, 5000):
        assert engine.get([names[1]], [other], TIMEOUT_S) == [None]
    assert engine.get([names[0]], [5000], TIMEOUT_S) != [None]


@pytest.mark.parametrize("nbytes", [5000, 9 * MIB])
def test_what_is_there_stays_unless_it_is_replaced(engine, names, nbytes):
    first, second = os.urandom(nbytes), os.urandom(nbytes)
    assert engine.put([(names[0], [first])], 60, TIMEOUT_S) == [True]
    assert engine.put([(names[0], [second])], 60, TIMEOUT_S) == [True]
    assert engine.get([names[0]], [nbytes], TIMEOUT_S) == [first]
    assert engine.put([(names[0], [second])], 60, TIMEOUT_S, replace=True) == [True]
    assert engine.get([names[0]], [nbytes], TIMEOUT_S) == [second]


def test_what_is_deleted_is_gone_and_a_name_without_an_object_is_acknowledged(engine, names):
    engine.put([(names[0], [os.urandom(5000)]), (names[1], [os.urandom(9 * MIB)])], 60, TIMEOUT_S)
    assert engine.delete(names[:3], TIMEOUT_S) == [True, True, True]
    assert engine.heads(names[:3], TIMEOUT_S) == [None, None, None]
    assert engine.get(names[:2], [5000, 9 * MIB], TIMEOUT_S) == [None, None]
    again = os.urandom(5000)
    assert engine.put([(names[0], [again])], 60, TIMEOUT_S) == [True]
    assert engine.get([names[0]], [5000], TIMEOUT_S) == [again]


def test_a_claim_is_one_callers_where_the_engine_has_claims(engine, names):
    answers = [engine.claim(names[:3], 30, TIMEOUT_S) for _ in range(2)]
    assert answers[0] == [True, True, True]
    assert answers[1] in ([False] * 3, [True] * 3)  # S3 has none


def test_presence_and_claims_are_asked_together(engine, names):
    assert isinstance(engine, AsksAndClaims)
    value = os.urandom(300)
    engine.put([(names[0], [value])], 60, TIMEOUT_S)
    first = engine.heads_or_claims(names[:3], 30, TIMEOUT_S)
    assert first == [value[:HEAD_NBYTES], True, True]


def test_no_names_are_no_question(engine):
    assert engine.heads([], TIMEOUT_S) == []
    assert engine.get([], [], TIMEOUT_S) == []
    assert engine.put([], 60, TIMEOUT_S) == []
    assert engine.claim([], 60, TIMEOUT_S) == []
    assert engine.delete([], TIMEOUT_S) == []


def test_many_names_are_answered_in_their_order(engine, names):
    values = {name: os.urandom(100 + at) for at, name in enumerate(names)}
    engine.put([(name, [value]) for name, value in list(values.items())[::2]], 60, TIMEOUT_S)
    asked = names[::-1] + names
    held = set(names[::2])
    expected = [values[name] if name in held else None for name in asked]
    assert engine.heads(asked, TIMEOUT_S) == [value and value[:HEAD_NBYTES] for value in expected]
    assert engine.get(asked, [len(values[name]) for name in asked], TIMEOUT_S) == expected


def test_threads_do_not_get_each_others_answers(engine, names):
    values = {name: os.urandom(20_000 + at) for at, name in enumerate(names)}
    assert all(engine.put([(name, [value]) for name, value in values.items()], 60, TIMEOUT_S))
    wrong = []

    def ask(start):
        mine = names[start::4]
        for _ in range(10):
            got = engine.get(mine, [len(values[name]) for name in mine], TIMEOUT_S)
            wrong.extend(name for name, value in zip(mine, got, strict=True) if value != values[name])

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_health_tells_of_servers_that_are_up(engine):
    health = engine.health(TIMEOUT_S)
    assert health.nodes == health.nodes_up >= 1
    assert engine.breaker == 0
