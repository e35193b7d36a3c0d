"""A call whose peer is gone: no defect of ours, and no line in the log."""

import asyncio
import gc
import logging

import grpc
import pytest

from kvstored.access.admission import Admission
from kvstored.access.interceptor import Access, Interceptor, OpenCall
from kvstored.access.records import Records
from kvstored.access.shares import Shares
from kvstored.telemetry.metrics import Meter
from kvstored.telemetry.spans import Spans


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


async def reading(request, call):
    await call.read()


async def writing(request, call):
    await call.write(b"frame")


@pytest.mark.parametrize("handler", [reading, writing])
def test_a_batch_that_fails_with_the_connection_ends_the_call_without_a_word(handler, caplog):
    """It was logged with a traceback, as a defect, for each client that was killed while a frame was on its way."""
    meter = Meter()
    interceptor = Interceptor(
        Access(None, token_on_unix=False), meter, Records(meter, Spans()), Admission(8, meter.turn_away), 5.0, Shares()
    )
    served = interceptor._served("Cache/Put", handler, one_message=False)
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        asyncio.run(served(None, BrokenConnection()))
    assert caplog.records == []
    (call,) = meter.calls()
    assert (call.method, call.count) == ("Cache/Put", 1)


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
