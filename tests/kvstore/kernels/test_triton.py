"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for one. The reference's bytes, both codecs.

`make test` fetches Triton beside the environment. Each test is a process of its own: Triton looks at TRITON_INTERPRET
once, when it is imported.
"""

import os
import subprocess
import sys
import tempfile

import pytest

from tests.conftest import ROOT
from tests.side import side, why_missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
if missing := why_missing("triton"):
    pytest.skip(missing, allow_module_level=True)

INTERPRETED = """
import torch
from kvstore.kernels import reference as blocks
from kvstore.kernels.tables import table
from kvstore.kernels import cuda

cpu = torch.device("cpu")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n, scale in ((64, 1.0), (64 * 17, 1.0), (64 * 40, 1e-3), (64 * 3, 0.0)):
        x = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * scale).to(dtype)
        codes, absmax = blocks.quantize(x)
        mine = torch.empty_like(codes), torch.empty_like(absmax)
        cuda.quantize(x, *mine, table("thresholds", cpu))
        assert torch.equal(mine[0], codes) and torch.equal(mine[1], absmax), (dtype, n, "encode")
        out, due = torch.empty_like(x), blocks.dequantize(codes, absmax, torch.empty_like(x))
        cuda.dequantize(codes, absmax, table("code", cpu), out)
        assert torch.equal(out.view(torch.uint8), due.view(torch.uint8)), (dtype, n, "decode")
print("same bytes")
"""


PAGED = """
import numpy as np
import torch
from kvstore import encode
from kvstore.codecs.packing import decoded, encoded_of
from kvstore.codecs.paged import job_of
from kvstore.kernels import cuda_paged, paging

SEEN = set()

def chunk(generator, shape, dtype, interleaved, apart):
    L, tokens, heads, d = shape
    k, v = (torch.randn(shape, generator=generator) for _ in "kv")
    angle = torch.arange(tokens)[None, :, None, None] * 0.01 * (1 + torch.arange(d // 2))
    turning = torch.cos(angle), torch.sin(angle)
    bias = torch.stack(turning, -1).flatten(-2) if interleaved else torch.cat(turning, -1)
    k = k + 3 * bias
    for token in apart:
        k[:, token] = 40 * torch.randn(heads, d, generator=generator)
    return {"k": k.to(dtype), "v": v.to(dtype)}

def check(shape, block_tokens, dtype, start, seed, interleaved=False, apart=()):
    generator = torch.Generator().manual_seed(seed)
    L, tokens, heads, d = shape
    of = tokens // block_tokens
    layers = [torch.full((3 * of, 2, block_tokens, heads, d), 7.0, dtype=dtype) for _ in range(L)]
    due = [layer.clone() for layer in layers]
    free = torch.randperm(3 * of, generator=generator).tolist()
    where = paging.Where(dtype, L, block_tokens, heads, d, tuple(layers[0].stride()[i] for i in (0, 2, 3)))
    rows, alive, groups = [], [], 1
    for turn in range(2):
        packed = encode(chunk(generator, shape, dtype, interleaved, apart), codec="nf4-kv2", prefix_start=start)
        places = free[turn * of : (turn + 1) * of]
        places[-turn] = places[-turn] if turn == 0 else -1  # one that is not wanted
        for i, name in enumerate("kv"):
            job = job_of(encoded_of(packed[name]))
            if job.turns is not None:
                SEEN.add("interleaved" if job.turns.rotary.interleaved else "turning")
            SEEN.update(["leading"] * bool(job.lead) + ["inside"] * (job.lead < len(job.kept)))
            SEEN.add("centred" if job.groups else "plain")
            parts = {suffix: part.contiguous() for suffix, part in packed[name].parts.items()}
            tables = job.tables(places, [layer[:, i].data_ptr() for layer in layers])
            alive += [parts, tables]
            rows.append(job.row({suffix: part.data_ptr() for suffix, part in parts.items()},
                                {field: table.ctypes.data for field, table in tables.items()}))
            groups = max(groups, job.programs)
            dense = decoded(packed[name])
            for at, place in enumerate(places):
                for layer in range(L if place >= 0 else 0):
                    due[layer][place, i] = dense[layer, at * block_tokens : (at + 1) * block_tokens]
    cuda_paged.decode(paging.Work(where, torch.from_numpy(np.stack(rows)), len(rows), groups))
    for layer, wanted in zip(layers, due):
        assert torch.equal(layer.view(torch.uint8), wanted.view(torch.uint8)), (shape, dtype, start)

check((2, 32, 1, 64), 16, torch.float32, None, 1)
check((2, 128, 2, 64), 16, torch.bfloat16, True, 2)
check((1, 96, 3, 80), 16, torch.float16, False, 3)
check((1, 160, 2, 128), 32, torch.bfloat16, None, 4, interleaved=True)
check((1, 64, 2, 64), 16, torch.bfloat16, False, 5, apart=(17, 40))
check((1, 16, 2, 96), 8, torch.float32, False, 6)
check((1, 8, 2, 64), 8, torch.bfloat16, False, 7)
assert SEEN == {"turning", "interleaved", "leading", "inside", "centred", "plain"}, SEEN
print("same bytes")
"""


COMPILED = """
import re
from itertools import product
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.kernels import cuda, cuda_kv, cuda_learned, cuda_paged

POINTERS = {"codes": "u8", "scales": "u8", "tops": "i16", "means": "fp32", "sums": "fp32", "thresholds": "fp32",
            "levels": "fp32", "search": "i16", "clips": "fp32", "absmax": "fp32", "matrix": "fp32", "y": "fp32"}
CASES = [(cuda._encode, {"B": 16}), (cuda._decode, {"B": 16}), (cuda_kv._means, {"D": 64})]
for rotation, block, centred in ((6, 5, True), (7, 6, False), (0, 6, False)):
    sizes = {"TILE": cuda_kv.TILE, "ROTATION": rotation, "BLOCK": block, "CENTRED": centred,
             "GROUP": 64 if rotation == 6 else 1}
    CASES += [(cuda_kv._encode, sizes), (cuda_kv._decode, sizes)]
CASES.append((cuda_learned._products, {"ROWS": cuda_learned.TILE, "TOKENS": cuda_learned.TILE}))
for width, rotation in ((1024, 7), (256, 4)):
    CASES.append((cuda_paged._decode_paged, {"WIDTH": width, "ROTATION": rotation}))
OUT = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
for (kernel, sizes), dtype, capability in product(CASES, OUT, (80, 90)):
    if kernel is cuda_learned._products and dtype != "fp32":
        continue
    pointers = {**POINTERS, "x": dtype, "out": dtype}
    if kernel is cuda_kv._means:
        pointers.update(codes="i8", scales="fp32")
    if kernel is cuda_paged._decode_paged:
        pointers.update(jobs="i64")
        sizes = {**sizes, "OUT": OUT[dtype]}
    types = {name: "*" + pointers[name] if name in pointers else "i32" for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=cuda.EXACT)
    assert made.asm["cubin"]
    inexact = re.findall(r"fma[.]rn|div[.]full|[.]approx|[.]ftz|mma", made.asm["ptx"])
    assert not inexact, (kernel, sizes, dtype, inexact[:3])
    rounds = "0f4B400000" in made.asm["ptx"]
    assert rounds or kernel not in (cuda_kv._means, cuda_kv._encode), (kernel, "rounding was optimized away")
print("exact")
"""


def in_a_process(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    path = [ROOT, ROOT / "daemon", ROOT / "client", side() / "triton"]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": str(int(interpreted)),
            "TRITON_CACHE_DIR": cache,
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
        )


def test_nf4_writes_and_reads_the_reference_s_bytes() -> None:
    found = in_a_process("-c", INTERPRETED)
    assert found.stdout == "same bytes\n", found.stderr[-2000:]


def test_nf4_kv_passes_the_codec_s_own_tests() -> None:
    """Golden vectors, bytes against the reference at every shape, type and role, receipts, refusals, random bytes."""
    # The largest shape in one of its three forms: the interpreter takes 10 s for each of the nine.
    codec_s_own_tests_pass("test_nf4_kv.py", "triton and not comes_back_close and not (256 and (True or False))")


def test_nf4_kv2_passes_the_codec_s_own_tests() -> None:
    codec_s_own_tests_pass("test_nf4_kv2.py", "triton")


def test_kv_learned_reads_the_reference_s_bits() -> None:
    codec_s_own_tests_pass("test_kv_learned.py", "every_instruction_set_and_torch")


def codec_s_own_tests_pass(file: str, chosen: str) -> None:
    found = in_a_process(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
        # numpy, which interprets, warns where a product overflows; the values are refused, as the tests want.
        "-W", "ignore::RuntimeWarning", f"tests/kvstore/codecs/{file}", "-k", chosen,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout


def test_all_kernels_compile_for_a_gpu_without_an_inexact_operation() -> None:
    """Compute capabilities 8.0 and 9.0, which need no GPU: nothing fused, approximate or flushed to zero."""
    found = in_a_process("-c", COMPILED, interpreted=False)
    assert found.stdout == "exact\n", found.stderr[-3000:]


def test_chunks_decoded_right_into_paged_blocks_are_the_reference_s_bytes() -> None:
    """Means that turn, stand still or are none; tokens kept in 16 bits; blocks that are not wanted."""
    found = in_a_process("-c", PAGED)
    assert found.stdout == "same bytes\n", found.stderr[-3000:]
