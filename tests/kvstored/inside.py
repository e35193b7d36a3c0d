"""A daemon in this process, on a thread with an event loop of its own: a test can look at its parts and break them."""

import asyncio
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.config import ColdConfig, HotConfig, SharedConfig, StoreConfig
from kvstore.shm.arena import Arena
from kvstore.store import Store
from kvstored.server import Daemon
from kvstored.settings import ServerSettings
from kvstored_client import Client
from tests.conftest import free_port

WAIT_S = 120.0


class InsideDaemon:
    """daemon: the server around `store`; port: its TCP port, 0 without one."""

    def __init__(self, directory: Path, port: int, settings: ServerSettings, arena: Arena, **outside: Any) -> None:
        self.directory = directory
        self.socket_path = directory / "k.sock"
        self.port = port
        self.arena = arena
        self.clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        cold = ColdConfig(path=str(directory / "cold"))
        self.store = Store.open(
            StoreConfig(
                hot=HotConfig(arena.limit_nbytes, device="cuda:0" if "driver" in outside else "cpu"), cold=cold,
                shared=outside.get("shared", SharedConfig()), promote_after=outside.get("promote_after", 2),
            ),
            room=arena.empty, engine=outside.get("engine"), driver=outside.get("driver"),
        )  # fmt: skip
        self.daemon: Daemon = self.on_loop(lambda: Daemon(self.store, settings, arena))
        self.wait_for(self.daemon.start())

    def on_loop(self, work: Callable[[], Any]) -> Any:
        """Run something on the event loop's thread."""

        async def run() -> Any:
            return work()

        return self.wait_for(run())

    def wait_for(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def client(self, **options: Any) -> Client:
        client = Client(
            f"unix:{self.socket_path}", **{"on_error": "raise", "timeout_s": 60, "framework": "numpy", **options}
        )
        self.clients.append(client)
        return client

    def refused(self, lane: str, reason: str) -> float:
        """Calls turned away so far, from the metrics."""
        labels = {"lane": lane, "reason": reason}
        return self.daemon.watch.meter.registry.get_sample_value("kvstored_calls_refused_total", labels) or 0.0

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.wait_for(self.daemon.stop())
        self.store.close()
        self.arena.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def daemon_inside(
    *,
    tcp: bool = False,
    tokens: str = "",
    segment_nbytes: int = 1 << 20,
    outside: dict[str, Any] | None = None,
    **server: Any,
) -> Iterator[InsideDaemon]:
    """A running daemon. tokens: the text of its tokens file; outside: `shared`, the settings of the shared store, and
    its `engine`; `driver`: hot is on its device; `promote_after`; server: its settings.
    """
    with tempfile.TemporaryDirectory(prefix="kvi-") as top:
        directory = Path(top)
        port = free_port() if tcp else 0
        address = f"unix:{directory}/k.sock" + (f",tcp:127.0.0.1:{port}" if tcp else "")
        if tokens:
            (directory / "tokens.toml").write_text(tokens)
            server["tokens"] = str(directory / "tokens.toml")
        elif tcp:
            server["insecure_tcp"] = True
        settings = ServerSettings(address=address, data_dir=str(directory / "data"), pressure_percent=0, **server)
        found = InsideDaemon(
            directory, port, settings, Arena(512 << 20, segment_nbytes=segment_nbytes), **(outside or {})
        )
        try:
            yield found
        finally:
            found.stop()
