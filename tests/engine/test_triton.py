"""The Triton kernels in Triton's own interpreter, on the CPU: the reference's bytes. Runs where Triton is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

INTERPRETED = """
import torch
from kvstore.codecs import blocks
from kvstore.codecs.tables import table
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


def test_interpreted_triton_writes_and_reads_the_reference_s_bytes():
    """In a process of its own: Triton looks at TRITON_INTERPRET once, when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.stdout == "same bytes\n", found.stderr[-2000:]
