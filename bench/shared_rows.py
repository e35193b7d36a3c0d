"""A line of bench/shared.py's result, and how its parts measure."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """value in `unit`."""

    name: str
    params: dict[str, object]
    value: float
    ratios: dict[str, float] = field(default_factory=dict)
    unit: str = "ms"

    def text(self) -> str:
        """For people."""
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in self.ratios.items())
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.name:14} {params:12} {self.value:8.3f} {self.unit}   {ratios}"


def medians(rounds: int, *, apart_s: float = 0.0, **subjects: Callable[[], object]) -> dict[str, float]:
    """p50 in ms of each, in rounds of all of them; the first rounds are not counted. apart_s: between calls.

    The order is another one in each round: what one call leaves in caches, and what it keeps busy, is felt by the next.
    """
    took: dict[str, list[float]] = {name: [] for name in subjects}
    order, chance = list(subjects), random.Random(1)
    for turn in range(rounds + 3):
        chance.shuffle(order)
        for name in order:
            time.sleep(apart_s)
            begun = time.perf_counter()
            subjects[name]()
            if turn >= 3:
                took[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in took.items()}
