"""In what order waiting requests are served: first come first served, or the longest cached prefix first, bounded.

Both over `match`, which says how much of a prompt is held and counts as no use. Longest first alone may starve a
request whose prefix nobody shares; here one that was overtaken N times goes next.
"""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from experiments.attention import Baseline
from experiments.lab import Lab
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.prefix import Namespace
from kvstore.store import Store

DOCUMENTS, QUESTIONS, CHUNKS = 4, 6, 4
"""Requests are QUESTIONS about each of DOCUMENTS, shuffled; a document is CHUNKS chunks."""
QUESTION_SHARE = 32
"""A question is as many times shorter than its document, and a token at least: so the ratio of two orders does not
depend on the length, from documents of 32 tokens on."""
HOT_DOCUMENTS = 1.6
"""How many documents the hot tier holds: more than one, fewer than two."""
ENTRY_NBYTES = 1024
"""Generous for what the store counts of an entry beside its tensors."""
OVERTAKEN_MAX = 16


@dataclass
class Waiting:
    """A request in the queue. overtaken: how often a later one went first."""

    tokens: list[int]
    overtaken: int = 0


def first_come(queue: Sequence[Waiting], held: Callable[[list[int]], int]) -> int:
    """The oldest."""
    del queue, held
    return 0


def longest_prefix(queue: Sequence[Waiting], held: Callable[[list[int]], int], *, most: int = OVERTAKEN_MAX) -> int:
    """The one with the most tokens held, the oldest of those; but the oldest of all once it was overtaken `most` times.

    The oldest has been overtaken at least as often as any other, so nobody ever is more often than `most`.
    """
    if queue[0].overtaken >= most:
        return 0
    lengths = [held(waiting.tokens) for waiting in queue]
    return lengths.index(max(lengths))


@dataclass
class Served:
    """One order over one queue. computed: tokens run through the model. chunks: restored, by tier."""

    computed: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    overtaken_most: int = 0
    mean_latency_s: float = 0.0


Order = Callable[[Sequence[Waiting], Callable[[list[int]], int]], int]
Compute = Callable[[list[int], Any, Any], tuple[torch.Tensor, torch.Tensor]]
"""Tokens that are not held, K and V of those before them (None: nothing) in; K and V of all out."""


def serve(order: Order, requests: Sequence[list[int]], space: Namespace, compute: Compute, document: int) -> Served:
    """Serve all requests, one at a time; of each the first `document` tokens are put for those that follow."""
    queue, found, started, latencies = [Waiting(tokens) for tokens in requests], Served(), time.perf_counter(), []
    while queue:
        at = order(queue, lambda tokens: len(space.keys(tokens[:-1])[: space.match_prefix(tokens[:-1])]))
        for overtaken in queue[:at]:
            overtaken.overtaken += 1
            found.overtaken_most = max(found.overtaken_most, overtaken.overtaken)
        tokens = queue.pop(at).tokens
        # Never the last token: the model must have something to run.
        n, hits = space.get_prefix_hits(tokens[:-1])
        for hit in hits:
            found.chunks[hit.tier] = found.chunks.get(hit.tier, 0) + 1
        k, v = (torch.cat([torch.as_tensor(hit.tensors[x]) for hit in hits], 1) if n else None for x in "kv")
        k, v = compute(tokens[n:], k, v)
        found.computed += len(tokens) - n
        space.put_prefix(tokens[:document], k[:, :document].contiguous(), v[:, :document].contiguous())
        latencies.append(time.perf_counter() - started)
    found.mean_latency_s = sum(latencies) / len(latencies)
    return found


def asked(ids: Sequence[int]) -> tuple[list[list[int]], int]:
    """Shuffled requests about documents cut out of `ids`, and the tokens of a document."""
    size = max(CHUNKS, len(ids) // DOCUMENTS // CHUNKS * CHUNKS)
    documents = [list(ids[i * size : (i + 1) * size]) for i in range(DOCUMENTS)]
    # Questions that differ: the document's own tokens, from another place each time.
    length = max(1, size // QUESTION_SHARE)
    requests = [d + d[q : q + length] for d in documents for q in range(QUESTIONS)]
    random.Random(0).shuffle(requests)  # noqa: S311 - a shuffle, not a secret
    return requests, size


def measured(lab: Lab, order: Order, *, disk: bool, counted: bool = False) -> Served:
    """One order over a store of its own, whose hot tier holds HOT_DOCUMENTS documents, with a disk below or without.

    counted: K and V are zeros, since what has to be computed does not depend on them; only the latency is then none.
    """
    requests, size = asked(lab.ids[0].tolist())
    k, _ = lab.prefix
    layers, _, heads, dim = k.shape
    document = layers * size * heads * dim * 2 * k.element_size() + CHUNKS * ENTRY_NBYTES
    with tempfile.TemporaryDirectory(prefix="kvx-") as home:
        cold = ColdConfig(home if disk else None, 1 << 30)
        config = StoreConfig(HotConfig(int(document * HOT_DOCUMENTS)), WarmConfig(0), cold)
        with Store.open(config, framework="torch") as store:
            space = store.namespace(
                model="experiments", revision="0", dtype="float32", layers=layers, kv_heads=heads, head_dim=dim,
                layout="lthd", fidelity="exact", chunk_tokens=size // CHUNKS,
            )  # fmt: skip
            compute = partial(_zeros, lab) if counted else partial(_computed, lab)
            return serve(order, requests, space, compute, size)


def _computed(lab: Lab, ids: list[int], k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        for layer in range(0 if k is None else k.shape[0]):
            cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
        lab.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        keys, values = (
            torch.stack([getattr(layer, which)[0].transpose(0, 1) for layer in cache.layers])
            for which in ("keys", "values")
        )
    return keys, values


def _zeros(lab: Lab, ids: list[int], k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layers, _, heads, dim = lab.prefix[0].shape
    new = torch.zeros(layers, len(ids), heads, dim)
    return (new, new) if k is None else (torch.cat((k, new), 1), torch.cat((v, new), 1))


class FirstCome(Baseline):
    """First come, first served. What is stored and restored is the baseline's prefix; the queue is in the note."""

    row = 16
    name = "scheduling-fcfs"
    category = "scheduling"
    source = "vLLM's default order"
    kept = "faithful: one worker; an order changes which tokens are computed, not what one costs"

    def order(self, queue: Sequence[Waiting], held: Callable[[list[int]], int]) -> int:
        """The oldest."""
        return first_come(queue, held)

    def notes(self, lab: Lab) -> str:
        """The queue with and without a disk."""
        memory, disk = measured(lab, self.order, disk=False, counted=True), measured(lab, self.order, disk=True)
        fcfs = measured(lab, first_come, disk=False, counted=True)
        requests, size = asked(lab.ids[0].tolist())
        asked_for = sum(map(len, requests))
        return (
            f"{len(requests)} requests about {DOCUMENTS} documents of {size} tokens, hot holds {HOT_DOCUMENTS}: "
            f"{memory.computed:,} of {asked_for:,} tokens computed without a disk "
            f"({fcfs.computed / memory.computed:.1f} times fewer than first come), {disk.computed:,} with one, "
            f"{disk.chunks.get('cold', 0)} chunks from disk, mean latency {disk.mean_latency_s:.2f} s, "
            f"overtaken at most {disk.overtaken_most} times"
        )


class PrefixAware(FirstCome):
    """The longest cached prefix first; nobody is overtaken more than 16 times."""

    row = 17
    name = "scheduling-prefix-aware"
    source = "arXiv 2312.07104 (SGLang's longest prefix match), over kvstored's match"
    kept = "ours adds a bound: SGLang's order lets a request wait for ever"

    def order(self, queue: Sequence[Waiting], held: Callable[[list[int]], int]) -> int:
        """The one with the longest prefix held."""
        return longest_prefix(queue, held)
