"""Tensors of nf4-kv2 to be decoded right into paged blocks: which can be, and as what job of a launch.

A tensor is (layers, tokens, heads, head_dim), as vLLM's connector keeps keys and values. Whatever is otherwise (another
codec, both in one tensor, latents) is decoded densely first. Pure, any thread.
"""

import torch

from kvstore.codecs.nf4_kv import checked_blocks, checked_kept
from kvstore.codecs.nf4_kv2 import NF4KV2, _checked_means, _checked_spec, _planes
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.kernels.paging import Job, mean_nbytes


def job_of(encoded: EncodedTensor) -> Job | None:
    """The job of a tensor whose parts are in host memory, which are checked; None: it is not decoded so.

    Parts may be memory that somebody else writes to: what leads anywhere (the tables of turning means) is taken from a
    copy, lengths from the spec. Raises CodecError.
    """
    shape = encoded.spec.shape
    if encoded.encoding != NF4KV2.name or len(shape) != 4 or any(part.is_cuda for part in encoded.parts.values()):
        return None
    if "mean" in encoded.parts:
        encoded = EncodedTensor(
            encoded.spec, encoded.encoding, {**encoded.parts, "mean": encoded.parts["mean"].clone()}, encoded.attrs
        )
    role, token_axis = _checked_spec(encoded)
    if role == "packed" or token_axis not in (1, -3):
        return None
    like = torch.empty(shape, dtype=getattr(torch, encoded.spec.dtype), device="meta")
    ((plane, prefix, rows, tensor),) = _planes(encoded, like, role, token_axis)
    if tuple(rows.shape) != tuple(shape):
        return None
    checked_blocks(tensor, plane, prefix)  # as `NF4KV2.check`, and what is needed of it kept
    if plane.kept:
        checked_kept(tensor, plane, prefix)
    turns = _checked_means(tensor, plane, prefix)[2] if plane.groups else None
    kept = tensor.parts.get(f"{prefix}kept")
    if plane.tokens > 1 << 15:
        raise CodecError(f"a chunk of {plane.tokens} tokens")
    return Job(
        plane.coded, plane.lead, plane.groups, plane.block, plane.blocks, plane.kept, plane.tokens,
        mean_nbytes(plane.outer, plane.groups, plane.inner, plane.d),
        kept is not None and kept.dtype == torch.bfloat16, turns,
    )  # fmt: skip
