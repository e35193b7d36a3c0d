"""kvstored for Hugging Face transformers: the longest cached prefix is restored, what was computed is kept.

    from kvstored_client.integrations.transformers import PrefixCache
    model.generate = PrefixCache(model).generate      # the one line

The answers are those of `model.generate`: same arguments, same result, same tokens while entries are exact. What this
module does not understand (beams, images, embeddings, an unknown kind of cache layer) is passed on untouched.
Not thread-safe, as the model is not.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.keys import CHUNK_TOKENS
from kvstored_client.integrations.guard import guarded
from kvstored_client.integrations.transformers import identity, snapshot
from kvstored_client.integrations.transformers.attention import Attention
from kvstored_client.integrations.transformers.rows import Rows, grown, read_rows
from kvstored_client.integrations.transformers.snapshot import Snapshots

__all__ = ["KvstoredCache", "PrefixCache", "Usage"]

logger = logging.getLogger(__name__)

_STEPWISE_TYPES = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma")
"""Models whose forward over several tokens starts from an empty state whatever it is given: stepped one by one."""
_STEP_COST = 8
"""A step costs about as much as 8 tokens of a prefill: beyond that a snapshot is not worth its steps."""
_ONE_LINE_EACH = ("num_beams", "num_return_sequences", "num_beam_groups")
_ELSEWHERE = ("assistant_model", "prompt_lookup_num_tokens", "past_key_values", "cache_params", "state", "streamer")
"""Arguments with which the caller has a cache or a way of decoding of his own. A streamer is given the prompt first."""
_BLIND = {"mamba": "cache_params", "rwkv": "state"}
"""Kinds whose generate takes the state under another name, and does not skip the tokens that it covers."""
_PROMPT_PROCESSORS = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Settings that look at the prompt's tokens, which a model that is only given its last token does not show them."""


class KvstoredCache(DynamicCache):
    """A transformers cache that knows how much of it came from the store (`restored`, in padded positions)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.restored = 0


@dataclass
class Usage:
    """What the store did since the start: calls that used it, calls passed on, tokens of prompts and those restored."""

    calls: int = 0
    passed_on: int = 0
    prompt_tokens: int = 0
    restored_tokens: int = 0


class PrefixCache:
    """One model's prefixes in a cache.

    cache: a Client, an embedded Store, a Guard around one, an address, or None for the daemon at the default address.
    revision: your word for the weights; by default their fingerprint, computed once. fidelity: "exact", or "auto" for
    7.5 times as many tokens in the same memory at nearly the same answers. keep_answers: keep what was generated, for
    the next turn of a chat. salt: keeps tenants apart.
    """

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        *,
        revision: str | None = None,
        fidelity: str = "exact",
        chunk_tokens: int = CHUNK_TOKENS,
        keep_answers: bool = True,
        salt: str = "",
    ) -> None:
        self.model = model
        self.guard = guarded(cache)
        self.usage = Usage()
        self.kind = _kind(model)
        self._generate = model.generate
        self._keep_answers = keep_answers
        self._adapters = identity.adapters(model)
        if self.kind == "rwkv" and not model.training:
            # RWKV scales its weights in place at its first inference: the fingerprint is of what inference uses.
            with torch.inference_mode():
                model(torch.zeros((1, 1), dtype=torch.long, device=model.device))
        self._signature = frozenset(inspect.signature(model.forward).parameters)
        fields = self._fields(identity.revision(model, revision), fidelity, salt)
        if self.kind == "attention":
            self._attention = Attention(self.guard, fields, chunk_tokens)
        elif self.kind != "unknown":
            self._snapshots = Snapshots(self.guard, fields, chunk_tokens)

    def _fields(self, revision: str, fidelity: str, salt: str) -> dict[str, Any]:
        model = self.model
        layers = getattr(identity.text_config(model), "num_hidden_layers", 1)
        kv_heads, head_dim = identity.attention_shape(model) if self.kind == "attention" else (1, 1)
        return {
            "model": f"{type(model).__name__}/{salt}",
            "revision": revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": int(layers),
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "layout": "lthd" if self.kind == "attention" else "snapshot",
            "fidelity": fidelity,
        }

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """`model.generate`, from the longest cached prefix on. Takes and returns what that does."""
        ids: Any = options.get("input_ids") if inputs is None else inputs
        rows = self._rows(ids, options)
        if rows is None:
            self.usage.passed_on += 1
            return self._generate(inputs, **options)
        self.usage.calls += 1
        self.usage.prompt_tokens += sum(len(tokens) for tokens in rows.tokens)
        options = {name: value for name, value in options.items() if name != "input_ids"}
        with torch.inference_mode():
            if self.kind == "attention":
                past = self.restore(ids, rows=rows)
                out = self._generate(ids, past_key_values=past, **options)
                self.commit(past, out, rows=rows)
                return out
            return self._from_snapshot(ids, rows, options)

    def restore(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, rows: Rows | None = None
    ) -> KvstoredCache:
        """A cache with the longest prefix of these prompts that is held; empty on a miss. Full attention only.

        Hand it to `model.generate(ids, past_key_values=...)` or to the model, then to `commit`.
        """
        if self.kind != "attention":
            raise ValueError(f"restore is for models of full attention, {type(self.model).__name__} is {self.kind}")
        cache = KvstoredCache(config=self.model.config)
        rows = rows or read_rows(ids, mask, None)
        if rows is None:
            return cache
        try:
            cache.restored = self._attention.restore(rows, cache, self.model.device)
        except Exception as error:  # noqa: BLE001 - the boundary: the engine only ever sees a miss
            logger.warning("restoring failed, recomputing: %s: %s", type(error).__name__, error)
            cache = KvstoredCache(config=self.model.config)
        self.usage.restored_tokens += sum(rows.own(i, cache.restored) for i in range(len(rows.pads)))
        return cache

    def commit(
        self, cache: KvstoredCache, out: Any, mask: torch.Tensor | None = None, *, rows: Rows | None = None
    ) -> None:
        """Keep what a cache holds of these sequences (the ids, or what generate returned), on another thread."""
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        rows = rows or read_rows(sequences if mask is None else sequences[:, : mask.shape[1]], mask, None)
        if rows is None:
            return
        whole = grown(rows, sequences, self._ends()) if self._keep_answers else rows
        self._attention.keep(rows, whole, cache)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was kept so far is in the cache. False: it is not, after `timeout_s`."""
        return self.guard.flush(timeout_s)

    def _rows(self, ids: Any, options: dict[str, Any]) -> Rows | None:
        """The prompts, where this call is one that is understood; else None."""
        config = options.get("generation_config") or self.model.generation_config

        def setting(name: str) -> Any:
            return options.get(name, getattr(config, name, None))

        others = [name for name, x in options.items() if isinstance(x, torch.Tensor)]
        if (
            self.kind == "unknown"
            or self.model.training
            or self._adapters != identity.adapters(self.model)
            or any(name not in ("input_ids", "attention_mask") for name in others)
            or any(options.get(name) is not None for name in _ELSEWHERE)
            or any((setting(name) or 1) > 1 for name in _ONE_LINE_EACH)
            or setting("use_cache") is False
            or setting("cache_implementation") is not None
        ):
            return None
        if self.kind in _BLIND and any((setting(k) or off) != off for k, off in _PROMPT_PROCESSORS.items()):
            return None
        rows = read_rows(ids, options.get("attention_mask"), setting("pad_token_id"))
        if self.kind == "rwkv" and rows is not None and (len(rows.pads) > 1 or any(rows.pads)):
            return None  # its one-token step mixes the rows of a batch, and it knows no mask for padding
        return rows

    def _ends(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])

    def _from_snapshot(self, ids: torch.Tensor, rows: Rows, options: dict[str, Any]) -> Any:
        state, at = self._restored(rows)
        self.usage.restored_tokens += sum(rows.own(i, at) for i in range(len(rows.pads)))
        due = rows.width - 1
        if at < due:
            state = self._advance(state, ids, rows, at, due)
            self._snapshots.keep(rows, due, state)
        if self.kind in _BLIND:
            # Only its last token: these families' generate does not look how far the state is.
            options = _absolute_lengths(options, rows.width)
            options["attention_mask"] = torch.ones_like(ids[:, -1:])
            return _with_prompt(self._generate(ids[:, -1:], **{_BLIND[self.kind]: state}, **options), ids)
        out = self._generate(ids, past_key_values=state, **options)
        if self._keep_answers:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            whole = grown(rows, sequences, self._ends())
            # Rows that ended early went on with padding in the state: only full ones are kept (see `keep`).
            self._snapshots.keep(whole, int(sequences.shape[1]) - 1, state)
        return out

    def _fresh(self) -> Any:
        return None if self.kind == "rwkv" else KvstoredCache(config=self.model.config)

    def _restored(self, rows: Rows) -> tuple[Any, int]:
        try:
            found = self._snapshots.find(rows, self.model.device)
            if found is None or (self._stepwise and (rows.width - found.length) * _STEP_COST > rows.width):
                return self._fresh(), 0
            if self.kind == "rwkv":
                names = sorted(found.rows[0])
                return [torch.cat([row[name] for row in found.rows]) for name in names], found.length
            cache = self._fresh()
            snapshot.load_rows(cache, found.rows, found.length)
            cache.restored = found.length
        except Exception as error:  # noqa: BLE001 - the boundary: the engine only ever sees a miss
            logger.warning("restoring failed, recomputing: %s: %s", type(error).__name__, error)
            return self._fresh(), 0
        return cache, found.length

    @property
    def _stepwise(self) -> bool:
        return identity.text_config(self.model).model_type in _STEPWISE_TYPES

    def _advance(self, state: Any, ids: torch.Tensor, rows: Rows, start: int, end: int) -> Any:
        """Run the model over padded positions start..end from a state (in place, RWKV's aside). Returns the state."""
        cuts = range(start, end) if self._stepwise and start else (start,)
        for at in cuts:
            stop = at + 1 if len(cuts) > 1 else end
            state = self._forward(state, ids, rows, at, stop)
        return state

    def _forward(self, state: Any, ids: torch.Tensor, rows: Rows, start: int, end: int) -> Any:
        piece, mask = ids[:, start:end], rows.mask(ids.device)[:, :end]
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in self._signature:
            options["logits_to_keep"] = 1
        if self.kind == "rwkv":
            return self.model(piece, state=state, **options).state
        if self.kind == "mamba":
            padding = {} if start else {"attention_mask": mask}
            self.model(piece, cache_params=state, **padding, **options)
            return state
        if "position_ids" in self._signature:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        self.model(piece, attention_mask=mask, past_key_values=state, **options)
        return state


def _kind(model: Any) -> str:
    """How this model's cache is kept: attention, snapshot, mamba, rwkv, or unknown: not at all."""
    name = type(model).__name__.lower()
    if "rwkv" in name:
        return "rwkv"
    if getattr(model.config, "is_encoder_decoder", False) or identity.rope_depends_on_length(model):
        return "unknown"
    try:
        layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    except Exception as error:  # noqa: BLE001 - a configuration transformers itself makes no cache of
        logger.info("no cache for this model: %s", error)
        return "unknown"
    if layers == {"DynamicLayer"} and hasattr(identity.text_config(model), "num_attention_heads"):
        return "attention"
    if not layers or not layers <= snapshot.KNOWN:
        return "unknown"
    return "mamba" if "mamba" in name else "snapshot"  # transformers' own rule for the argument's name


def _absolute_lengths(options: dict[str, Any], width: int) -> dict[str, Any]:
    """Lengths of the whole sequence, for a call that is only given its last token."""
    moved = dict(options)
    for name in ("max_length", "min_length"):
        if moved.get(name) is not None:
            moved[name] = max(1, moved[name] - width + 1)
    return moved


def _with_prompt(out: Any, ids: torch.Tensor) -> Any:
    """The sequences with the whole prompt before them."""
    if isinstance(out, torch.Tensor):
        return torch.cat([ids[:, :-1], out], dim=1)
    out.sequences = torch.cat([ids[:, :-1], out.sequences], dim=1)
    return out
