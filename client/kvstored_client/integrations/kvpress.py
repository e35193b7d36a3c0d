"""kvstored for kvpress 0.5: caches that a press made smaller are kept, rebuilt and continued.

    from kvstored_client.integrations.kvpress import PressedCache
    pressed = PressedCache(model, SnapKVPress(compression_ratio=0.5))
    answer = pressed.generate(context_ids, question_ids)     # the context is prefilled and pressed once, anywhere

A pressed cache holds fewer rows than tokens, in each layer its own number, and cannot be cut or extended like a plain
prefix: it is one entry under the hash of all its tokens, the model, the press and every parameter of it. Beside K and V
it holds what continuing needs: the position of the next token (the true length, or the number of rows where the press
rotated keys to new positions) and what head-wise presses (AdaKV, KVzip) only mark in the model's modules.
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
from kvstored_client.integrations.guard import guarded
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
            "layout": "pressed", "fidelity": fidelity,
        }  # fmt: skip
        self._watch = Watch(model, revision, besides=frozenset({_MARKS}))
        try:
            self._watch.look()
        except NotCacheable as why:
            logger.warning("not cached as it is now: %s", why)

    def prefill(self, ids: torch.Tensor) -> Pressed:
        """The pressed cache of a context (1, tokens): restored where it is held, else computed and kept."""
        found = self.restore(ids)
        if found is not None:
            return found
        cache = DynamicCache()
        with torch.inference_mode(), self.press(self.model):
            self.model.model(input_ids=ids, past_key_values=cache)
        rows = int(cache.layers[0].keys.shape[2])
        found = Pressed(cache, rows if self._positions == "compacted" else int(ids.shape[1]), restored=False)
        self._keep(ids, found)
        return found

    def restore(self, ids: torch.Tensor) -> Pressed | None:
        """The pressed cache of a context (1, tokens) where it is held; None on a miss. Marks the model's modules."""
        key = self._key(ids)
        hit = self.guard.get(key) if key is not None else None
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
        tensors = {"position": torch.tensor([found.position], dtype=torch.int64)}
        for i, (layer, module) in enumerate(zip(found.cache.layers, self._modules(), strict=True)):
            # Copies: kvpress overwrites marked keys in place while it decodes.
            tensors[f"k.{i}"], tensors[f"v.{i}"] = layer.keys.detach().clone(), layer.values.detach().clone()
            marks = getattr(module, _MARKS, None)
            if marks is not None:
                tensors[f"marks.{i}"] = torch.stack([x.to("cpu") for x in marks])
        key = self._key(ids)
        if key is None:
            return
        nbytes = sum(x.numel() * x.element_size() for x in tensors.values())
        self.guard.later(lambda: self.guard.cache.put(key, tensors, fidelity=self._fidelity), nbytes)

    def _rebuilt(self, tensors: Any) -> Pressed:
        cache, device, modules = DynamicCache(), self.model.device, self._modules()
        layers = [(tensors[f"k.{i}"], tensors[f"v.{i}"]) for i in range(len(modules))]
        for i, (k, v) in enumerate(layers):
            # Copies: see _keep. A view of the daemon's memory could not be written at all.
            cache.update(k.to(device, copy=True), v.to(device, copy=True), i)
        for i, module in enumerate(modules):
            marks = tensors.get(f"marks.{i}")
            setattr(module, _MARKS, None if marks is None else tuple(marks.to(device, copy=True)))
        return Pressed(cache, int(tensors["position"][0]), restored=True)

    def _body(self) -> Any:
        return getattr(self.model.model, "language_model", self.model.model)

    def _modules(self) -> list[Any]:
        return [layer.self_attn for layer in self._body().layers]


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
