"""The arithmetic of kv-learned's values in plain torch: the reference, whose bytes every kernel must write.

Each step is one IEEE float32 operation in a stated order. Pure, any thread.
"""

import torch


def learned_products(matrix: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """The product of matrix and y, summed from zero in the order of coefficients, a product and a sum at a time.

    matrix: float32 (rows, coefficients); y: float32 (coefficients, tokens); out: float32 (rows, tokens), contiguous.
    """
    out.zero_()
    for k, steps in enumerate(y):
        out += matrix[:, k, None] * steps
