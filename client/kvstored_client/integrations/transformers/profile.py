"""What is known of a model in one state: how its cache is kept, and under which identity. Or why it is not kept."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers import identity, probe, snapshot
from kvstored_client.integrations.transformers.attention import Attention
from kvstored_client.integrations.transformers.recurrent import Recurrent
from kvstored_client.integrations.transformers.rows import Rows
from kvstored_client.integrations.transformers.snapshot import Snapshots
from kvstored_client.integrations.transformers.state import NotCacheable, Watch

PROFILES_MAX = 64
"""States remembered. An adapter is one; a training loop makes a new one at each step."""


@dataclass(frozen=True)
class Verdict:
    """What a model's structure allows, whatever its weights. shape: of a cache of full attention."""

    kind: str
    padded: bool
    shape: probe.Shape | None


@dataclass(frozen=True)
class Profile:
    """A model's cache in one state. digest: of the state. Just one of attention and snapshots is there."""

    digest: str
    kind: str
    padded: bool
    attention: Attention | None
    snapshots: Snapshots | None
    recurrent: Recurrent | None


@dataclass(frozen=True)
class Terms:
    """The caller's part of the identity."""

    fidelity: str
    salt: str
    chunk_tokens: int


_verdicts: "WeakKeyDictionary[Any, OrderedDict[str, Verdict | str]]" = WeakKeyDictionary()
"""For each model, by its structure: a second PrefixCache of it tries nothing again."""


class Profiles:
    """The profiles of one model, one for each state it was seen in."""

    def __init__(self, model: Any, guard: Guard, terms: Terms, revision: str | None) -> None:
        self._model = model
        self._guard = guard
        self._terms = terms
        self._watch = Watch(model, revision)
        if revision is not None:
            self._watch.look(read=False)  # the word is for the weights as they are now
        self._verdicts = _verdicts.setdefault(identity.engine_of(model), OrderedDict())
        self._profiles: OrderedDict[str, Profile] = OrderedDict()
        self._moves = ""

    def now(self) -> Profile:
        """The profile of the model as it is now. Raises NotCacheable."""
        if self._moves:
            raise NotCacheable(self._moves)
        why = identity.wrapper_reason(self._model)
        if why:
            raise NotCacheable(why)
        digest = self._watch.look()
        if digest in self._profiles:
            self._profiles.move_to_end(digest)
            return self._profiles[digest]
        verdict = self._verdict(digest)
        digest = self._watch.look(read=False)
        profile = self._profile(digest, verdict)
        _remember(self._profiles, digest, profile)
        return profile

    def still(self, profile: Profile) -> bool:
        """Whether the model is in the state of a profile."""
        try:
            return self._watch.look(read=False) == profile.digest
        except NotCacheable:
            return False

    def _verdict(self, digest: str) -> Verdict:
        structure = self._watch.structure()
        known = self._verdicts.get(structure)
        if known is None:
            try:
                known = self._tried()
                if (first := self._watch.look(read=False)) != digest:
                    # Some models set something up at their first run. The next one may change nothing.
                    before = self._watch.tensors()
                    self._tried()
                    if self._watch.look(read=False) != first or self._watch.tensors() != before:
                        self._moves = "it keeps state beside its cache, which changes while it runs"
                        raise probe.Refuted(self._moves)
            except probe.Refuted as error:
                known = str(error)
            _remember(self._verdicts, self._watch.structure(), known)
        if isinstance(known, str):
            raise NotCacheable(known)
        return known

    def _tried(self) -> Verdict:
        engine = identity.engine_of(self._model)
        kind, why = identity.kind_of(engine)
        if kind == "unknown":
            raise probe.Refuted(why)
        shape = None
        if kind == "attention":
            shape = probe.try_attention(engine)
        else:
            probe.try_snapshot(engine, _Through(engine, kind))
        return Verdict(kind, kind != "rwkv" and probe.padding_is_nothing(engine), shape)

    def _profile(self, digest: str, verdict: Verdict) -> Profile:
        engine, terms, shape = identity.engine_of(self._model), self._terms, verdict.shape
        fields: dict[str, Any] = {
            "model": f"{type(engine).__name__}/{terms.salt}", "revision": digest, "fidelity": terms.fidelity,
        }  # fmt: skip
        if shape is not None:
            attention = Attention(self._guard, fields, terms.chunk_tokens, shape)
            return Profile(digest, verdict.kind, verdict.padded, attention, None, None)
        layers = int(getattr(identity.text_config(engine), "num_hidden_layers", 1))
        dtype = str(engine.dtype).removeprefix("torch.")
        fields |= {"dtype": dtype, "layers": layers, "kv_heads": 1, "head_dim": 1, "layout": "snapshot"}
        snapshots = Snapshots(self._guard, fields, terms.chunk_tokens)
        return Profile(digest, verdict.kind, verdict.padded, None, snapshots, Recurrent(engine, verdict.kind))


class _Through:
    """The logits after a prompt, by way of a saved state."""

    def __init__(self, engine: Any, kind: str) -> None:
        self._engine = engine
        self._recurrent = Recurrent(engine, kind)

    def __call__(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        due = rows.width - 1
        state = self._recurrent.advance(self._recurrent.fresh(), ids, rows, 0, due)
        saved = snapshot.dump_row(state, 0, 0, due)
        last, options = self._recurrent.arguments(ids, self._recurrent.loaded([saved], due))
        logits, _ = probe.run(self._engine, last, **options)
        return logits


def _remember(memory: "OrderedDict[str, Any]", key: str, value: Any) -> None:
    memory[key] = value
    if len(memory) > PROFILES_MAX:
        memory.popitem(last=False)
