"""Whatever order a GPU does its work in: no wrong byte is kept or given.

A state machine over the real client and a daemon, with a driver that does work only when it must, in an order that
hypothesis chooses. Kernels write to tensors before they are put and after memory is asked to be filled; blocks are used
again while they are copied from; entries come and go, so that memory is used again. That no lease is given back before
its copy has ended, `test_transfers` counts at the copies.
"""

import ctypes
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore import decode, encode
from kvstore.device.deferred import Deferred
from tests.kvstored.inside import daemon_inside

from .tensors import on_gpu

KEYS = st.integers(0, 5)
SHAPE = (3, 32, 2, 8)
MODEL = {
    "model": "m", "revision": "r1", "dtype": "float32", "layers": 3, "kv_heads": 2, "head_dim": 8, "layout": "lthd",
    "fidelity": "exact",
}  # fmt: skip


def value(number):
    return torch.full(SHAPE, float(number)) + torch.arange(32).reshape(1, 32, 1, 1) / 64


class Interleavings(RuleBasedStateMachine):
    daemon = None
    host = ""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.driver = Deferred(random.Random(seed).shuffle, kernels=True, host=self.host)
        self.client = self.daemon.client(framework="torch", driver=self.driver)
        self.client.delete(*(b"%d" % key for key in range(6)))
        self.ns = self.client.namespace(**{**MODEL, "revision": str(seed)}, chunk_tokens=16)
        self.held, self.prefixes, self.number = {}, {}, 0
        self.filled = []  # (tensor, what it must hold once all is done)
        self.wrong = []

    def new(self):
        """A tensor on the GPU whose numbers a kernel is still to write."""
        self.number += 1
        x, number = on_gpu(torch.zeros(SHAPE)), self.number
        self.driver.compute(0, lambda: x.numbers.copy_(value(number)))
        return x, number

    def used(self):
        """A tensor to fill, whose memory a kernel is still to write to."""
        x = on_gpu(torch.zeros(SHAPE))
        self.driver.compute(0, lambda: x.numbers.fill_(-1.0))
        return x

    @rule(key=KEYS)
    def put(self, key):
        x, number = self.new()
        if self.client.put(b"%d" % key, {"x": x}, fidelity="exact"):
            self.held[key] = number

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4, unique=True), strided=st.booleans())
    def put_many(self, keys, strided):
        news = [self.new() for _ in keys]
        cut = [x.transpose(1, 2) if strided else x for x, _ in news]
        stored = self.client.put_many([(b"%d" % key, {"x": x}) for key, x in zip(keys, cut, strict=True)])
        assert stored == len(keys)
        self.held.update({key: -number if strided else number for key, (_, number) in zip(keys, news, strict=True)})

    @rule(key=KEYS)
    def get(self, key):
        number = self.held.get(key)
        wanted = None if number is None else value(abs(number))
        out = self.used() if number is None or number > 0 else on_gpu(torch.zeros(3, 2, 32, 8)).transpose(1, 2)
        into = out if number is None or number > 0 else out.transpose(1, 2)
        hit = self.client.get(b"%d" % key, out={"x": into})
        assert (hit is None) == (number is None)
        if hit is not None:
            self.filled.append((out, wanted))

    @rule(key=KEYS, after=st.integers(0, 2))
    def get_of_a_block_that_is_used_again(self, key, after):
        if self.held.get(key, 0) <= 0:
            return
        # Only its block is known: another one, of an entry that is gone, may lie where a third one lies by now.
        self.client._pool.segments.blocks.clear()
        self.client.get(b"%d" % key)
        count = iter(range(100))
        self.driver.before_copy = lambda: self.use_again() if next(count) == after else None
        out = self.used()
        hit = self.client.get(b"%d" % key, out={"x": out})
        self.driver.before_copy = lambda: None
        if hit is not None:
            assert after, "a copy that was not begun has no block"
            self.filled.append((out, value(self.held[key])))
        self.held = {}
        self.client.delete(*(b"%d" % k for k in range(6)))
        self.client._pool.start_afresh()

    def use_again(self):
        """The block that the client knows is another entry's from now on."""
        for block in self.client._pool.segments.blocks.values():
            if block.on_device:
                self.use_again_there(block)
                continue
            for segment in self.daemon.arena._segments:
                words = segment.bytes.view(np.uint64)
                at = block.start >> 3
                if at < words.size and int(words[at]) == block.generation:
                    words[at] += 1 << 40
                    start = block.start + 64
                    segment.bytes[start : block.start + block.nbytes] = 0xDB

    def use_again_there(self, block):
        for segment in self.daemon.store._device_hot.arena._segments:
            mapping = self.client._pool.segments._mappings.get(segment.shared.number)
            if mapping is block.mapping:
                segment.shared.set_generation(block.start, block.generation + (1 << 40))
                ctypes.memset(segment.address + block.start + 64, 0xDB, block.nbytes - 64)

    @rule(key=KEYS, strided=st.booleans())
    def encoded(self, key, strided):
        """What is held in four bits comes as it is held, and is decoded on the GPU."""
        self.number += 1
        packed = encode({"x": value(self.number)})
        assert self.client.put(b"encoded %d" % key, packed)
        out = on_gpu(torch.zeros(3, 2, 32, 8)).transpose(1, 2) if strided else self.used()
        hit = self.client.get(b"encoded %d" % key, out={"x": out})
        assert hit.lossy
        self.filled.append((out, decode(packed)["x"]))

    @rule(tokens=st.integers(16, 32))
    def prefix(self, tokens):
        k, number = self.new()
        self.ns.put_prefix(range(number * 100, number * 100 + tokens), k[:, :tokens], k[:, :tokens])
        self.prefixes[number] = tokens

    @rule()
    def get_prefix(self):
        for number, tokens in self.prefixes.items():
            out = self.used(), self.used()
            n, _, _ = self.ns.get_prefix(range(number * 100, number * 100 + tokens), out=out)
            if n:
                assert n == tokens
                self.filled += [(x[:, :n], value(number)[:, :n]) for x in out]

    @rule(key=KEYS)
    def delete(self, key):
        self.client.delete(b"%d" % key)
        self.held.pop(key, None)

    @rule()
    def wait_for_the_gpu(self):
        self.driver.settle()
        for x, wanted in self.filled:
            assert torch.equal(x.numbers, wanted)
        self.filled.clear()

    @invariant()
    def a_call_returns_once_its_copies_are_done(self):
        if hasattr(self, "driver"):
            assert self.driver.early == 0
            assert self.driver.pending == 0

    def teardown(self):
        if hasattr(self, "driver"):
            self.wait_for_the_gpu()
            for key, number in self.held.items():
                hit = self.client.get(b"%d" % key)
                assert hit is not None
                assert torch.equal(
                    hit.tensors["x"], value(abs(number)) if number > 0 else value(-number).transpose(1, 2)
                )
            self.ns.forget([])
            self.client.close()


@pytest.mark.parametrize("hot", ["in memory", "on a device", "on another device"])
def test_no_order_of_the_gpu_s_work_gives_a_wrong_byte(hot):
    daemons = Deferred(random.Random(1).shuffle, memory_nbytes=4 << 30)
    outside = None if hot == "in memory" else {"driver": daemons}
    with daemon_inside(segment_nbytes=8 << 20, outside=outside) as daemon:
        Interleavings.daemon = daemon
        Interleavings.host = "another" if hot == "on another device" else ""
        case = Interleavings.TestCase
        case.settings = settings(
            max_examples=15, stateful_step_count=20, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        case().runTest()
        assert daemons.early == 0
        assert daemons.pending == 0
        assert bool(daemons.runs) == (hot != "in memory")
