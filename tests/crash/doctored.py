"""A client that lies, for the soak: what the soak must find."""

import time
from dataclasses import replace

from kvstore.hit import Hit
from kvstored_client import Client

STUCK_AT = 20
"""The read that does not come back in time."""
STUCK_S = 6.0
TORN_EVERY = 5


class Liar(Client):
    """Gives back what was deleted, every fifth value torn; one read hangs, and so does the end."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._kept = {}
        self._reads = 0
        self._deleted = {}

    def put(self, key, tensors, **options):
        self._kept[key] = Hit(
            key, {name: x.copy() for name, x in tensors.items()}, "hot", "raw", lossy=False, age_s=0.0
        )
        self._deleted.pop(key, None)
        return super().put(key, tensors, **options)

    def delete(self, *keys, **options):
        deleted = super().delete(*keys, **options)
        for key in keys:
            if key in self._kept:
                self._deleted[key] = self._kept.pop(key)
        return deleted

    def get(self, key, **options):
        self._reads += 1
        if self._reads == STUCK_AT:
            time.sleep(STUCK_S)
        hit = super().get(key, **options)
        if hit is None:
            return self._deleted.get(key)
        if self._reads % TORN_EVERY == 0 and "x" in hit.tensors:
            x = hit.tensors["x"].copy()
            x[x.size // 2 :] += 1
            return replace(hit, tensors={**hit.tensors, "x": x})
        return hit

    def close(self):
        time.sleep(STUCK_S)
        super().close()
