"""kvstored for kvpress 0.5: caches that a press made smaller are kept, rebuilt and continued.

    from kvstored_client.integrations.kvpress import PressedCache
    pressed = PressedCache(model, SnapKVPress(compression_ratio=0.5))
    answer = pressed.generate(context_ids, question_ids)     # the context is prefilled and pressed once, anywhere

A pressed cache holds fewer rows than tokens, in each layer its own number, and cannot be cut or extended like a plain
prefix: it is one entry under the hash of all its tokens, the model, the press and every parameter of it. Beside K and V
it holds what continuing needs: the position of the next token (the true length, or the number of rows where the press
rotated keys to new positions) and what head-wise presses (AdaKV, KVzip) only mark in the model's modules. It holds no
channels that are zeros (ThinK) and no rows that are marked: they come back as zeros.
Refused with ValueError: presses that go on in decoding, and those whose state or positions are not understood.
Not thread-safe, as the model is not. Trouble of the cache is a miss.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from kvstore.hit import Fidelity
from kvstore.keys import Identity, chunk_keys
from kvstore.lookup import Lookup
from kvstored_client.integrations.guard import guarded
from kvstored_client.integrations.prefill_time import PrefillTime
from kvstored_client.integrations.transformers import identity
from kvstored_client.integrations.transformers.state import NotCacheable, Watch

__all__ = ["Pressed", "PressedCache"]

logger = logging.getLogger(__name__)

Positions = Literal["kept", "compacted"]
"""What positions the keys have after the press: those of their tokens, or those of their rows."""
_DECODING = frozenset({"DecodingPress", "PrefillDecodingPress"})
"""These press while decoding: what they left after the prefill is not all of their state."""
_COMPACTED = frozenset({"KeyRerotationPress", "RestoreKVPress"})
_MARKS = "masked_key_indices"
"""Where head-wise presses mark keys as gone, on each attention module: (batch, head, row) indices."""


@dataclass
class Pressed:
    """A pressed prefix. cache: K and V by layer. position: that of the next token. restored: it was not computed."""

    cache: Any
    position: int
    restored: bool

    @property
    def rows(self) -> list[int]:
        """Rows held by each layer."""
        return [int(layer.keys.shape[2]) for layer in self.cache.layers]


class PressedCache:
    """One model's prefixes under one press.

    press: any of kvpress's that acts on the prefill. cache: a Client, an embedded Store, a Guard around one, an
    address, or None for the daemon at the default address. revision: your word for the weights, by default their
    fingerprint. fidelity: "exact", or "auto" to let K and V become NF4 below hot, on top of the press. positions: for a
    press that is not kvpress's own, whether it keeps the keys' positions. salt: keeps tenants apart.
    Raises ValueError for a press that is not understood.
    """

    def __init__(
        self,
        model: Any,
        press: Any,
        cache: Any = None,
        *,
        revision: str | None = None,
        fidelity: Fidelity = "exact",
        positions: Positions | None = None,
        salt: str = "",
    ) -> None:
        self.model = model
        self.press = press
        self.guard = guarded(cache)
        self._fidelity: Fidelity = fidelity
        self._positions = positions or _positions_of(press)
        # What `with press(model)` does first, here before both are fingerprinted: so a process that has pressed and one
        # that has not find the same keys.
        for module in self._modules():
            module.rotary_emb = self._body().rotary_emb
        press.post_init_from_model(model)
        self._state = _described(press)
        fields = f"kvpress/{_version()}/{salt}"
        layers = identity.text_config(model).num_hidden_layers
        heads, dim = identity.attention_shape(model)
        self._fields: dict[str, Any] = {
            "model": f"{type(model).__name__}/{fields}", "layers": layers, "kv_heads": heads, "head_dim": dim,
            "layout": "pressed-kept", "fidelity": fidelity,
        }  # fmt: skip
        self._time = PrefillTime()
        self._watch = Watch(model, revision, besides=frozenset({_MARKS}))
        try:
            self._watch.look()
        except NotCacheable as why:
            logger.warning("not cached as it is now: %s", why)

    def prefill(self, ids: torch.Tensor) -> Pressed:
        """The pressed cache of a context (1, tokens): restored where it is held, else computed and kept."""
        began, tokens = self._time.clock(), int(ids.shape[1])
        found = self.restore(ids)
        restored_at = self._time.clock()
        if found is not None:
            self.guard.report(prefill_saved_s=self._time.restored(1, tokens, tokens, restored_at - began))
            return found
        cache = DynamicCache()
        with torch.inference_mode(), self.press(self.model):
            self.model.model(input_ids=ids, past_key_values=cache)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize()
        self._time.observe(1, tokens, self._time.clock() - restored_at)
        rows = int(cache.layers[0].keys.shape[2])
        found = Pressed(cache, rows if self._positions == "compacted" else int(ids.shape[1]), restored=False)
        self._keep(ids, found)
        return found

    def restore(self, ids: torch.Tensor) -> Pressed | None:
        """The pressed cache of a context (1, tokens) where it is held; None on a miss. Marks the model's modules."""
        key = self._key(ids)
        tokens = int(ids.shape[1])
        hit = self.guard.get(key, lookup=Lookup(1, tokens, tokens)) if key is not None else None
        if hit is None:
            return None
        try:
            return self._rebuilt(hit.tensors)
        except Exception as error:  # noqa: BLE001 - the boundary: the engine only ever sees a miss
            logger.warning("restoring failed, recomputing: %s: %s", type(error).__name__, error)
            return None

    def generate(self, context: torch.Tensor, question: torch.Tensor, max_new_tokens: int = 50) -> torch.Tensor:
        """Greedy answer (tokens,) to a question (1, tokens) about a context (1, tokens), as kvpress's own."""
        past = self.prefill(context)
        # Layers of different lengths share one attention mask in transformers: only single tokens go through.
        step = question.shape[1] if len(set(past.rows)) == 1 else 1
        ends = self.model.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends])
        position, logits, answer = past.position, None, []
        with torch.inference_mode():
            for start in range(0, question.shape[1], step):
                logits, position = self._forward(past.cache, question[:, start : start + step], position)
            while logits is not None:
                token = logits[0, -1].argmax()
                answer.append(token)
                if len(answer) == max_new_tokens or int(token) in stop:
                    break
                logits, position = self._forward(past.cache, token.view(1, 1), position)
        return torch.stack(answer)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was kept so far is in the cache. False: it is not, after `timeout_s`."""
        return self.guard.flush(timeout_s)

    def _forward(self, cache: Any, ids: torch.Tensor, position: int) -> tuple[torch.Tensor, int]:
        end = position + ids.shape[1]
        positions = torch.arange(position, end, device=ids.device).unsqueeze(0)
        out = self.model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        return out.logits, end

    def _key(self, ids: torch.Tensor) -> bytes | None:
        """The key of a context for the model and the press as they are now; None for a model that is not understood."""
        if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise ValueError(f"a context is (1, tokens), as kvpress has it, got {tuple(ids.shape)}")
        fields = [self._state, _parameters(self.press), self._positions]
        press = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()
        try:
            state = self._watch.look()
        except NotCacheable as why:
            logger.warning("not cached as it is now: %s", why)
            return None
        dtype = str(self.model.dtype).removeprefix("torch.")
        root = hashlib.sha256(Identity(revision=state, dtype=dtype, **self._fields).digest() + press).digest()
        return chunk_keys(root, ids[0].tolist())[-1]

    def _keep(self, ids: torch.Tensor, found: Pressed) -> None:
        dim = int(found.cache.layers[0].keys.shape[-1])
        tensors = {"position": torch.tensor([found.position]), "dim": torch.tensor([dim])}
        for i, (layer, module) in enumerate(zip(found.cache.layers, self._modules(), strict=True)):
            marks = getattr(module, _MARKS, None)
            gone = None if marks is None else _marked(layer.keys, marks)
            for name, x in ((f"k.{i}", layer.keys), (f"v.{i}", layer.values)):
                # Copies: kvpress overwrites marked keys in place while it decodes.
                tensors.update(_compact(name, x.detach(), gone))
            if gone is not None:
                tensors[f"gone.{i}"] = gone.to("cpu")
        key = self._key(ids)
        if key is None:
            return
        nbytes = sum(x.numel() * x.element_size() for x in tensors.values())
        self.guard.later(lambda: self.guard.cache.put(key, tensors, fidelity=self._fidelity), nbytes)

    def _rebuilt(self, tensors: Any) -> Pressed:
        cache, device, modules = DynamicCache(), self.model.device, self._modules()
        for i in range(len(modules)):
            gone = tensors.get(f"gone.{i}")
            # Copies: see _keep. A view of the daemon's memory could not be written at all.
            k, v = (_expanded(f"{role}.{i}", tensors, gone).to(device, copy=True) for role in ("k", "v"))
            cache.update(k, v, i)
        for i, module in enumerate(modules):
            gone = tensors.get(f"gone.{i}")
            marks = None if gone is None else tuple(part.to(device) for part in gone[None].nonzero(as_tuple=True))
            setattr(module, _MARKS, marks)
        return Pressed(cache, int(tensors["position"][0]), restored=True)

    def _body(self) -> Any:
        return getattr(self.model.model, "language_model", self.model.model)

    def _modules(self) -> list[Any]:
        return [layer.self_attn for layer in self._body().layers]


def _marked(keys: torch.Tensor, marks: Any) -> torch.Tensor:
    """Which rows a head-wise press marked as gone, bool (heads, rows). Decoding never looks at what they held."""
    gone = torch.zeros(keys.shape[1:3], dtype=torch.bool, device=keys.device)
    gone[marks[1], marks[2]] = True
    return gone


def _compact(name: str, x: torch.Tensor, gone: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """K or V (1, heads, rows, dim) of a layer without what a press took away: marked rows, and channels of zeros.

    Returns under `name` what is kept: (1, heads, rows, channels), or (1, kept rows, channels), head by head, where rows
    are gone; and where channels are, `name`.channels, int16 (heads, channels), which they were.
    """
    bits = x[0].contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    some = bits != 0  # by bits: what is rebuilt is +0.0
    if gone is not None:
        some &= ~gone[..., None]
    used = some.any(dim=1)
    count = max(int(used.sum(dim=1).max()), 1)
    found = {}
    kept = x[0]
    if count < x.shape[-1]:
        channels = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        kept = kept.gather(2, channels[:, None].expand(-1, x.shape[2], -1))
        found[f"{name}.channels"] = channels.to("cpu", torch.int16)
    found[name] = (kept if gone is None else kept[~gone])[None].clone(memory_format=torch.contiguous_format)
    return found


def _expanded(name: str, tensors: Any, gone: torch.Tensor | None) -> torch.Tensor:
    """K or V (1, heads, rows, dim) as `_compact` found it, zeros where rows are gone. Raises where parts disagree."""
    kept: torch.Tensor = tensors[name][0]
    channels, dim = tensors.get(f"{name}.channels"), int(tensors["dim"][0])
    if gone is not None:
        rows = kept.new_zeros(*gone.shape, kept.shape[-1])
        rows[~gone] = kept
        kept = rows
    if channels is None:
        return kept[None]
    whole = kept.new_zeros(*kept.shape[:2], dim)
    return whole.scatter_(2, channels[:, None].expand(-1, kept.shape[1], -1).to(torch.int64), kept)[None]


def _version() -> str:
    try:
        return importlib.metadata.version("kvpress")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _names(press: Any) -> set[str]:
    return {kind.__name__ for kind in type(press).__mro__}


def _inner(press: Any) -> list[Any]:
    """The presses that a press is made of."""
    values = [y for x in vars(press).values() for y in (x if isinstance(x, list | tuple) else [x])]
    return [x for x in values if "BasePress" in _names(x)]


def _positions_of(press: Any) -> Positions:
    """What the press does to positions. Raises ValueError where that is unknown, or it goes on in decoding."""
    name = type(press).__name__
    if _names(press) & _DECODING or getattr(press, "decoding", False):
        raise ValueError(f"{name} presses while decoding: its cache after the prefill is not all of its state")
    if not type(press).__module__.startswith("kvpress."):
        raise ValueError(f"{name} is not one of kvpress's own: say positions='kept' or 'compacted'")
    if _names(press) & _COMPACTED or (name == "FinchPress" and press.rerotate_keys):
        return "compacted"
    inner = {_positions_of(each) for each in _inner(press)}
    return "compacted" if "compacted" in inner else "kept"


def _parameters(press: Any) -> Any:
    """What a caller may set on a press, now: its constructor's fields and those of the presses in it."""
    fields = {f.name for f in dataclasses.fields(press) if f.init} if dataclasses.is_dataclass(press) else set()
    found = {name: repr(x) for name, x in vars(press).items() if name in fields and not _is_press(x)}
    return [type(press).__qualname__, found, [_parameters(each) for each in _inner(press)]]


def _is_press(x: Any) -> bool:
    return any("BasePress" in _names(y) for y in (x if isinstance(x, list | tuple) else [x]))


def _described(x: Any) -> Any:
    """A press and everything in it as JSON, tensors as their hashes. Raises ValueError for what is not understood."""
    found: Any = x
    if isinstance(x, list | tuple):
        found = [_described(y) for y in x]
    elif isinstance(x, dict):
        found = {str(name): _described(y) for name, y in x.items()}
    elif isinstance(x, np.ndarray):
        found = _described(torch.from_numpy(np.ascontiguousarray(x)))
    elif isinstance(x, torch.Tensor):
        data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found = [str(x.dtype), list(x.shape), hashlib.sha256(data).hexdigest()]
    elif isinstance(x, torch.nn.Module):
        found = [type(x).__qualname__, {name: _described(y) for name, y in x.state_dict().items()}]
    elif "BasePress" in _names(x):
        found = [type(x).__module__, type(x).__qualname__, {name: _described(y) for name, y in vars(x).items()}]
    elif not (x is None or isinstance(x, bool | int | float | str)):
        raise ValueError(f"a press with a {type(x).__qualname__} in it is not understood: its cache cannot have a key")
    return found
