"""What routers are told over ZMQ of the blocks held here, in the wire format of vLLM 0.32's `ZmqEventPublisher`.

A message has three frames: the topic; the sequence number, 8 bytes, big-endian, from 0; a msgpack array
[time, events, 0]. An event is a map with "type" first, the fields of vLLM's `BlockStored`, `BlockRemoved` and
`AllBlocksCleared` (`vllm/distributed/kv_events.py`). A block's hash is its key. `token_ids` is empty: the daemon knows
keys, which are hashes of the tokens. `medium` is STORAGE, whatever tier has it, as vLLM's connector says of kvstored.
A gap in the numbers means that messages were lost on their way: what is still kept is sent again over the replay
endpoint. Nothing here is waited for by a put: `kvstore.metadata.block_events`. One thread; off, nothing is imported.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError
from kvstore.metadata.block_events import BlockEvent, BlockEvents, Cleared, KeyRemoved, KeyStored
from kvstored.host.process import DirectoryLock
from kvstored.settings import IPC, ServerSettings

if TYPE_CHECKING:
    from kvstore.store import Store

log = logging.getLogger(__name__)

MEDIUM = "STORAGE"
BATCH_MAX = 256
"""Events of a message: 40 KB."""
BEHIND_MAX = 1_000
"""Messages that wait for one slow subscriber, 40 MB at most; then it loses some, and sees a gap."""
KEPT_NBYTES = 16 << 20
"""Of messages that can be asked for again."""
REPLAY_S = 0.1
"""Between two looks at the replay endpoint, as in vLLM."""
LINGER_S = 1.0
"""For what is on its way to subscribers when the daemon stops."""
END = (-1).to_bytes(8, "big", signed=True)


class RouterEvents:
    """Publishes until `close`. Raises ConfigError where a library is missing or an endpoint cannot be bound."""

    def __init__(self, blocks: BlockEvents, settings: ServerSettings) -> None:
        self._blocks = blocks
        zmq, self._encode = _libraries()
        self._topic = settings.events_topic.encode()
        self._published = 0
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_nbytes = 0
        self._stop = threading.Event()
        self._locks: list[DirectoryLock] = []
        self._context = zmq.Context()
        self._no_wait, self._failed = zmq.NOBLOCK, zmq.ZMQError
        self._replay: Any = None
        try:
            self._publish = self._bound(zmq.PUB, settings.events_endpoint, "server.events_endpoint")
            if settings.events_replay_endpoint:
                name = "server.events_replay_endpoint"
                self._replay = self._bound(zmq.ROUTER, settings.events_replay_endpoint, name)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="kvstored-events", daemon=True)

    def start(self) -> None:
        """Publish what waits, and what comes."""
        self._thread.start()

    def close(self) -> None:
        """Publish what waits, and that nothing is held here any more; for a second at most. Idempotent."""
        self._stop.set()
        self._blocks.awake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._release()

    def gauges(self) -> Mapping[str, float]:
        """Events since start: published, and dropped because too many waited."""
        return {"block_events_published": self._published, "block_events_dropped": self._blocks.dropped}

    def _bound(self, kind: int, endpoint: str, name: str) -> Any:
        path = Path(endpoint.removeprefix(IPC)) if endpoint.startswith(IPC) else None
        if path is not None:  # ZMQ would take over the path of a daemon that is running
            self._locks.append(DirectoryLock(path.with_name(path.name + ".lock"), str(path)))
        made = self._context.socket(kind)
        made.sndhwm = BEHIND_MAX
        made.linger = int(1000 * LINGER_S)
        before = os.umask(0o117)  # 0660 from the first moment on, as of the daemon's other sockets
        try:
            made.ipv6 = "[" in endpoint
            made.bind(endpoint.replace("//localhost:", "//127.0.0.1:"))  # ZMQ binds to addresses, not to names
        except self._failed as error:
            made.close()
            raise ConfigError(f"cannot publish on {endpoint}: {error}; choose another {name}") from None
        finally:
            os.umask(before)
        return made

    def _release(self) -> None:
        self._context.destroy()
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._blocks.awake.wait(None if self._replay is None else REPLAY_S)
            try:
                self._turn()
            except Exception:  # the boundary of the thread: one failed turn must not be the last
                log.exception("publishing events failed")
                self._stop.wait(REPLAY_S)
        self._turn()
        self._send([Cleared()])

    def _turn(self) -> None:
        while found := self._blocks.take(BATCH_MAX):
            self._send(found)
        while self._replay is not None and self._replay.poll(0):
            self._send_again(self._replay.recv_multipart())

    def _send(self, events: Sequence[BlockEvent]) -> None:
        payload = self._encode([time.time(), told(events), 0])
        self._kept.append((self._sequence, payload))
        self._kept_nbytes += len(payload)
        while self._kept_nbytes > KEPT_NBYTES:
            self._kept_nbytes -= len(self._kept.popleft()[1])
        self._sequence += 1
        # PUB waits for nobody: for a subscriber that is behind the message is dropped.
        self._publish.send_multipart((self._topic, _number(self._sequence - 1), payload), self._no_wait)
        self._published += len(events)

    def _send_again(self, request: Sequence[bytes]) -> None:
        """From a number on; a request that is none is left alone. ROUTER waits for nobody either."""
        if len(request) != 3 or len(request[2]) != 8:
            return
        caller, _, begin = request
        for sequence, payload in self._kept:
            if sequence >= int.from_bytes(begin, "big"):
                self._answer(caller, self._topic, _number(sequence), payload)
        self._answer(caller, b"", END, b"")

    def _answer(self, caller: bytes, *frames: bytes) -> None:
        self._replay.send_multipart((caller, b"", *frames), self._no_wait)


def told(events: Sequence[BlockEvent]) -> list[dict[str, Any]]:
    """Events as vLLM writes them; removals that follow one another are one."""
    found: list[dict[str, Any]] = []
    for event in events:
        match event:
            case KeyStored(key, parent, tokens):
                found.append({
                    "type": "BlockStored", "block_hashes": [bytes(key)],
                    "parent_block_hash": None if parent is None else bytes(parent), "token_ids": [],
                    "block_size": tokens, "lora_id": None, "medium": MEDIUM, "lora_name": None,
                })  # fmt: skip
            case KeyRemoved(key) if found and found[-1]["type"] == "BlockRemoved":
                found[-1]["block_hashes"].append(bytes(key))
            case KeyRemoved(key):
                found.append({"type": "BlockRemoved", "block_hashes": [bytes(key)], "medium": MEDIUM})
            case Cleared():
                found.append({"type": "AllBlocksCleared"})
    return found


def check_libraries(settings: ServerSettings) -> None:
    """Raise ConfigError where events are wanted and what they need is not installed."""
    if settings.events_endpoint:
        _libraries()


def open_events(store: "Store", settings: ServerSettings) -> RouterEvents | None:
    """The publisher of a store's blocks; None: server.events_endpoint is empty. Raises ConfigError."""
    check_libraries(settings)
    return RouterEvents(store.block_events(), settings) if settings.events_endpoint else None


def _number(sequence: int) -> bytes:
    return sequence.to_bytes(8, "big")


def _libraries() -> tuple[Any, Any]:
    try:
        return import_module("zmq"), import_module("msgspec.msgpack").encode
    except ImportError as error:
        raise ConfigError(
            f"server.events_endpoint needs what is not installed ({error.name}): pip install 'kvstored[events]'"
        ) from None
