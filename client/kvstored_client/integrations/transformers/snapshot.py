"""Recurrent and windowed state: what a model keeps has no tokens to cut at, so it is valid at one position.

A snapshot is all state of one row after so many tokens, under the key of just those tokens (the same chain of hashes
as a prefix's). It cannot be cut and is found only where a prompt begins with exactly those tokens. Each row is kept
without its padding, so it serves a batch of any other width.
Understood: mixed layers of attention (full or sliding), linear attention and convolution, and RWKV's list of states.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvstore.hit import Fidelity
from kvstore.keys import KEYS_PER_CALL_MAX, Identity, tail_keys
from kvstore.lookup import Lookup
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers.rows import Rows

ATTENTION = ("DynamicLayer", "DynamicSlidingWindowLayer")
LINEAR = ("LinearAttentionLayer",)
BOTH = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
EMPTY = ("DummyLayer",)
"""Layer classes whose whole state is understood; by name, since a subclass may hold more than its parent."""
KNOWN = frozenset((*ATTENTION, *LINEAR, *BOTH, *EMPTY))

Tensors = dict[str, torch.Tensor]


def positions_keys(root: bytes, tokens: list[int], step: int) -> list[bytes]:
    """The key of every position: entry i is that of the first i + 1 tokens."""
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(tokens), step):
        keys.extend(reversed(tail_keys(parent, tokens[start : start + step])))
        parent = keys[-1]
    return keys


def dump_row(cache: Any, row: int, pad: int, length: int) -> Tensors:
    """A copy of one row's state after `length` padded positions, its padding left out."""
    if isinstance(cache, list):  # RWKV: five tensors (batch, hidden, layers)
        return {f"state.{i}": x[row : row + 1].clone() for i, x in enumerate(cache)}
    tensors: Tensors = {"position": torch.tensor([length - pad], dtype=torch.int64)}
    for i, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if kind in (*ATTENTION, *BOTH) and layer.is_initialized:
            rows = min(layer.keys.shape[-2], length - pad)
            tensors[f"k.{i}"] = layer.keys[row : row + 1, :, layer.keys.shape[-2] - rows :].clone()
            tensors[f"v.{i}"] = layer.values[row : row + 1, :, layer.values.shape[-2] - rows :].clone()
        if kind in (*LINEAR, *BOTH):
            for name, states in (("conv", layer.conv_states), ("rec", layer.recurrent_states)):
                # These are updated in place: without a copy the snapshot would move on with the model.
                found = {f"{name}.{i}.{j}": x[row : row + 1].clone() for j, x in states.items() if x is not None}
                tensors.update(found)
    return tensors


def load_rows(cache: Any, rows: list[Tensors], length: int) -> None:
    """Bring a fresh cache to the state of these rows at a padded position."""
    for i, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if f"k.{i}" in rows[0]:
            window = getattr(layer, "sliding_window", None)
            held = length if window is None else min(length, window - 1)
            k, v = (torch.cat([_padded(row[f"{x}.{i}"], held) for row in rows]) for x in ("k", "v"))
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k, v
            if window is not None:
                layer.cumulative_length = length
        if kind in (*LINEAR, *BOTH):
            for j in range(layer.number_of_states):
                if f"conv.{i}.{j}" in rows[0]:
                    x = torch.cat([row[f"conv.{i}.{j}"] for row in rows])
                    layer.lazy_initialization(conv_states=x, state_idx=j, conv_kernel_size=x.shape[-1])
                    layer.conv_states[j].copy_(x)
                if f"rec.{i}.{j}" in rows[0]:
                    x = torch.cat([row[f"rec.{i}.{j}"] for row in rows])
                    layer.lazy_initialization(recurrent_states=x, state_idx=j)
                    layer.recurrent_states[j].copy_(x)
                layer.has_previous_state[j] = True


def _padded(x: torch.Tensor, held: int) -> torch.Tensor:
    """The last `held` positions of (1, heads, positions, dim), zeros before them where there are fewer."""
    missing = held - x.shape[2]
    return x[:, :, -held:] if missing <= 0 else torch.nn.functional.pad(x, (0, 0, missing, 0))


@dataclass(frozen=True)
class Found:
    """The latest position at which every row has a snapshot, and those."""

    length: int
    rows: list[Tensors]


class Snapshots:
    """Finds and keeps snapshots of one model."""

    def __init__(self, guard: Guard, identity: dict[str, Any], chunk_tokens: int) -> None:
        self._guard = guard
        self._step = chunk_tokens
        self._root = Identity(**identity).digest()
        self._fidelity: Fidelity = "exact" if identity["fidelity"] == "exact" else "auto"

    def find(self, rows: Rows, device: torch.device) -> Found | None:
        """The latest snapshot before the last token that all rows have; None where there is none."""
        keys = [positions_keys(self._root, tokens[:-1], self._step) for tokens in rows.tokens]
        common: set[int] | None = None
        for row, own in enumerate(keys):
            first = max(0, len(own) - KEYS_PER_CALL_MAX)
            asked = Lookup(1, len(rows.tokens[row]), counted=False)  # one snapshot, of whatever length
            held = self._guard.locate(own[first:], lookup=asked) if own else []
            at = {rows.pads[row] + first + i + 1 for i, place in enumerate(held) if place is not None}
            common = at if common is None else common & at
        if not common:
            return None
        length = max(common)
        lengths = [rows.own(row, length) for row in range(len(keys))]
        lookup = Lookup(key_tokens=sum(lengths) // len(lengths))
        hits = self._guard.get_many([own[n - 1] for own, n in zip(keys, lengths, strict=True)], lookup=lookup)
        found = [hit.tensors for hit in hits if hit is not None]
        if len(found) != len(hits) or any(f.keys() != found[0].keys() for f in found):
            return None
        return Found(length, [{name: x.to(device) for name, x in f.items()} for f in found])

    def keep(self, rows: Rows, length: int, cache: Any) -> None:
        """Put every row's state at a padded position, later."""
        entries = []
        for row, pad in enumerate(rows.pads):
            own = rows.tokens[row][: length - pad]
            if len(own) == length - pad and own:
                key = positions_keys(self._root, own, self._step)[-1]
                entries.append((key, dump_row(cache, row, pad, length)))
        nbytes = sum(x.numel() * x.element_size() for _, tensors in entries for x in tensors.values())
        if entries:
            self._guard.later(lambda: self._guard.cache.put_many(entries, fidelity=self._fidelity), nbytes)
