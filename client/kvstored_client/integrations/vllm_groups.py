"""The cache groups of a vLLM model: which blocks of a chunk they have, and which a window has let go of.

Layers of full attention are a group. Layers with a sliding window are groups of their own (gpt-oss, Gemma 3): the
engine takes a block back once it is out of the window of all tokens to come, and has block 0 in its place. A chunk of
all groups is one entry, held whole or not at all; what a window had let go of when the chunk was kept is zeros in it,
and is never asked for: a load ends where a chunk ends, and by then the engine has let go of as much or more.
Source of the rule: vLLM's SlidingWindowManager.get_num_skipped_tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NO_BLOCK = 0
"""The engine's null block: never a request's own."""
_WINDOW = "SlidingWindowSpec"
_ALONE = ("FullAttentionSpec", "MLAAttentionSpec")
_TOGETHER = ("FullAttentionSpec", _WINDOW)

Places = tuple[list[int], ...]
"""Blocks of a chunk, a list for each group: NO_BLOCK where a window has let go of one."""


@dataclass(frozen=True, slots=True)
class Group:
    """layers: their names. reach: tokens before the next one that it needs; None: all of them."""

    layers: tuple[str, ...]
    head_dim: int
    page_nbytes: int
    reach: int | None


@dataclass(frozen=True, slots=True)
class Groups:
    """A model's groups, whose blocks have the same number of tokens."""

    all: tuple[Group, ...] = ()

    @property
    def several(self) -> bool:
        """Whether there are more than one."""
        return len(self.all) > 1

    @property
    def fails_whole(self) -> bool:
        """Whether a load that fails is told of its request, not of blocks: of several groups they do not say of which.

        Of one with a window the engine would compute from the first lost block on, and what that needs before it may
        have left the window.
        """
        return self.several or self.windowed

    @property
    def windowed(self) -> bool:
        """Whether blocks leave before their request does: chunks are loaded whole, then."""
        return any(group.reach is not None for group in self.all)

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block in all layers."""
        return sum(group.page_nbytes * len(group.layers) for group in self.all)

    def none_yet(self) -> Places:
        """No block in any group."""
        return tuple([] for _ in self.all)

    def places(self, blocks: Places, first: int, end: int, computed: int, block_tokens: int) -> Places | None:
        """The chunk of blocks first to end, exclusive; None: one is gone that a load up to `end` would need.

        blocks: of the request, a list for each group. computed: tokens before this step.
        """
        found = []
        for group, own in zip(self.all, blocks, strict=True):
            if group.reach is None:
                found.append(own[first:end])
                continue
            gone = max(0, computed - group.reach) // block_tokens
            needed = max(0, end * block_tokens - group.reach) // block_tokens
            chunk = [NO_BLOCK if at < gone else own[at] for at in range(first, end)]
            if NO_BLOCK in chunk[max(0, needed - first) :]:
                return None
            found.append(chunk)
        return tuple(found)


def groups_of(kv_cache_config: Any) -> Groups:
    """The groups of a model that is kept. Raises ValueError, with the reason, for one that is not."""
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(kinds) == 1 and kinds[0] in _ALONE:
        return Groups((_group(groups[0]),))
    if not kinds or not set(kinds) <= set(_TOGETHER):
        raise ValueError(f"this model's cache is not of full attention and windows: {', '.join(kinds) or 'unknown'}")
    if len({int(group.kv_cache_spec.block_size) for group in groups}) > 1:
        raise ValueError("the blocks of this model's groups have different numbers of tokens")
    import vllm.distributed.kv_transfer.kv_connector.v1.base as connector_base  # where there are groups, there is vLLM

    if not hasattr(connector_base, "KVConnectorTransferResults"):
        raise ValueError("this vLLM cannot be told that a load of several groups has failed: 0.32 can")
    return Groups(tuple(map(_group, groups)))


def _group(group: Any) -> Group:
    spec = group.kv_cache_spec
    window = getattr(spec, "sliding_window", None) if type(spec).__name__ == _WINDOW else None
    reach = None if window is None else int(window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))
    return Group(
        tuple(getattr(group, "layer_names", None) or ()), int(getattr(spec, "head_size", 0)),
        int(getattr(spec, "page_size_bytes", 0)), reach,
    )  # fmt: skip


def leading_gone(chunk: Sequence[int]) -> int:
    """How many blocks a window has let go of: they are the first ones."""
    return next((at for at, block in enumerate(chunk) if block != NO_BLOCK), len(chunk))
