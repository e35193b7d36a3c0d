"""Whether the daemon serves: a thread for each door that puts and gets, twice a second, and notes when it could."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstored_client import Client
from soaking.ledger import now

TIMEOUT_S = 5.0
HUNG_S = 4 * TIMEOUT_S + 10.0
"""A put and a get, each at most at two doors, and some seconds on a busy machine."""


class Probe:
    """One door."""

    def __init__(self, address: str, *, lease: bool) -> None:
        self.address = address
        self._client = Client(address, timeout_s=TIMEOUT_S, framework="numpy", on_error="raise", shared_memory=lease)
        self.last_ok = 0.0
        self.began = 0.0
        self.error = ""
        self.wrong = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        n = 0
        while not self._over.wait(0.5):
            n += 1
            self.began = now()
            try:
                self._once(n)
            except Exception as error:  # noqa: BLE001 - whatever it is, the daemon did not serve
                self.error = f"{type(error).__name__}: {error}"[:200]
            self.began = 0.0

    def _once(self, n: int) -> None:
        key, x = b"%s-%d" % (self.address[:4].encode(), n % 4), np.full(500, n, np.int64)
        if not self._client.put(key, {"x": x}, fidelity="exact"):
            return
        hit = self._client.get(key)
        if hit is None:
            return  # it may forget
        if not np.array_equal(hit.tensors["x"], x):
            self.wrong = f"put {n} under {key.decode()}, got {hit.tensors['x'][:2].tolist()}"
        self.last_ok = now()

    def late_s(self) -> float:
        """By how much the round under way is over what it may take."""
        began = self.began
        return now() - began - HUNG_S if began else 0.0

    def stop(self) -> None:
        """End the thread, and the connection."""
        self._over.set()
        self._thread.join(HUNG_S)
        self._client.close()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """An operator's question; None where there is no answer."""
        try:
            return question(self._client)
        except Exception:  # noqa: BLE001 - the daemon may be away just now
            return None
