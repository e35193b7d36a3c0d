"""A stream that nobody wants any more ends, also while its call is only being made."""

import socket
import threading
from pathlib import Path

import grpc
import pytest

from kvstored_client.stream.transport import _Stream


@pytest.mark.parametrize("when", ["before the call is made", "while its message is waited for"])
def test_a_stream_that_is_called_off_waits_for_nobody(tmp_path: Path, when: str) -> None:
    """Whoever listens there takes the connection and says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:
            stream = _Stream(channel.unary_stream("/any/Thing"), b"")
            ended: list[grpc.StatusCode] = []

            def take() -> None:
                try:
                    stream.take()
                except grpc.RpcError as error:
                    ended.append(error.code())

            waiting = threading.Thread(target=take)
            if when == "before the call is made":
                stream.cancel()
                waiting.start()
            else:
                waiting.start()
                while stream._call is None and waiting.is_alive():
                    waiting.join(0.01)
                stream.cancel()
            waiting.join(120)
            assert ended == [grpc.StatusCode.CANCELLED]
            assert not stream.received
