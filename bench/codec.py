"""How fast the codecs are: GB/s of uncompressed bytes, beside copying, bitsandbytes and plain torch in the same run.

    .venv/bin/python bench/codec.py --json            # 1 to 256 MiB, 1 and 2 threads: about 10 minutes
    .venv/bin/python bench/codec.py --quick           # 16 MiB, one thread

One case a line. The contenders of a case take turns and each keeps its best time, so that a busy neighbour hits all
of them. A ratio above 1 means faster than the baseline it names; `write` is a fill of the same prepared output.
"""

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

# Else torch's threads spin for milliseconds after each copy, on the processor that the codec's second thread wants.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from kvstore import kernels
from kvstore.codecs import nf4, nf4_kv, nf4_kv2, receipt
from kvstore.codecs.nf4 import NF4
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.kernels import reference
from kvstore.kernels.cpu import ISAS, CpuKernel

MIB = 1 << 20
ROUNDS = 11
SLOW_S = 0.5
"""A contender slower than this is timed once only."""

Contenders = dict[str, Callable[[], object]]


def keep_freed_memory() -> None:
    """What the daemon does at its start too: freed memory is kept, or every encoding pays for page faults."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 32 * MIB)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def best_times(contenders: Contenders, clock: Callable[[], float]) -> dict[str, float]:
    """The best time of each, in seconds, over rounds in which they take turns."""
    best: dict[str, float] = {}
    for at in range(ROUNDS):
        for name, run in contenders.items():
            if at > 0 and best[name] > SLOW_S:
                continue
            start = clock()
            run()
            best[name] = min(best.get(name, float("inf")), clock() - start)
    return best


def without_kernel(run: Callable[[], object]) -> Callable[[], object]:
    """The same call through the torch reference."""

    def slow() -> object:
        kept = nf4.cpu_kernel, nf4_kv.kv_kernel
        nf4.cpu_kernel = nf4_kv.kv_kernel = lambda _x: None
        try:
            return run()
        finally:
            nf4.cpu_kernel, nf4_kv.kv_kernel = kept

    return slow


def cases(nbytes: int, dtype: torch.dtype, *, rivals: bool) -> Iterator[tuple[str, Contenders]]:
    """(name, contenders) of one size and type; the codec itself is contender "codec"."""
    import bitsandbytes.functional as bnb

    n = nbytes // dtype.itemsize
    x = keys(n).to(dtype)
    out, copy = torch.empty_like(x), torch.empty_like(x)
    packed, state = bnb.quantize_4bit(x if rivals else x[:1], quant_type="nf4", compress_statistics=True)
    common: Contenders = {"memcpy": lambda: copy.copy_(x)}
    write: Contenders = {"write": out.zero_}
    bnb_encode: Contenders = {"bitsandbytes": lambda: bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)}
    bnb_decode: Contenders = {"bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)}
    for codec, name in ((NF4(), "k"), (NF4KV(), "k"), (NF4KV(), "v"), (NF4KV2(), "k"), (NF4KV2(), "v")):
        rivals = rivals and codec.name != "nf4-kv2"  # plain torch takes a minute for means that turn
        label = f"{codec.name}" if codec.name == "nf4" else f"{codec.name}:{name}"
        encode = _encoder(codec, name, x)
        encoded = codec.encode(name, x)
        decode = _decoder(codec, encoded, out)
        slow_encode = {**bnb_encode, "torch": without_kernel(encode)} if rivals else {}
        slow_decode = {**bnb_decode, "torch": without_kernel(decode)} if rivals else {}
        yield f"{label}.encode", {"codec": encode, **common, **slow_encode}
        yield f"{label}.decode", {"codec": decode, **common, **write, **slow_decode}


def keys(n: int) -> torch.Tensor:
    """N values of (layers, 256, 8, 64) with a bias that RoPE turns, as keys of Qwen2.5 have."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).view(-1, 256, 8, 64)
    angle = torch.arange(256.0)[:, None] * 1e4 ** (-torch.arange(32.0) / 32)
    x += torch.cat((8 * angle.cos(), 8 * angle.sin()), dim=-1)[:, None]
    return x


def _encoder(codec: Any, name: str, x: torch.Tensor) -> Callable[[], object]:
    return lambda: codec.encode(name, x)


def _decoder(codec: Any, encoded: Any, out: torch.Tensor) -> Callable[[], object]:
    return lambda: codec.decode(encoded, out)


def rows(
    nbytes: int, dtype: torch.dtype, threads: int, clock: Callable[[], float], *, rivals: bool
) -> Iterator[dict[str, Any]]:
    """One result for each case; keys and values of nf4-kv also as one, as an entry holds both."""
    torch.set_num_threads(threads)
    times: dict[str, dict[str, float]] = {}
    for name, contenders in cases(nbytes, dtype, rivals=rivals):
        times[name] = best_times(contenders, clock)
    for codec, verb in ((codec, verb) for codec in ("nf4-kv", "nf4-kv2") for verb in ("encode", "decode")):
        k, v = times[f"{codec}:k.{verb}"], times[f"{codec}:v.{verb}"]
        times[f"{codec}.{verb}"] = {who: (k[who] + v[who]) / 2 for who in k}
    for name in [name for name in times if name.startswith("nf4-kv2")]:
        times[name]["nf4-kv"] = times[name.replace("nf4-kv2", "nf4-kv")]["codec"]
    used = kernels.cpu_kernel(torch.empty(0))
    params = {"dtype": str(dtype).removeprefix("torch."), "nbytes": nbytes, "threads": threads}
    params["isa"] = "none" if used is None else ISAS[used.isa]
    for name, by in times.items():
        own = by.pop("codec")
        ratios = {who: round(time_s / own, 3) for who, time_s in by.items()}
        yield {"name": name, "params": params, "value": round(nbytes / own / 1e9, 3), "unit": "GB/s", "ratios": ratios}
        if name == "nf4.decode":
            # What two threads can gain on this machine at all: judge theirs by how copying and filling scale.
            for who in ("memcpy", "write"):
                value = round(nbytes / by[who] / 1e9, 3)
                yield {"name": who, "params": params, "value": value, "unit": "GB/s", "ratios": {}}


def use_isa(name: str) -> None:
    """All codecs by the kernel's code for one instruction set. SystemExit if this machine has it not."""
    found: dict[str, CpuKernel] = {ISAS[kernel.isa]: kernel for kernel in kernels.kernels()}
    if name not in found:
        raise SystemExit(f"this machine and kernel have {', '.join(found) or 'no kernel'}, not {name}")
    for module in (nf4, nf4_kv, nf4_kv2, receipt, kernels):
        if hasattr(module, "cpu_kernel"):
            module.cpu_kernel = lambda x: found[name] if x.device.type == "cpu" else None
        if hasattr(module, "kv_kernel"):
            module.kv_kernel = lambda device: found[name] if device.type == "cpu" else None


def main() -> None:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="16 MiB of float32, one thread")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--alone", action="store_true", help="without bitsandbytes and plain torch, which take minutes")
    parser.add_argument("--isa", choices=ISAS, help="this instruction set instead of the machine's best")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, for a machine that is not idle")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        args.threads = [1]
    if args.quick:
        args.mib, args.threads, args.dtype = [16], [1], ["float32"]
    if args.isa:
        use_isa(args.isa)
    keep_freed_memory()
    reference.quantize(torch.randn(1 << 16))
    for mib in args.mib:
        for dtype in args.dtype:
            for threads in args.threads:
                for row in rows(mib * MIB, getattr(torch, dtype), threads, clock, rivals=not args.alone):
                    print(json.dumps(row) if args.json else line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    p = row["params"]
    head = f"{row['name']:17} {p['dtype']:9} {p['nbytes'] // MIB:4d} MiB {p['threads']} thr {row['value']:8.2f} GB/s"
    return head + "".join(f"  {who} x{ratio:g}" for who, ratio in row["ratios"].items())


if __name__ == "__main__":
    main()
