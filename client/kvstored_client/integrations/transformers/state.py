"""A model's state at each call: a digest of everything that decides the keys and values it computes.

By state, not by name: adapters switched, merged, disabled, loaded over or trained, weights, RoPE or types changed in
place give another digest, whoever did it and however. `walk` reads all but the tensors' contents, `weights` those.
"""

import hashlib
from typing import Any

from kvstored_client.integrations.transformers.walk import NotCacheable, Walk
from kvstored_client.integrations.transformers.weights import Unreadable, Weights

__all__ = ["NotCacheable", "Watch"]


class Watch:
    """Looks at one model. Not thread-safe."""

    def __init__(self, model: Any, vouched: str | None = None, besides: frozenset[str] = frozenset()) -> None:
        """vouched: the caller's word for the weights at the first look; they are then read only if they change.

        Adapters are never vouched for: their content always counts. besides: attributes of modules to leave out.
        """
        self._model = model
        self._besides = besides
        self._weights = Weights()
        self._vouched = vouched
        self._words: set[int] | None = None
        self._walk: Walk | None = None
        self._digest = ""

    def look(self, *, read: bool = True) -> str:
        """A digest of the state now, 32 hex digits. Raises NotCacheable.

        read: also read some of the weights in turn, to find what torch does not count.
        """
        walk, same = self._walked()
        changed = self._weights.look(walk.tensors, read=read)
        if self._words is None:
            self._words = set() if self._vouched is None else walk.tensors.keys() - walk.adapters
        else:
            self._words -= changed
        if same and not changed and self._digest:
            return self._digest
        found = hashlib.sha256(repr(walk.found).encode())
        for key, x in walk.tensors.items():
            content = self._vouched if key in self._words else self._weights.content(key, x)
            found.update(f"{x.dtype} {tuple(x.shape)} {content};".encode())
        self._digest = found.hexdigest()[:32]
        return self._digest

    def structure(self) -> str:
        """A digest of all but the tensors' contents, as of the last look."""
        assert self._walk is not None
        return hashlib.sha256(repr(self._walk.found).encode()).hexdigest()[:32]

    def tensors(self) -> list[int]:
        """The ids of the model's tensors, as of the last look."""
        assert self._walk is not None
        return list(self._walk.tensors)

    def _walked(self) -> tuple[Walk, bool]:
        """What the model is like, and whether it is what it was."""
        try:
            if self._walk is not None and self._walk.unchanged(self._model):
                return self._walk, True
            self._walk = None  # a pass that does not come to its end leaves nothing behind
            walk = Walk(self._besides)
            walk.whole(self._model)
        except Unreadable as error:
            raise NotCacheable(str(error)) from error
        self._walk = walk
        return walk, False
