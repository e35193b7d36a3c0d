"""Models whose state has no tokens to cut at: made, advanced, saved and handed to `generate`, family by family."""

import inspect
from typing import Any

import torch
from transformers import DynamicCache

from kvstored_client.integrations.transformers import snapshot
from kvstored_client.integrations.transformers.identity import text_config
from kvstored_client.integrations.transformers.rows import Rows

BLIND = {"mamba": "cache_params", "rwkv": "state"}
"""Kinds whose generate takes the state under another name, and does not skip the tokens that it covers."""
_STEPWISE_TYPES = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma")
"""Models whose forward over several tokens starts from an empty state whatever it is given: stepped one by one."""
_STEP_COST = 8
"""A step costs about as much as 8 tokens of a prefill: beyond that a snapshot is not worth its steps."""


class Recurrent:
    """One model's state. kind: snapshot, mamba or rwkv, as `identity.kind_of` says."""

    def __init__(self, engine: Any, kind: str) -> None:
        self._engine = engine
        self.kind = kind
        self._signature = frozenset(inspect.signature(engine.forward).parameters)
        self._stepwise = text_config(engine).model_type in _STEPWISE_TYPES

    def fresh(self) -> Any:
        """The state before the first token."""
        return None if self.kind == "rwkv" else DynamicCache(config=text_config(self._engine))

    def loaded(self, rows: list[snapshot.Tensors], length: int) -> Any:
        """The state of these rows, which were saved at a padded position."""
        if self.kind == "rwkv":
            return [torch.cat([row[name] for row in rows]) for name in sorted(rows[0])]
        cache = self.fresh()
        snapshot.load_rows(cache, rows, length)
        return cache

    def is_worth(self, length: int, width: int) -> bool:
        """Whether going on from a snapshot at a padded position is cheaper than the whole prompt."""
        return not self._stepwise or (width - length) * _STEP_COST <= width

    def advance(self, state: Any, ids: torch.Tensor, rows: Rows, start: int, end: int) -> Any:
        """Run the model over padded positions start..end from a state (in place, RWKV's aside). Returns the state."""
        cuts = range(start, end) if self._stepwise and start else (start,)
        for at in cuts:
            stop = at + 1 if len(cuts) > 1 else end
            state = self._forward(state, ids, rows, at, stop)
        return state

    def arguments(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """The ids to give to generate, and the arguments that make it go on from a state before the last token."""
        if self.kind not in BLIND:
            return ids, {"past_key_values": state}
        # Only its last token: these families' generate does not look how far the state is.
        return ids[:, -1:], {BLIND[self.kind]: state, "attention_mask": torch.ones_like(ids[:, -1:])}

    def _forward(self, state: Any, ids: torch.Tensor, rows: Rows, start: int, end: int) -> Any:
        model, device = self._engine, self._engine.device
        piece, mask = ids[:, start:end].to(device), rows.mask(device)[:, :end]
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in self._signature:
            options["logits_to_keep"] = 1
        if self.kind == "rwkv":
            return model(piece, state=state, **options).state
        if self.kind == "mamba":
            padding = {} if start else {"attention_mask": mask}
            model(piece, cache_params=state, **padding, **options)
            return state
        if "position_ids" in self._signature:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        model(piece, attention_mask=mask, past_key_values=state, **options)
        return state


class WholePrompt:
    """A caller's streamer, given the whole prompt first where generate is given its last token only."""

    def __init__(self, streamer: Any, ids: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = ids

    def put(self, value: Any) -> None:
        """Pass on tokens; in place of the first ones, which are generate's prompt, the whole prompt."""
        prompt, self._prompt = self._prompt, None
        self._streamer.put(value if prompt is None else prompt.cpu())

    def end(self) -> None:
        """Pass on the end."""
        self._streamer.end()


def with_prompt(out: Any, ids: torch.Tensor) -> Any:
    """What generate returned for a prompt's last token, with the whole prompt before it."""
    if isinstance(out, torch.Tensor):
        return torch.cat([ids[:, :-1].to(out.device), out], dim=1)
    out.sequences = torch.cat([ids[:, :-1].to(out.sequences.device), out.sequences], dim=1)
    return out
