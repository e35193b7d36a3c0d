"""Carried: what an integration puts, as the state of a strategy, and answered to the same integration after a restart.

An integration speaks to a cache by its own keys. Here it speaks to one in this process, whose entries become named
tensors; the store then holds those like any other state. The keys travel as names, so an integration that would ask for
another model, other tokens or another press finds nothing, as it would in the daemon.
"""

import base64
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvstore.hit import Held, Hit, Match
from kvstored_client.integrations.guard import Guard

PATIENCE_S = 120.0
"""Nothing here waits for a disk or a wire; a busy machine may still be slow."""


class Carried:
    """A cache of one state: the verbs that integrations use."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._entries: dict[bytes, dict[str, torch.Tensor]] = {}
        for name, x in (tensors or {}).items():
            key, _, own = name.partition(".")
            self._entries.setdefault(base64.urlsafe_b64decode(key), {})[own] = x
        self.guard = Guard(self, lookup_timeout_s=PATIENCE_S, fetch_timeout_s=PATIENCE_S)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All entries, each tensor under its entry's key and its own name."""
        return {
            f"{base64.urlsafe_b64encode(key).decode()}.{name}": x
            for key, entry in self._entries.items()
            for name, x in entry.items()
        }

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor], **_: Any) -> bool:
        """Keep one entry."""
        self._entries[key] = {name: x.contiguous() for name, x in tensors.items()}
        return True

    def put_many(self, entries: Sequence[tuple[bytes, Mapping[str, torch.Tensor]]], **_: Any) -> int:
        """Keep entries."""
        return sum(self.put(key, tensors) for key, tensors in entries)

    def get(self, key: bytes, **_: Any) -> Hit | None:
        """The entry under a key."""
        found = self._entries.get(key)
        return None if found is None else Hit(key, found, "hot", "raw", lossy=False, age_s=0.0)

    def get_many(self, keys: Sequence[bytes], *, leading: bool = False, **_: Any) -> list[Hit | None]:
        """The entries under keys."""
        del leading
        return [self.get(key) for key in keys]

    @contextmanager
    def lease_many(self, keys: Sequence[bytes], *, leading: bool = False, **_: Any) -> Any:
        """The same, for a block."""
        yield self.get_many(keys, leading=leading)

    def match(self, keys: Sequence[bytes], **_: Any) -> Match:
        """How many leading keys are held."""
        held = []
        for key in keys:
            if key not in self._entries:
                break
            held.append(Held("hot", sum(x.numel() * x.element_size() for x in self._entries[key].values())))
        return Match(tuple(held))

    def touch(self, keys: Sequence[bytes], **_: Any) -> int:
        """How many are held."""
        return sum(key in self._entries for key in keys)
