"""A browser asked by its debugging protocol, over pipes: one question, one answer. For what no picture tells."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Browser:
    """One page of a headless Chromium, as wide as a phone."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number, self._session = to, back, b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method."""
        self._number += 1
        question = {"id": self._number, "method": method, "params": params}
        if self._session:
            question["sessionId"] = self._session
        os.write(self._to, json.dumps(question).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._back, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def show(self, url: str, width: int, ready: str) -> None:
        """Load a page in a window of that width, and wait until the expression `ready` is true in it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        self.ask("Page.navigate", url=url)
        until = time.monotonic() + 60
        while not self.value(ready):
            assert time.monotonic() < until, f"{url}: {ready} did not become true"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A running one."""
    (their_in, to), (back, their_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="kvp-", ignore_cleanup_errors=True) as profile:
        # The protocol is on descriptors 3 and 4, by these numbers.
        shell = f'exec "$@" 3<&{their_in} 4>&{their_out}'
        child = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, "--headless", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])],
            pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        try:
            yield Browser(to, back)
        finally:
            child.kill()
            child.wait()
            os.close(to)
            os.close(back)
