"""Memory that is used again: only when nobody reads it any more, and no more of it than is said."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from kvstored_client.integrations.transformers import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    for kept in memory._kept.values():
        kept.clear()
    yield
    for kept in memory._kept.values():
        kept.clear()


def pair(tokens: int = 100, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return memory.empty_pair((3, 2, tokens), (8, 4), dtype, CPU)


def kept_nbytes() -> int:
    return sum(buffer.size for kept in memory._kept.values() for buffer in kept)


def test_the_two_tensors_share_no_byte() -> None:
    k, v = pair()
    assert (k.shape, v.shape) == ((3, 2, 100, 8), (3, 2, 100, 4))
    k.fill_(1)
    v.fill_(2)
    assert bool((k == 1).all())
    assert bool((v == 2).all())


def test_what_nobody_refers_to_is_used_again_also_by_a_bit_more_and_by_another_type() -> None:
    k, v = pair(100)
    at = k.data_ptr()
    del k, v
    k, v = pair(105)
    assert k.data_ptr() == at
    del k, v
    assert pair(200, torch.bfloat16)[0].data_ptr() == at


@pytest.mark.parametrize("made", [lambda x: x, lambda x: x[1].transpose(0, 1), torch.Tensor.numpy, torch.Tensor.detach])
def test_memory_that_anything_made_of_it_still_shows_is_not_written_over(made: Callable[[torch.Tensor], Any]) -> None:
    k, v = pair()
    k.fill_(7)
    still = made(k)
    del k, v
    gc.collect()
    for x in pair():
        x.fill_(8)
    assert bool((still == 7).all())


def test_one_buffer_of_a_size_is_kept_and_none_that_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [pair() for _ in range(3)]
    nbytes = several[0][0].untyped_storage().nbytes()
    del several
    assert nbytes <= kept_nbytes() < 2 * nbytes
    monkeypatch.setattr(memory, "KEPT_MAX_NBYTES", nbytes - 1)
    for kept in memory._kept.values():
        kept.clear()
    pair()
    assert kept_nbytes() == 0


def test_threads_never_see_one_anothers_numbers() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(200):
            k, v = pair(50 + turn % 7)
            k.fill_(number)
            v.fill_(number)
            if not (bool((k == number).all()) and bool((v == number).all())):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
