"""The must-hold figures that fit into CI: real bytes on the first 3,000 requests, the simulator, its ceiling."""

from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.errors import ConfigError, InvalidEntry
from kvstore.simulation.simulator import Layout, Setup, layout_of, optimum, simulate
from kvstore.simulation.trace import Request, read_trace, replay
from kvstore.store import Store

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation.jsonl.xz"
SMALL = Layout(1, 1, 1)
"""1024 values a block of 512 tokens."""
RAW_NBYTES = 4096 + 512 + 32 + 2 * 640


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return read_trace(TRACE, 3000)


def oracle(requests: list[Request], capacity: int) -> int:
    """Leaf-first LRU in plain Python: a list touched deepest first, root last."""
    order: dict[int, None] = {}
    hits = 0
    for request in requests:
        held = 0
        for block in request.blocks:
            if block not in order:
                break
            held += 1
        hits += held
        for block in reversed(request.blocks[:capacity]):
            order.pop(block, None)
            order[block] = None
        for block in list(order)[: len(order) - capacity] if len(order) > capacity else ():
            del order[block]
    return hits


@pytest.mark.slow
def test_real_bytes_hit_as_often_as_the_oracle_says(requests: list[Request]) -> None:
    """15,433 of 80,619, within 0.3 points: leaf-first LRU with room for 9,139 blocks. 1 KiB a block here."""
    value = torch.randn(256)
    with Store.open(StoreConfig(), background=False) as store:
        store.put(b"k" * 32, {"kv": value})
        nbytes = store._r.hot.used_nbytes
    clock = ManualClock()
    with Store.open(StoreConfig(HotConfig(9139 * nbytes), WarmConfig(0)), clock=clock, background=False) as store:
        start_s = clock.now()

        def before(request: Request) -> None:
            clock.advance(max(0.0, start_s + request.at_s - clock.now()))

        *_, done = replay(store, requests, lambda _: {"kv": value}, before=before)
        assert store._r.chains.awaited == {}
    assert done.blocks == 80_619
    assert abs(done.hits - 15_433) <= 0.003 * done.blocks


def test_the_simulator_agrees_with_the_oracle_block_for_block(requests: list[Request]) -> None:
    some = requests[:600]
    for capacity in (500, 2000):
        report = simulate(some, Setup(capacity * RAW_NBYTES, hot_fraction=1.0, layout=SMALL))
        assert report.hits == oracle(some, capacity)


def test_the_simulator_hits_exactly_what_a_store_with_tensors_hits(requests: list[Request]) -> None:
    some = requests[:60]
    ram = 60 * RAW_NBYTES
    report = simulate(some, Setup(ram, hot_fraction=0.2, layout=SMALL))
    config = Setup(ram, hot_fraction=0.2, layout=SMALL).config
    clock = ManualClock()
    value = torch.randn(512)
    with Store.open(config, clock=clock, background=False) as store:
        start_s = clock.now()

        def before(request: Request) -> None:
            clock.advance(max(0.0, start_s + request.at_s - clock.now()))
            store.maintain()

        *_, done = replay(store, some, lambda _: {"k": value, "v": value}, before=before)
        tiers = {name: tier.hits for name, tier in store.stats().tiers.items()}
    assert done.hits == report.hits
    assert tiers == {name: hits for name, hits in report.by_tier.items() if name != "cold"}


def test_the_optimum_is_what_two_public_simulators_found(requests: list[Request]) -> None:
    assert optimum(requests, 1 << 40) >= optimum(requests, 3000) >= oracle(requests[:600], 3000)
    assert optimum(requests, 1 << 40) == oracle(requests, 1 << 40)


def test_a_disk_is_written_less_when_only_reused_blocks_are_admitted(requests: list[Request]) -> None:
    from kvstore.config import ColdConfig

    some = requests[:600]
    setup = {"ram_nbytes": 400 * RAW_NBYTES, "disk_nbytes": 2000 * RAW_NBYTES, "layout": SMALL}
    everything = simulate(some, Setup(**setup))
    reused = simulate(some, Setup(**setup, store=StoreConfig(cold=ColdConfig(admission="reused"))))
    assert everything.writes_per_put <= 1.0
    assert reused.writes_per_put < 0.3 * everything.writes_per_put
    assert everything.hits > reused.hits > 0
    assert everything.nbytes_written_a_day > reused.nbytes_written_a_day > 0


def test_layouts_are_known_by_name_or_by_their_numbers() -> None:
    assert layout_of("llama3-8b").token_values == 65_536
    assert layout_of("2x3x4") == Layout(2, 3, 4)
    for bad in ("llama", "2x3", "0x1x1", "axbxc"):
        with pytest.raises(ConfigError, match="a layout is one of"):
            layout_of(bad)


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for bad in (
        '{"timestamp": 1}',
        "nonsense",
        '{"timestamp": 1, "hash_ids": [1, 1]}',
        '{"timestamp": 1, "hash_ids": [-1]}',
    ):
        path.write_text('{"timestamp": 0, "hash_ids": [1]}\n' + bad + "\n")
        with pytest.raises(InvalidEntry, match=r"trace.jsonl:2"):
            read_trace(path)
