"""The README's table of what 1,000 tokens take: `python tools/capacity.py`. A test compares.

K and V of a token are 2 x layers x kv_heads x head_dim values (each model's own config.json). The NF4 column is what a
store holds in warm for a chunk of 256 tokens, measured by putting one with two of the layers and demoting it.
"""

import sys

import torch

from kvstore import Store

MODELS = {
    "SmolLM2-135M": (30, 3, 64),
    "Qwen2.5-7B": (28, 4, 128),
    "Qwen3-30B-A3B": (48, 4, 128),
    "Llama-3.1-8B": (32, 8, 128),
    "Mistral-7B-v0.3": (32, 8, 128),
    "Phi-4": (40, 10, 128),
    "Qwen3-32B": (64, 8, 128),
    "Llama-3.3-70B": (80, 8, 128),
}
"""layers (num_hidden_layers), kv_heads (num_key_value_heads), head_dim (head_dim, else hidden_size / heads)."""
CHUNK_TOKENS = 256
LAYERS_MEASURED = 2


def nf4_nbytes_a_value(kv_heads: int, head_dim: int) -> float:
    """Measured, of keys and values of this shape."""
    shape = (LAYERS_MEASURED, CHUNK_TOKENS, kv_heads, head_dim)
    k, v = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    with Store.open() as store:
        store.put(b"chunk", {"k": k, "v": v})
        store.demote(b"chunk")
        warm = store.stats().tiers["warm"]
    return float(warm.used_nbytes / (k.numel() + v.numel()))


def rows() -> list[str]:
    """The table's rows, GB (10^9 bytes) for 1,000 tokens."""
    lines = []
    for name, (layers, kv_heads, head_dim) in MODELS.items():
        values = 1000 * 2 * layers * kv_heads * head_dim
        sizes = (4 * values, 2 * values, values * nf4_nbytes_a_value(kv_heads, head_dim))
        cells = [f"{layers} x {kv_heads} x {head_dim}", *(f"{nbytes / 1e9:.3f}" for nbytes in sizes)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
