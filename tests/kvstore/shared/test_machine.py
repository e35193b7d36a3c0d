"""Any verbs on three hosts over one store, against a plain model: the right value, its NF4 form, or nothing.

What a host has deleted it never gives out again until somebody puts it, or unless another host still holds it; a local
hit costs no round trip, a miss at most one, and a hit from outside two.
KVSTORED_SHARED_SEQUENCES: how many sequences are tried, 6 by default.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.codecs import decode_entry, encode_entry
from kvstore.codecs.by_role import ByRole
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store
from tests.kvstore.shared.conftest import CHUNK, Hosts, prefix

HOSTS = st.integers(0, 2)
PROMPTS = st.integers(0, 2)
CHUNKS = st.integers(1, 5)


class HostsAgainstAModel(RuleBasedStateMachine):
    """Three hosts; prompts of up to five chunks, of which the values follow from the prompt as they do in a model."""

    values: ClassVar[dict[int, tuple[torch.Tensor, torch.Tensor]]] = {i: prefix(5, seed=i)[1:] for i in range(3)}

    @initialize()
    def open_stores(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
        self.hosts = Hosts(self.folder)
        self.stores: list[Store] = [self.opened(i) for i in range(3)]
        self.deleted: list[set[bytes]] = [set(), set(), set()]

    def opened(self, i: int) -> Store:
        return self.hosts.open(cold=self.folder / f"cold{i}" if i == 0 else None, warm=200_000 if i == 2 else 64 << 20)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for store in self.stores:
                store.close()
            shutil.rmtree(self.folder)

    def keys(self, host: int, prompt: int, chunks: int = 5) -> list[bytes]:
        return self.hosts.namespace(self.stores[host]).keys(prefix(chunks, seed=prompt)[0])

    @rule(host=HOSTS, prompt=PROMPTS, chunks=CHUNKS)
    def put(self, host: int, prompt: int, chunks: int) -> None:
        tokens, _, _ = prefix(chunks, seed=prompt)
        k, v = self.values[prompt]
        self.hosts.namespace(self.stores[host]).put_prefix(tokens, k[:, : len(tokens)], v[:, : len(tokens)])
        held = self.keys(host, prompt, chunks)
        for deleted in self.deleted:  # it is there again, for whoever asks
            deleted.difference_update(held)

    @rule(host=HOSTS, prompt=PROMPTS, chunks=CHUNKS)
    def get(self, host: int, prompt: int, chunks: int) -> None:
        store = self.stores[host]
        ns, (tokens, _, _) = self.hosts.namespace(store), prefix(chunks, seed=prompt)
        held = [place is not None for place in store.locate(self.keys(host, prompt, chunks))]
        # The background is late: the table of epochs is read, and perhaps repaired, by the get.
        refresh = 0 if store._sharing.source.outside.epochs.fresh else 3
        before = self.hosts.server.total()
        n, k, v = ns.get_prefix(tokens)
        trips = self.hosts.server.total() - before
        local = held.index(False) if False in held else chunks
        assert n % CHUNK == 0
        assert n >= local * CHUNK
        assert trips <= (0 if local == chunks else refresh + (1 if n == local * CHUNK else 2))
        got = self.keys(host, prompt, chunks)[: n // CHUNK]
        assert not self.deleted[host].intersection(got)
        for i in range(n // CHUNK):
            part = slice(i * CHUNK, (i + 1) * CHUNK)
            self.check(prompt, i, {"k": k[:, part], "v": v[:, part]})

    def check(self, prompt: int, i: int, found: dict[str, torch.Tensor]) -> None:
        """The value as put, or as its first encoding gives it."""
        part = slice(i * CHUNK, (i + 1) * CHUNK)
        k, v = (x[:, part].contiguous() for x in self.values[prompt])
        if torch.equal(found["k"], k) and torch.equal(found["v"], v):
            return
        lossy = decode_entry(encode_entry(raw_entry(Key(b"k"), {"k": k, "v": v}), ByRole()))
        assert torch.equal(found["k"], lossy["k"])
        assert torch.equal(found["v"], lossy["v"])

    @invariant()
    def others_may_publish_what_they_hold(self) -> None:
        """A deletion reaches no other host's tiers."""
        for host, deleted in enumerate(getattr(self, "deleted", ())):
            for other in self.stores[:host] + self.stores[host + 1 :]:
                keys = list(deleted)
                deleted.difference_update(k for k, at in zip(keys, other.locate(keys), strict=True) if at is not None)

    @rule(host=HOSTS, prompt=PROMPTS, chunk=st.integers(0, 4))
    def delete(self, host: int, prompt: int, chunk: int) -> None:
        keys = self.keys(host, prompt)
        # With what continues it here; what other hosts alone know to continue it is reached only through it.
        gone = [keys[chunk]]
        for key, place in zip(keys[chunk + 1 :], self.stores[host].locate(keys[chunk + 1 :]), strict=True):
            if place is None:
                break
            gone.append(key)
        self.stores[host].delete(keys[chunk])
        self.deleted[host].update(gone)

    @rule(host=HOSTS)
    def background(self, host: int) -> None:
        self.stores[host].maintain()

    @rule(host=HOSTS, prompt=PROMPTS)
    def demote(self, host: int, prompt: int) -> None:
        self.stores[host].demote(*self.keys(host, prompt))

    @rule(host=HOSTS, prompt=PROMPTS)
    def evict(self, host: int, prompt: int) -> None:
        self.stores[host].evict(self.keys(host, prompt)[0])

    @rule(host=HOSTS, prompt=PROMPTS)
    def match(self, host: int, prompt: int) -> None:
        keys = self.keys(host, prompt)
        match = self.stores[host].match(keys)
        assert not self.deleted[host].intersection(keys[: int(match)])

    @rule(seconds=st.sampled_from([0.5, 3.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.hosts.clock.advance(seconds)

    @rule(down=st.booleans())
    def server(self, down: bool) -> None:
        self.hosts.server.down = down

    @rule(host=HOSTS)
    def flush(self, host: int) -> None:
        if not self.hosts.server.down:
            self.stores[host].flush_shared()
            self.hosts.clock.advance(2.1)

    @rule(at=st.integers(0, 30), bit=st.integers(0, 2000))
    def damage(self, at: int, bit: int) -> None:
        names = self.hosts.server.names()
        if names:
            name = names[at % len(names)]
            data, until = self.hosts.server.objects[name]
            changed = bytearray(data)
            changed[bit % len(data)] ^= 1
            self.hosts.server.objects[name] = bytes(changed), until

    @rule(host=HOSTS)
    def restart(self, host: int) -> None:
        self.stores[host].close()
        self.stores[host] = self.opened(host)
        if host:  # without a disk it forgets what it deleted, which the documentation says
            self.deleted[host].clear()


TestHostsAgainstAModel = HostsAgainstAModel.TestCase
TestHostsAgainstAModel.settings = settings(
    max_examples=int(os.environ.get("KVSTORED_SHARED_SEQUENCES", "6")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
