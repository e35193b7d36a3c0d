"""A call whose peer is gone: no defect of ours, and no line in the log."""

import asyncio
import gc
import logging

import grpc
import pytest

from kvstored.access.interceptor import answering
from kvstored.access.open_call import OpenCall


class BrokenConnection:
    """gRPC's context after the connection broke under a batch."""

    def peer(self):
        return "unix:"

    def add_done_callback(self, callback):
        pass

    async def read(self):
        raise grpc.aio.InternalError("batch failed")

    async def write(self, message):
        raise grpc.aio.InternalError("batch failed")


@answering
async def reading(self, request, context):
    await context.read()


@answering
async def writing(self, request, context):
    await context.write(b"frame")


@pytest.mark.parametrize("handler", [reading, writing])
def test_a_batch_that_fails_with_the_connection_ends_the_call_without_a_word(handler, caplog):
    """It was logged with a traceback, as a defect, for each client that was killed while a frame was on its way."""

    async def serve():
        await handler(None, b"", OpenCall(BrokenConnection(), "Cache/Get"))

    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        asyncio.run(serve())
    assert caplog.records == []


class PeerThatLeaves(BrokenConnection):
    """Its connection breaks under the first message once `gone` is set."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def write(self, message):
        await self.gone.wait()
        raise ConnectionError("the peer was gone")


def test_a_first_message_that_fails_after_its_call_was_cancelled_is_no_line_in_the_log():
    complaints = []

    async def leave():
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        peer = PeerThatLeaves()
        call = asyncio.create_task(OpenCall(peer, "Cache/Get").write(b"head"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        peer.gone.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del call, peer
        gc.collect()

    asyncio.run(leave())
    assert complaints == []
