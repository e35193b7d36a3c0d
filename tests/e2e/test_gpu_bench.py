"""The script for a machine with a GPU: all of its way over the deferred driver, and its refusal where there is none.

Only what the driver does not know of a card stands here: how a tensor comes there, and what it holds. The daemon, the
client, the connector's buffers and the codecs are what a GPU machine runs.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bench import gpu
from kvstore.device.deferred import Deferred
from tests.conftest import ROOT
from tests.kvstored.inside import daemon_inside
from tests.kvstored_client.device.tensors import FakeCuda, on_gpu

SMALL = gpu.Size(layers=2, heads=1, dim=64, block=4, blocks=6, chunks=3, rounds=1)
ROWS = [
    ("gpu.copy", {"to": "gpu"}), ("gpu.copy", {"to": "host"}), ("gpu.copy", {"to": "hbm"}),
    ("gpu.get", {"form": "raw"}), ("gpu.get", {"form": "nf4"}), ("gpu.put", {"form": "raw"}),
    ("gpu.put", {"form": "nf4"}), ("gpu.nf4.decode", {}), ("gpu.nf4.encode", {}), ("gpu.get", {"form": "hot"}),
]  # fmt: skip


class Stand:
    """In place of a card: host memory that says it is on one."""

    name = "none"

    def __init__(self) -> None:
        self.driver = Deferred(kernels=True)

    def on(self, x: torch.Tensor) -> FakeCuda:
        return on_gpu(x)

    def numbers(self, x: torch.Tensor) -> torch.Tensor:
        return x.numbers.clone() if isinstance(x, FakeCuda) else x

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def settle(self) -> None:
        self.driver.settle()

    @contextmanager
    def hot_daemon(self, nbytes: int) -> Iterator[str]:
        outside = {"driver": Deferred(memory_nbytes=4 << 30)}
        with daemon_inside(segment_nbytes=8 << 20, outside=outside) as daemon:
            yield f"unix:{daemon.socket_path}"


@pytest.fixture(scope="module")
def found():
    return list(gpu.measure(Stand(), SMALL))


def test_all_that_must_hold_is_looked_at_and_holds(found):
    held = [(row["params"]["what"], row["value"]) for row in found if row["name"] == "gpu.holds"]
    assert len(held) == 15
    assert [what for what, value in held if not value] == []


def test_there_is_a_row_for_each_figure_with_its_ratio_to_a_bare_copy(found):
    rows = [row for row in found if row["name"] != "gpu.holds"]
    assert [(row["name"], row["params"]) for row in rows] == ROWS
    for row in rows:
        due = {"gpu.copy": [], "gpu.get": ["pinned_copy"], "gpu.put": ["pinned_copy"]}.get(row["name"], ["hbm_copy"])
        due = ["hbm_copy"] if row["params"].get("form") == "hot" else due
        assert list(row["ratios"]) == due
        assert row["value"] > 0
        assert all(value > 0 for value in row["ratios"].values())
        assert json.loads(json.dumps(row)) == row
        assert gpu.told(row).startswith(row["name"])


def test_where_something_does_not_hold_there_are_no_figures(monkeypatch):
    put = gpu.Bench.put

    def wrong(self, name):
        put(self, name)
        self.due[0][3] += 1

    monkeypatch.setattr(gpu.Bench, "put", wrong)
    found = list(gpu.measure(Stand(), SMALL))
    assert {row["name"] for row in found} == {"gpu.holds"}
    wrong = [gpu.told(row) for row in found if not row["value"]]
    assert "DOES NOT HOLD: paged blocks come back bit for bit" in wrong


def test_a_gpu_that_is_there_is_asked_for_its_figures_and_the_exit_code_says_whether_all_holds(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "at_hand", Stand)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", "--no-tests"])
    monkeypatch.setattr(gpu, "Size", lambda: SMALL)
    assert gpu.main() == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()][-1] == "gpu.get"
    monkeypatch.setattr(gpu.Bench, "worst", lambda _: 0.5)
    assert gpu.main() == 1
    monkeypatch.setattr(gpu, "at_hand", gpu.Card)
    assert gpu.main() == 1, "there is a GPU and no cuda-bindings"
    assert capsys.readouterr().err.splitlines()[-1].startswith("there is a GPU, and what works with it is missing: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would take minutes")
def test_without_a_gpu_it_says_so_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (77, "", "no GPU was at hand\n")
