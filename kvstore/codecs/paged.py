"""Tensors of nf4-kv2 to be decoded right into paged blocks: which can be, and as what job of a launch.

A tensor is (layers, tokens, heads, head_dim), as vLLM's connector keeps keys and values. Whatever is otherwise (another
codec, both in one tensor, latents) is decoded densely first. Pure, any thread.
"""

import torch

from kvstore.codecs.nf4_kv2 import NF4KV2, Plane2
from kvstore.codecs.parts import read, stored_role, stored_token_axis
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
    role, token_axis = stored_role(encoded.attrs.get("role")), stored_token_axis(encoded.attrs.get("token_axis"))
    if role == "packed" or token_axis not in (1, -3):
        return None
    (stored,) = read(encoded, Plane2)
    plane, kept = stored.plane, stored.kept
    if plane.shape != tuple(shape):
        return None
    turns = NF4KV2().means(stored)[2] if plane.groups else None
    if plane.tokens > 1 << 15:
        raise CodecError(f"a chunk of {plane.tokens} tokens")
    return Job(
        plane.coded, plane.lead, plane.groups, plane.block, plane.blocks, plane.kept, plane.tokens,
        mean_nbytes(plane.outer, plane.groups, plane.inner, plane.d),
        kept is not None and kept.dtype == torch.bfloat16, turns,
    )  # fmt: skip
