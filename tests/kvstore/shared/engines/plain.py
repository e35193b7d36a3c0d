"""What the Protocol says, as a dictionary: the contract suite runs over it first."""

import threading

from kvstore.shared import HEAD_NBYTES, Health, SharedUnavailable


class Plain:
    """An `Engine` that keeps everything and forgets claims never."""

    def __init__(self):
        self._lock = threading.Lock()
        self._objects = {}
        self._claims = set()
        self._closed = False

    def _check(self):
        if self._closed:
            raise SharedUnavailable("closed", "closed")

    def heads(self, names, timeout_s):
        self._check()
        return [bytes(self._objects[name][:HEAD_NBYTES]) if name in self._objects else None for name in names]

    def get(self, names, nbytes, timeout_s):
        self._check()
        found = [self._objects.get(name) for name in names]
        return [
            bytearray(value) if value is not None and len(value) == size else None
            for value, size in zip(found, nbytes, strict=True)
        ]

    def put(self, objects, ttl_s, timeout_s, *, replace=False):
        self._check()
        with self._lock:
            for name, buffers in objects:
                if replace or name not in self._objects:
                    self._objects[name] = b"".join(buffers)
        return [True] * len(objects)

    def claim(self, names, ttl_s, timeout_s):
        with self._lock:
            new = [name not in self._claims for name in names]
            self._claims.update(names)
        return new

    def delete(self, names, timeout_s):
        for name in names:
            self._objects.pop(name, None)
        return [True] * len(names)

    def health(self, timeout_s):
        return Health(1, 1, 0.0)

    def close(self):
        self._closed = True
