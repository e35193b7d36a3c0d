"""Everything that needs a GPU, for real, in one run of under 8 minutes: `bench/gpu.py [--json] [--no-tests]`.

Needs torch with CUDA, cuda-bindings and, for the codecs' kernels, Triton; no engine. Without a GPU it says "no GPU was
at hand" and ends with exit code 77. First what must hold, with tensors on the GPU and a daemon beside it: verbs give
the same bytes, memory of both kinds is registered, 4 bits are decoded and encoded to the CPU's bits, a hot tier in GPU
memory gives back what was put; then, unless --no-tests, the tests that run on a GPU alone. Exit code 1: something does
not hold. Then the rows, GB/s of decoded bytes with the best of the rounds; ratios are to a bare copy of this run:

    gpu.copy        bare copies: pinned memory to the GPU and back (params: to), and within it
    gpu.get         chunks of 256 tokens, 32 layers, 8 heads of 128, bfloat16, into paged blocks, as vLLM's connector
                    does it (params: form); ratio `pinned_copy`, of the bytes that cross the bus; due 0.9 for raw.
                    Form hot: out of a daemon's hot tier in the same GPU's memory, which is mapped; ratio `hbm_copy`
    gpu.put         from paged blocks into the daemon, ratio `pinned_copy`, due 0.85; form nf4: encoded there before
    gpu.nf4.decode  packed parts on the GPU into paged blocks, one launch for all of them; ratio `hbm_copy`, due 0.7
    gpu.nf4.encode  paged blocks to packed parts, as puts do it; ratio `hbm_copy`
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]

from kvstore import HotConfig, Store, StoreConfig, encode  # noqa: E402 - found by the line above
from kvstore.codecs.packing import decoded  # noqa: E402
from kvstore.device import DriverError, MemoryDriver  # noqa: E402
from kvstored_client import Client  # noqa: E402
from kvstored_client.device.paged import Paged, Scatter  # noqa: E402
from kvstored_client.integrations.guard import Guard  # noqa: E402
from kvstored_client.integrations.vllm_blocks import GroupedBuffers  # noqa: E402
from kvstored_client.integrations.vllm_encoding import Encoding  # noqa: E402
from kvstored_client.integrations.vllm_filling import GPU_CALL_NBYTES, Filling, pieces  # noqa: E402
from kvstored_client.integrations.vllm_groups import Group, Groups  # noqa: E402
from tools.engines.run_vllm import serving  # noqa: E402

NO_GPU, SKIP = "no GPU was at hand", 77
ROUNDS = 5
DUE = {"gpu.get": 0.9, "gpu.put": 0.85, "gpu.nf4.decode": 0.7}
TESTS = ("tests/kvstore/kernels/test_cuda.py", "tests/contract")
TESTS_TIMEOUT_S = 300
HOT_CHUNKS = 16
"""Of a daemon's hot tier on the GPU: 512 MiB, beside the buffers and what encoding takes."""


class Machine(Protocol):
    """The GPU as this bench needs it beside the driver."""

    driver: MemoryDriver
    name: str

    def on(self, x: torch.Tensor) -> Any:
        """A copy of a tensor on the GPU."""
        ...

    def numbers(self, x: Any) -> torch.Tensor:
        """What a tensor on the GPU holds, on the host."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Page-locked bytes on the host."""
        ...

    def settle(self) -> None:
        """Return once the GPU has done all."""
        ...

    def hot_daemon(self, nbytes: int) -> AbstractContextManager[str]:
        """The address of a daemon whose hot tier, of so many bytes, is in this GPU's memory."""
        ...


class Card:
    """A GPU of CUDA's."""

    def __init__(self) -> None:
        from kvstore.device.cuda import Cuda

        self.driver: MemoryDriver = Cuda()
        self.name = torch.cuda.get_device_name(0)

    def on(self, x: torch.Tensor) -> torch.Tensor:
        """Strides and all."""
        return x.to("cuda:0")

    def numbers(self, x: torch.Tensor) -> torch.Tensor:
        """A copy."""
        return x.cpu()

    def pinned(self, nbytes: int) -> torch.Tensor:
        """By torch."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def settle(self) -> None:
        """All of its streams."""
        torch.cuda.synchronize(0)

    @contextmanager
    def hot_daemon(self, nbytes: int) -> Iterator[str]:
        """A process of its own."""
        hot = {"KVSTORED_STORE__HOT__DEVICE": "cuda:0", "KVSTORED_STORE__HOT__CAPACITY_NBYTES": str(nbytes)}
        with serving(**hot, KVSTORED_STORE__PROMOTE_AFTER="0") as (address, _):
            yield address


@dataclass(frozen=True)
class Size:
    """Of a chunk, and how many of them are moved."""

    layers: int = 32
    heads: int = 8
    dim: int = 128
    block: int = 16
    blocks: int = 16
    """Of a chunk."""
    chunks: int = 32
    rounds: int = ROUNDS

    @property
    def chunk_nbytes(self) -> int:
        """Of bfloat16, keys and values."""
        return 2 * 2 * self.layers * self.heads * self.dim * self.block * self.blocks


class Bench:
    """A daemon's client, paged buffers on the GPU, and chunks in both."""

    def __init__(self, machine: Machine, address: str, size: Size) -> None:
        self.machine, self.size = machine, size
        # As they are held, so that no get moves an entry to another tier, and none is encoded behind a timed put.
        self.client = Client(address, framework="torch", on_error="raise", timeout_s=60, driver=machine.driver)
        self.guard = Guard(self.client, lookup_timeout_s=10, fetch_timeout_s=60)
        total = size.chunks * size.blocks
        shape = (total + 1, 2, size.block, size.heads, size.dim)
        generator = torch.Generator().manual_seed(1)
        self.due = [torch.randn(shape, generator=generator).bfloat16() for _ in range(size.layers)]
        self.layers = [machine.on(x) for x in self.due]
        names = tuple(f"l{i:03}" for i in range(size.layers))
        groups = Groups((Group(names, size.dim, 0, None),))
        self.buffers = GroupedBuffers(dict(zip(names, self.layers, strict=True)), groups)
        self.filling = Filling(self.guard, self.buffers, size.blocks)
        self.encoding = Encoding(self.guard)
        # Scattered, as after hours of serving: no two blocks of a chunk lie side by side.
        order = [1 + (7919 * at) % total for at in range(total)]
        self.places = [order[i * size.blocks : (i + 1) * size.blocks] for i in range(size.chunks)]

    def keys(self, name: str) -> list[bytes]:
        """Of the chunks."""
        return [b"%s %d" % (name.encode(), i) for i in range(self.size.chunks)]

    def put(self, name: str) -> None:
        """All chunks out of the paged blocks, as the connector does it."""
        for some in pieces(list(zip(self.keys(name), self.places, strict=True)), self.size.chunk_nbytes):
            gathered = [(key, self.buffers.gather((places,))) for key, places in some]
            computed = self.guard.before({str(i): x for i, x in enumerate(own)} for _, (own,) in gathered)
            if computed is not None:
                computed()
            entries = [(key, self.buffers.entry(own)) for key, own in gathered]
            assert self.client.put_many(entries, fidelity="exact") == len(entries), "a put was not stored"

    def put_packed(self, name: str) -> None:
        """The same in 4 bits, encoded on the GPU."""
        for some in pieces(list(zip(self.keys(name), self.places, strict=True)), self.size.chunk_nbytes):
            entries = self.encoded(some)
            assert self.client.put_many(entries) == len(entries), "a put was not stored"

    def encoded(self, some: Sequence[tuple[bytes, list[int]]]) -> list[tuple[bytes, Mapping[str, Any]]]:
        """Chunks of the paged blocks in 4 bits, encoded where they lie, as the connector does it."""
        entries = [(key, self.buffers.entry(self.buffers.gather((places,)))) for key, places in some]
        self.machine.settle()
        made = self.encoding.packed(entries, starts=True)
        assert made is not None, "the GPU did not encode"
        return made

    def get(self, name: str) -> None:
        """All chunks into the paged blocks, as the connector does it."""
        wanted = [(key, 0, (places,)) for key, places in zip(self.keys(name), self.places, strict=True)]
        for some in pieces(wanted, self.size.chunk_nbytes, GPU_CALL_NBYTES):
            assert all(self.filling.filled(some)), "a chunk was not filled"

    def packed(self, places: list[int]) -> dict[str, Any]:
        """A chunk in 4 bits."""
        return dict(self.encoded([(b"", places)])[0][1])

    def landed(self, name: str) -> Scatter:
        """All chunks in 4 bits on the GPU, to be decoded right into their places."""
        pairs: list[tuple[Paged, Any]] = []
        for key, places in zip(self.keys(name), self.places, strict=True):
            hit = self.client.get(key, packed=True)
            assert hit is not None
            paged = self.buffers.paged((places,), self.size.blocks)
            pairs += [(paged[one], x) for one, x in hit.tensors.items()]
        batch = self.client.transfers.batch_for({"": target} for target, _ in pairs)
        assert batch is not None
        scatter = Scatter(self.machine.driver, pairs)
        scatter.bring(batch)
        batch.run()
        return scatter

    def blank(self) -> None:
        """Nothing is in the paged blocks any more."""
        for layer in self.layers:
            layer.zero_()
        self.machine.settle()

    def worst(self) -> float:
        """The largest relative error of a layer's blocks; 0.0: they are what they were, bit for bit."""
        self.machine.settle()
        errors = [0.0]
        for layer, due in zip(self.layers, self.due, strict=True):
            found = self.machine.numbers(layer)[1:].float()
            errors.append(float((found - due[1:].float()).norm() / due[1:].float().norm()))
        return max(errors)

    def best(self, work: Callable[[], Any]) -> float:
        """Seconds of the best round, once something was run for nothing."""
        found = []
        for _ in range(self.size.rounds + 1):
            self.machine.settle()
            began = time.perf_counter()
            work()
            self.machine.settle()
            found.append(time.perf_counter() - began)
        return min(found[1:])


def checks(bench: Bench) -> Iterator[tuple[str, bool]]:
    """What must hold, and whether it does."""
    machine, client = bench.machine, bench.client
    bench.put("raw")
    bench.blank()
    bench.get("raw")
    yield "paged blocks come back bit for bit", bench.worst() == 0.0
    client.transfers.settled()
    known = dict(client.transfers._known)  # noqa: SLF001 - what is registered is nobody else's business
    yield "memory that is read is registered", any(known[one] for one in known if not one.writable)
    yield "memory that is written is registered", any(known[one] for one in known if one.writable)
    x = torch.randn(3, 40, 2, 64)
    whole = machine.on(torch.zeros(3, 50, 2, 64))
    client.put(b"x", {"x": machine.on(x)})
    client.get(b"x", out={"x": whole[:, 5:45]})
    machine.settle()
    yield "a part of a larger tensor is filled", torch.equal(machine.numbers(whole)[:, 5:45], x)
    client.put(b"part", {"x": whole[:, 5:45]})
    hit = client.get(b"part")
    yield "a part of a larger tensor is put", hit is not None and torch.equal(hit.tensors["x"], x)
    yield from packed_checks(bench)
    yield from hot_checks(machine)


def packed_checks(bench: Bench) -> Iterator[tuple[str, bool]]:
    """The same of chunks in 4 bits."""
    machine, client = bench.machine, bench.client
    bench.put_packed("nf4")
    first = client.get(bench.keys("nf4")[0], packed=True)
    assert first is not None
    out = {name: machine.on(torch.zeros(x.spec.shape, dtype=torch.bfloat16)) for name, x in first.tensors.items()}
    assert client.get(bench.keys("nf4")[0], out=out) is not None
    machine.settle()
    same = [torch.equal(machine.numbers(out[name]), decoded(x)) for name, x in first.tensors.items()]
    yield "4 bits are decoded on the GPU to the CPU's bits", all(same)
    bench.blank()
    left = bench.landed("nf4").decode()
    there = bench.buffers.entry(bench.buffers.gather((bench.places[0],)))
    machine.settle()
    same = [torch.equal(machine.numbers(there[name]), decoded(x)) for name, x in first.tensors.items()]
    yield "4 bits are decoded right into paged blocks, all of them, to the CPU's bits", not left and all(same)
    yield "and are what they were at a relative error of at most 0.1", 0.0 < bench.worst() <= 0.1
    bench.blank()
    bench.get("nf4")
    yield "4 bits come back at a relative error of at most 0.1", 0.0 < bench.worst() <= 0.1
    bench.blank()
    bench.get("raw")
    here = encode(
        {name: machine.numbers(x) for name, x in bench.buffers.entry(bench.buffers.gather((bench.places[0],))).items()}
    )
    parts = [
        torch.equal(machine.numbers(part), here[name].parts[suffix])
        for name, x in bench.packed(bench.places[0]).items() for suffix, part in x.parts.items()
    ]  # fmt: skip
    yield "4 bits are encoded on the GPU to the CPU's bytes", all(parts)


def hot_checks(machine: Machine) -> Iterator[tuple[str, bool]]:
    """The same of a hot tier in the GPU's memory."""
    x = torch.randn(4, 256, 8, 64)
    config = StoreConfig(hot=HotConfig(64 << 20, device="cuda:0"))
    with Store.open(config, background=False, driver=machine.driver) as store:
        store.put(b"x", {"k": machine.on(x)})
        store.put(b"y", {"k": x})
        out = {"k": machine.on(torch.zeros_like(x))}
        found = store.get(b"x", out=out)
        machine.settle()
        yield (
            "a hot tier on the GPU gives back its bytes there",
            bool(found) and torch.equal(machine.numbers(out["k"]), x),
        )
        there = store.get(b"y")
        yield "and elsewhere", there is not None and torch.equal(machine.numbers(there.tensors["k"]), x)
        store.demote(b"x")
        warm = store.get(b"x")
        error = 1.0 if warm is None else float((machine.numbers(warm.tensors["k"]) - x).norm() / x.norm())
        yield "and in 4 bits below", 0.0 < error <= 0.1


def rows(bench: Bench) -> tuple[list[dict[str, Any]], float]:
    """The figures, and the seconds that a byte takes within the GPU."""
    machine, size = bench.machine, bench.size
    total = size.chunks * size.chunk_nbytes
    host = machine.pinned(size.chunk_nbytes)
    here, other = (machine.on(torch.zeros(size.chunk_nbytes, dtype=torch.uint8)) for _ in range(2))

    def bare(to: Any, of: Any) -> float:
        def all_of_it() -> None:
            for _ in range(size.chunks):
                to.copy_(of, non_blocking=True)

        return bench.best(all_of_it)

    loads, stores, within = bare(here, host), bare(host, here), bare(other, here)
    del host, here, other
    found = [
        row("gpu.copy", total, seconds, to=to) for to, seconds in (("gpu", loads), ("host", stores), ("hbm", within))
    ]
    raw = bench.best(lambda: bench.get("raw"))
    found.append(row("gpu.get", total, raw, form="raw", pinned_copy=loads / raw))
    one = bench.packed(bench.places[0])
    share = sum(part.nbytes for x in one.values() for part in x.parts.values()) / size.chunk_nbytes
    nf4 = bench.best(lambda: bench.get("nf4"))
    found.append(row("gpu.get", total, nf4, form="nf4", pinned_copy=share * loads / nf4))
    put = bench.best(lambda: bench.put("raw"))
    found.append(row("gpu.put", total, put, form="raw", pinned_copy=stores / put))
    put = bench.best(lambda: bench.put_packed("nf4"))
    found.append(row("gpu.put", total, put, form="nf4", pinned_copy=share * stores / put))
    landed = bench.landed("nf4")
    unpack = bench.best(landed.decode)
    found.append(row("gpu.nf4.decode", total, unpack, hbm_copy=within / unpack))
    del landed
    pack = bench.best(lambda: list(map(bench.packed, bench.places)))
    found.append(row("gpu.nf4.encode", total, pack, hbm_copy=within / pack))
    return found, within / total


def row(name: str, nbytes: int, seconds: float, to: str = "", form: str = "", **ratios: float) -> dict[str, Any]:
    """One line of the results."""
    params = {name: value for name, value in (("to", to), ("form", form)) if value}
    value = float(f"{nbytes / seconds / 1e9:.3g}")
    return {"name": name, "params": params, "value": value, "unit": "GB/s",
            "ratios": {name: float(f"{value:.3g}") for name, value in ratios.items()}}  # fmt: skip


def measure(machine: Machine, size: Size) -> Iterator[dict[str, Any]]:
    """What holds (`gpu.holds`, value 1 or 0), and if all does, the rows."""
    room = 4 * size.chunks * size.chunk_nbytes + (64 << 20)
    with serving(KVSTORED_STORE__HOT__CAPACITY_NBYTES=str(room), KVSTORED_STORE__PROMOTE_AFTER="0") as (address, _):
        bench = Bench(machine, address, size)
        good = True
        with bench.client:
            for name, holds in checks(bench):
                good = good and holds
                yield {"name": "gpu.holds", "params": {"what": name}, "value": int(holds), "unit": "", "ratios": {}}
            if not good:
                return
            found, within_s = rows(bench)
            yield from found
    yield from hot_rows(machine, size, within_s)


def hot_rows(machine: Machine, size: Size, within_s: float) -> Iterator[dict[str, Any]]:
    """What a daemon's hot tier in this GPU's memory must do, and if it does, its figure. within_s: of a byte."""
    few = replace(size, chunks=min(size.chunks, HOT_CHUNKS))
    total = few.chunks * few.chunk_nbytes
    with machine.hot_daemon(total + (64 << 20)) as address:
        bench = Bench(machine, address, few)
        with bench.client as client:
            bench.put("hot")
            bench.blank()
            bench.get("hot")
            segments = client._pool.segments  # noqa: SLF001 - what is mapped is nobody else's business
            mapped = any(block.on_device for block in segments.blocks.values())
            for what, holds in (
                ("a daemon's hot tier on the GPU is mapped", mapped),
                ("and its chunks come back bit for bit", bench.worst() == 0.0),
            ):
                yield {"name": "gpu.holds", "params": {"what": what}, "value": int(holds), "unit": "", "ratios": {}}
            if mapped and bench.worst() == 0.0:
                seconds = bench.best(lambda: bench.get("hot"))
                yield row("gpu.get", total, seconds, form="hot", hbm_copy=within_s * total / seconds)


def tests_pass() -> bool:
    """The tests that run on a GPU alone, and the contract suite over a hot tier in its memory."""
    run = [sys.executable, "-m", "pytest", *TESTS, "-q", "-k", "cuda or gpu", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:3])}
    return (
        subprocess.run(run, cwd=ROOT, env=env, stdout=sys.stderr, timeout=TESTS_TIMEOUT_S, check=False).returncode == 0
    )


def told(found: dict[str, Any]) -> str:
    """A row, for a reader."""
    if found["name"] == "gpu.holds":
        return f"{'holds' if found['value'] else 'DOES NOT HOLD'}: {found['params']['what']}"
    due = DUE.get(found["name"]) if found["params"].get("form") in (None, "raw") else None
    ratios = "  ".join(f"{ratio:.2f} of {name}" for name, ratio in found["ratios"].items())
    params = " ".join(found["params"].values())
    return f"{found['name']:15} {params:5} {found['value']:8.1f} GB/s  {ratios}" + (f"  (due {due})" if due else "")


def at_hand() -> Machine | None:
    """The GPU; None where there is none. Raises ImportError, DriverError where what works with it is missing."""
    return Card() if torch.cuda.is_available() else None


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--no-tests", action="store_true", help="no pytest before the rows")
    options = parser.parse_args()
    try:
        card = at_hand()
    except (ImportError, DriverError) as error:
        print(f"there is a GPU, and what works with it is missing: {error}: pip install cuda-bindings", file=sys.stderr)
        return 1
    if card is None:
        print(NO_GPU, file=sys.stderr)
        return SKIP
    print(f"{card.name}, torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)
    good = options.no_tests or tests_pass()
    for found in measure(card, Size()):
        good = good and (found["name"] != "gpu.holds" or bool(found["value"]))
        print(json.dumps(found) if options.json else told(found), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
