"""zstd on real KV: what levels, long distance and grouping by byte gain, and what they cost.

Run: .venv/bin/python -m bench.compression [--json]
Data: keys and values of SmolLM2-135M over a text, one chunk of 256 tokens as the store would hold it. GB/s are of the
uncompressed bytes, one thread, grouping included. Needs the model (`make demo` installs it).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from bench.fidelity import Model
from kvstore.arrays import as_bytes
from kvstore.codecs import codec_named
from kvstore.entries.compression import Bytes, group_bytes, ungroup_bytes

TEXT = Path("/usr/share/common-licenses/GPL-3")
TOKENS = 256
WAYS = [(-5, 0), (1, 0), (3, 0), (3, 27), (6, 0), (12, 0)]
"""(level, window log for long distance; 0: none)."""
REPEATS = 3


def best(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, the least of some, and the result."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def samples(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, int, Bytes]]:
    """Name, bytes of an element, and bytes, of every form a chunk can have on disk."""
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)):
        name = str(dtype).removeprefix("torch.")
        yield name, width, np.concatenate([as_bytes(k.to(dtype)), as_bytes(v.to(dtype))])
    for codec in ("nf4-kv2", "nf4-kv", "nf4", "int8"):
        encoded = [codec_named(codec).encode(name, x) for name, x in (("k", k), ("v", v))]
        parts = [as_bytes(part) for tensor in encoded for part in tensor.parts.values()]
        yield codec, 1, np.concatenate(parts)


def measure(name: str, width: int, data: Bytes) -> Iterator[dict[str, Any]]:
    """One row a way."""
    for level, window_log in WAYS:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, enable_ldm=bool(window_log), write_content_size=True, write_checksum=True,
            **({"window_log": window_log} if window_log else {}),
        )  # fmt: skip
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        for grouped in (False, True) if width > 1 else (False,):
            by = width if grouped else 1
            out = np.empty_like(data)

            def back(frame: bytes, by: int = by, out: Bytes = out, decompressor: Any = decompressor) -> None:
                ungroup_bytes(out, np.frombuffer(decompressor.decompress(frame), np.uint8), by)

            to_s, frame = best(lambda by=by, to=compressor: to.compress(group_bytes(data, by).data))
            from_s, _ = best(lambda frame=frame: back(frame))
            assert np.array_equal(out, data)
            yield {
                "name": "cold.zstd", "params": {
                    "form": name, "level": level, "long": bool(window_log), "grouped": grouped, "nbytes": data.size,
                }, "value": round(1 - len(frame) / data.size, 4), "unit": "saved",
                "ratios": {}, "compress_gb_s": round(data.size / to_s / 1e9, 3),
                "decompress_gb_s": round(data.size / from_s / 1e9, 3),
            }  # fmt: skip


def main() -> None:
    """Every form, every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--text", type=Path, default=TEXT)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model = Model()
    ids = model.tokenizer(args.text.read_text(errors="replace"), return_tensors="pt").input_ids[:, : 2 * TOKENS]
    k, v = (x[:, TOKENS : 2 * TOKENS].contiguous() for x in model.prefix(ids))
    for form in samples(k, v):
        for row in measure(*form):
            p = row["params"]
            print(
                json.dumps(row) if args.json else
                f"{p['form']:9} level {p['level']:3}{' long' if p['long'] else '     '} "
                f"{'grouped' if p['grouped'] else '       '} saves {100 * row['value']:5.1f}%  "
                f"to {row['compress_gb_s']:.2f}  from {row['decompress_gb_s']:.2f} GB/s",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
