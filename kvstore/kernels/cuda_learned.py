# Triton is installed only beside CUDA, and reads the source of its functions, not their types.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"
# ruff: noqa: ANN001, ANN202, N803
"""The products of kv-learned in Triton: summed in the order of coefficients, as `kernels.reference_learned` does.

Never imported without a CUDA tensor in hand. tests/kvstore/kernels/test_triton.py runs it in Triton's interpreter and
compiles it for a GPU. No GPU has run it yet. What else decoding does there is torch's, operation by operation.
"""

import torch
import triton
import triton.language as tl

from kvstore.kernels.cuda import EXACT

TILE = 64
"""Values and tokens a program: 32 sums for each thread of four warps."""


@triton.jit
def _products(matrix, y, out, rows, live, tokens, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """A tile of out. matrix: a row of so many `rows` for each coefficient, so that a program reads neighbours."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    factor, step = matrix + row, y + token
    for _k in range(live):
        factors = tl.load(factor, mask=row < rows, other=0.0)
        total += factors[:, None] * tl.load(step, mask=token < tokens, other=0.0)[None, :]
        factor, step = factor + rows, step + tokens
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + row[:, None] * tokens + token[None, :], total, mask=inside)


def learned_products(matrix: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """`reference_learned.learned_products`, all on one CUDA device."""
    rows, tokens = out.shape
    tiles = triton.cdiv(rows, TILE), triton.cdiv(tokens, TILE)
    with torch.cuda.device(out.get_device()):
        _products[tiles](matrix.t().contiguous(), y, out, rows, len(y), tokens, ROWS=TILE, TOKENS=TILE, **EXACT)
