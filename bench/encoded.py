"""What an encoded entry costs on its way: bytes moved, and CPU time of the client and of the daemon, by verb and form.

    python bench/encoded.py            # a table
    python bench/encoded.py --json     # a line each

A chunk of 256 tokens of 32 layers, 8 KV heads of 128, bfloat16, through shared memory. `decoded`: the daemon decodes.
`packed`: as it is held. `device`: into tensors on a device that is host memory (`kvstore.device.deferred`), decoded
there, by the CPU's kernel: what counts of that row is its bytes. `lease`: where it lies, the second time. `encode`:
what a client pays beside a packed put.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvstore import decode, encode
from kvstored_client import Client

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from rivals import servers  # noqa: E402 - found by the line above

from tests.kvstored_client.device.tensors import on_gpu  # noqa: E402
from tests.kvstored_client.device.test_landing import Counting  # noqa: E402

ROUNDS = 15
SHAPE = (32, 256, 8, 128)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def leased(client: Client, key: bytes) -> None:
    """A lease of an entry as it is held, begun and ended."""
    with client.lease(key, packed=True) as hit:
        assert hit is not None


def timed(
    name: str, form: str, pid: int, moved: Callable[[], int], act: Callable[[], Any], *, warm: int = 1
) -> dict[str, Any]:
    """One row: medians of a call, CPU of both processes as an average of ROUNDS. moved: bytes of one call.

    warm: calls before that do not count.
    """
    for _ in range(warm):
        act()
    before, began, times = cpu_s(pid), time.process_time(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    client, daemon = time.process_time() - began, cpu_s(pid) - before
    return {
        "name": name, "params": {"form": form}, "mib": round(moved() / 2**20, 2), "ms": round(1e3 * median(times), 2),
        "client_cpu_ms": round(1e3 * client / ROUNDS, 1), "daemon_cpu_ms": round(1e3 * daemon / ROUNDS, 1),
    }  # fmt: skip


def measure(address: str, pid: int) -> list[dict[str, Any]]:
    """All rows. The entries stay in warm: each is put anew before a second get could promote it."""
    torch.set_num_threads(1)  # as the daemon does
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in ("k", "v")}
    packed = encode(tensors)
    decoded_nbytes, packed_nbytes = (sum(x.nbytes for x in of.values()) for of in (tensors, packed))
    driver = Counting(kernels=True)
    rows = [timed("encode", "", pid, lambda: packed_nbytes, lambda: encode(tensors))]
    with (
        Client(address, decode="daemon", framework="torch", on_error="raise", timeout_s=60) as there,
        Client(address, framework="torch", on_error="raise", timeout_s=60, driver=driver) as here,
    ):
        rows.append(timed("put", "decoded", pid, lambda: decoded_nbytes, lambda: here.put(b"raw", tensors)))
        rows.append(timed("put", "packed", pid, lambda: packed_nbytes, lambda: here.put(b"key", packed)))
        out = {name: torch.zeros_like(x) for name, x in tensors.items()}
        on_device = {name: on_gpu(x) for name, x in out.items()}
        keys = iter(b"%d" % i for i in range(1000))

        def fresh(get: Callable[[bytes], Any]) -> Callable[[], Any]:
            due = [next(keys) for _ in range(ROUNDS + 1)]
            here.put_many([(key, packed) for key in due])
            left = iter(due)
            return lambda: get(next(left))

        get_there = fresh(lambda key: there.get(key, out=out))
        rows.append(timed("get", "decoded", pid, lambda: decoded_nbytes, get_there))
        rows.append(timed("get", "packed", pid, lambda: packed_nbytes, fresh(lambda key: here.get(key, packed=True))))
        held = [next(keys) for _ in range(ROUNDS)]
        here.put_many([(key, packed) for key in held])
        turn = cycle(held)
        rows.append(timed("lease", "packed", pid, lambda: packed_nbytes, lambda: leased(here, next(turn)), warm=ROUNDS))
        got = fresh(lambda key: here.get(key, out=on_device))
        driver.loaded_nbytes = 0
        rows.append(timed("get", "device", pid, lambda: driver.loaded_nbytes // (ROUNDS + 1), got))
        due = decode(packed)
        assert all(torch.equal(on_device[name].numbers, x) and torch.equal(out[name], x) for name, x in due.items())
    return rows


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    with servers() as up:
        rows = measure(up.kvstored_unix, up.kvstored_pid)
    for row in rows:
        if options.json:
            print(json.dumps(row))
        else:
            about = f"{row['name']:7} {row['params']['form']:8} {row['mib']:7.2f} MiB {row['ms']:8.2f} ms"
            print(f"{about}  CPU ms: client {row['client_cpu_ms']:6.1f}, daemon {row['daemon_cpu_ms']:6.1f}")


if __name__ == "__main__":
    main()
