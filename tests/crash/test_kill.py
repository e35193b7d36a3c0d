"""kill -9, at named points and at random moments: no wrong bytes, nothing acknowledged lost, nothing deleted back."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.crash.history import Judge, open_cold, say, seeds
from tests.crash.points import POINTS, run_and_kill, run_to_death

TIGHT_NBYTES = 6 << 20
"""Some twenty values: evictions all the time."""


LIVES = 3
"""Deaths of one directory: what a death left is what the next life begins with."""


@pytest.mark.parametrize("capacity_nbytes", [1 << 30, TIGHT_NBYTES], ids=["roomy", "tight"])
def test_killed_at_named_points(tmp_path: Path, capacity_nbytes: int) -> None:
    died = checked = 0
    for seed in seeds(14, "named points"):
        rng = random.Random(seed)
        path = tmp_path / str(seed)
        path.mkdir()
        judge = Judge(evicting=capacity_nbytes == TIGHT_NBYTES)
        for _ in range(LIVES):
            point = (rng.choice(POINTS), int(2 ** rng.uniform(0, 5)))
            status = run_to_death(
                path / "cold", path / "log", rng, judge.version, point=point, capacity_nbytes=capacity_nbytes
            )
            died += os.WIFSIGNALED(status)
            assert status in (0, 9), f"seed {seed}: the child failed by itself"
            judge_again(judge, path, capacity_nbytes, f"seed {seed} at {point}")
        checked += judge.checked
    say(f"named points: {died} deaths, {checked} keys checked, 0 lies")


@pytest.mark.parametrize("capacity_nbytes", [1 << 30, TIGHT_NBYTES], ids=["roomy", "tight"])
def test_killed_at_random_moments(tmp_path: Path, capacity_nbytes: int) -> None:
    checked = 0
    for seed in seeds(6, "random moments"):
        rng = random.Random(seed)
        path = tmp_path / str(seed)
        path.mkdir()
        judge = Judge(evicting=capacity_nbytes == TIGHT_NBYTES)
        for _ in range(LIVES):
            after_s = rng.uniform(0, 0.3)
            run_and_kill(
                path / "cold", path / "log", rng, judge.version, after_s=after_s, capacity_nbytes=capacity_nbytes
            )
            judge_again(judge, path, capacity_nbytes, f"seed {seed} after {after_s:.3f} s")
        checked += judge.checked
    say(f"random moments: {checked} keys checked, 0 lies")


def judge_again(judge: Judge, path: Path, capacity_nbytes: int, told: str) -> None:
    """Open what a dead process left, in time, and compare."""
    try:
        judge.read(path / "log")
        start = time.process_time()  # what a busy machine adds says nothing
        cold = open_cold(path / "cold", None, capacity_nbytes)
        took_s = time.process_time() - start
        judge.check(cold)
        assert cold.stats().quarantined is None
        assert cold.stats().counters.corrupt_total == 0
        assert took_s < 5
        cold.close()
    except AssertionError as error:
        raise AssertionError(f"{told}: {error}") from None
