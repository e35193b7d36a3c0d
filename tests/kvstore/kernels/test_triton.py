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


COMPILED = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.kernels import cuda, cuda_kv, cuda_learned

POINTERS = {"codes": "u8", "scales": "u8", "tops": "i16", "means": "fp32", "sums": "fp32", "thresholds": "fp32",
            "levels": "fp32", "search": "i16", "clips": "fp32", "absmax": "fp32", "matrix": "fp32", "y": "fp32"}
CASES = [(cuda._encode, {"B": 16}), (cuda._decode, {"B": 16}), (cuda_kv._means, {"D": 64})]
for rotation, block, centred in ((6, 5, True), (7, 6, False), (0, 6, False)):
    sizes = {"TILE": cuda_kv.TILE, "ROTATION": rotation, "BLOCK": block, "CENTRED": centred,
             "GROUP": 64 if rotation == 6 else 1}
    CASES += [(cuda_kv._encode, sizes), (cuda_kv._decode, sizes)]
CASES.append((cuda_learned._products, {"ROWS": cuda_learned.TILE, "TOKENS": cuda_learned.TILE}))
for kernel, sizes in CASES:
    for dtype in ("fp32",) if kernel is cuda_learned._products else ("fp32", "fp16", "bf16"):
        pointers = {**POINTERS, "x": dtype, "out": dtype}
        if kernel is cuda_kv._means:
            pointers.update(codes="i8", scales="fp32")
        types = {name: "*" + pointers[name] if name in pointers else "i32" for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
        source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), constants)
        for capability in (80, 90):
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
