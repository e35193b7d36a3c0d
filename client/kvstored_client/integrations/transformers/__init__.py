"""kvstored for Hugging Face transformers: the longest cached prefix is restored, what was computed is kept.

    from kvstored_client.integrations.transformers import PrefixCache
    model.generate = PrefixCache(model).generate      # the one line

The answers are those of `model.generate`: same arguments, same result, same tokens while entries are exact. What this
module does not understand (beams, images, embeddings, a model that keeps state elsewhere) is passed on untouched, and
the log says why, once for each reason. An error of ours is never the caller's: before the model has answered, the call
goes to the model as it came; after that, the answer is returned.
Not thread-safe, as the model is not.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.keys import CHUNK_TOKENS
from kvstored_client.integrations.guard import guarded
from kvstored_client.integrations.prefill_time import PrefillTime
from kvstored_client.integrations.transformers import identity
from kvstored_client.integrations.transformers.attention import NOTHING, Restored
from kvstored_client.integrations.transformers.calls import (
    Call,
    NotUnderstood,
    check_last_token_only,
    end_tokens,
    read_call,
)
from kvstored_client.integrations.transformers.layer import ROOM_TOKENS
from kvstored_client.integrations.transformers.profile import Profile, Profiles, Terms
from kvstored_client.integrations.transformers.recurrent import BLIND, WholePrompt, with_prompt
from kvstored_client.integrations.transformers.rows import Rows, grown, read_rows
from kvstored_client.integrations.transformers.state import NotCacheable

__all__ = ["KvstoredCache", "PrefixCache", "Usage"]

logger = logging.getLogger(__name__)

_PASSES = 2
_REASONS_MAX = 100
"""Reasons remembered as logged. A reason may name a value of the caller's, of which there may be many."""


class KvstoredCache(DynamicCache):
    """A transformers cache that knows how much of it came from the store (`restored`, in padded positions)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.restored = 0
        self.state = ""


@dataclass
class Usage:
    """What the store did since the start: calls that used it, calls passed on, tokens of prompts and those restored.

    prefill_saved_s: seconds of prefill not computed, less what restoring took: measured, see `prefill_time`.
    """

    calls: int = 0
    passed_on: int = 0
    prompt_tokens: int = 0
    restored_tokens: int = 0
    prefill_saved_s: float = 0.0


@contextmanager
def passes_of(cache: Any) -> Iterator[list[float]]:
    """When the first two forward passes reach this cache's first layer: between them lies the prefill.

    By an attribute of this one object, for as long as the block: the caller gets a cache of the type that it would get.
    """
    began: list[float] = []
    update = cache.update

    def timed(key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        if layer_idx == 0 and len(began) < _PASSES:
            began.append(time.perf_counter())
        return update(key_states, value_states, layer_idx, *args, **options)

    cache.update = timed
    try:
        yield began
    finally:
        vars(cache).pop("update", None)


class PrefixCache:
    """One model's prefixes in a cache.

    cache: a Client, an embedded Store, a Guard around one, an address, or None for the daemon at the default address.
    revision: your word for the weights as they are now; by default their fingerprint. Adapters and later changes are
    told by their content either way. fidelity: "exact", or "auto" for 3.7 times as many tokens (float32: 7.4) in the
    same memory at nearly the same answers. keep_answers: keep what was generated, for the next turn of a chat. salt:
    keeps tenants apart. A copy of the model (deepcopy) uses the same cache; one that was pickled is a plain model.
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
        self.guard: Any = guarded(cache)
        self.usage = Usage()
        self._replaced = vars(model).get("generate")
        self._keep_answers = keep_answers
        self._terms = Terms(fidelity, salt, chunk_tokens)
        self._warned: set[str] = set()
        self._time = PrefillTime()
        self._profiles: Profiles | None = self._new_profiles(revision)

    def __repr__(self) -> str:
        return f"PrefixCache({type(self.model).__name__}, {self.usage!r}, in {self.guard!r})"

    def _new_profiles(self, revision: str | None) -> Profiles:
        try:
            return Profiles(self.model, self.guard, self._terms, revision)
        except NotCacheable:
            # Not as it is now, so the caller's word says nothing about the weights later.
            return Profiles(self.model, self.guard, self._terms, None)

    @property
    def kind(self) -> str:
        """How this model's cache is kept: attention, snapshot, mamba, rwkv, or unknown: not at all."""
        return identity.kind_of(identity.engine_of(self.model))[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefixCache":
        """The same cache for a copy of the model."""
        from copy import deepcopy

        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(vars(self) | {"_warned": set(), "usage": Usage(), "_profiles": None, "_time": PrefillTime()})
        vars(twin).update({name: deepcopy(getattr(self, name), memo) for name in ("model", "_replaced")})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: threads and connections cannot be pickled."""
        return vars(self) | {
            "guard": None, "_profiles": None, "_warned": set(), "usage": Usage(), "_time": PrefillTime(),
        }  # fmt: skip

    def generate(self, *args: Any, **options: Any) -> Any:
        """`model.generate`, from the longest cached prefix on. Takes and returns what that does."""
        found = self._understood(args, options)
        if found is None:
            self.usage.passed_on += 1
            return self._generate(*args, **options)
        call, profile = found
        self.usage.calls += 1
        self.usage.prompt_tokens += sum(len(tokens) for tokens in call.rows.tokens)
        if profile.attention is not None:
            began = time.perf_counter()
            room_tokens = min(ROOM_TOKENS, call.settings.max_new_tokens or ROOM_TOKENS)
            past, (restored, whole, _) = self._filled(profile, call.rows, DynamicCache, room_tokens)
            spent_s = time.perf_counter() - began
            with passes_of(past) as passes:
                out = self._generate(call.ids, **(call.options | {"past_key_values": past}))
            passes.append(time.perf_counter())
            if not (whole and past.get_seq_length() == call.rows.width):  # else there is nothing that is not held
                self._keep(profile, call, past, out)
            self._count_saved(call, passes, restored, spent_s)
            return out
        state = self._advanced(profile, call)
        if state is None:
            return self._generate(*args, **options)
        return self._from_snapshot(profile, call, state)

    def restore(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> KvstoredCache:
        """A cache with the longest prefix of these prompts that is held; empty on a miss. Full attention only.

        Hand it to `model.generate(ids, past_key_values=...)` or to the model, then to `commit`.
        """
        if self.kind not in ("attention", "unknown"):
            raise ValueError(f"restore is for models of full attention, {type(self.model).__name__} is {self.kind}")
        profile, rows = self._profile(), read_rows(ids, mask)
        if profile is None or profile.attention is None or rows is None or not self._allows(profile, rows):
            return KvstoredCache(config=identity.text_config(self.model))
        filled, found = self._filled(profile, rows, KvstoredCache)
        cache: KvstoredCache = filled
        cache.restored = found.length
        cache.state = profile.digest
        return cache

    def commit(self, cache: KvstoredCache, out: Any, mask: torch.Tensor | None = None) -> None:
        """Keep what a cache holds of these sequences (the ids, or what generate returned), on another thread.

        Keeps nothing where the model has changed since `restore`.
        """
        try:
            profile = self._profile()
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            rows = read_rows(sequences if mask is None else sequences[:, : mask.shape[1]], mask)
            if profile is None or profile.attention is None or rows is None or not self._allows(profile, rows):
                return
            if getattr(cache, "state", "") not in ("", profile.digest):
                self._warn_once("the model changed between restore and commit")
                return
            whole = grown(rows, sequences, self._ends(None)) if self._keep_answers else rows
            profile.attention.keep(rows, whole, cache, copy=True)
        except Exception as error:  # noqa: BLE001 - the boundary: the caller has computed, and hears of no error of ours
            self._warn_once(f"keeping failed: {type(error).__name__}: {error}")

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was kept so far is in the cache. False: it is not, after `timeout_s`."""
        return self.guard is None or bool(self.guard.flush(timeout_s))

    def _generate(self, *args: Any, **options: Any) -> Any:
        """The model's own generate, or what stood in its place before."""
        own = self._replaced if self._replaced is not None else type(self.model).generate.__get__(self.model)
        return own(*args, **options)

    def _understood(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Call, Profile] | None:
        """The call and the model's state, where both are understood; else None, and the log says why."""
        if self.guard is None:
            self._warn_once("this model was pickled: make a new PrefixCache for it")
            return None
        try:
            engine = identity.engine_of(self.model)
            if engine is not self.model and "generation_config" in vars(self.model):
                engine.generation_config = self.model.generation_config  # as PEFT's generate does
            call = read_call(engine, args, options)
            profile = self._profile()
            if profile is None or not self._allows(profile, call.rows):
                return None
            if profile.kind in BLIND:
                check_last_token_only(call)
        except NotUnderstood as why:
            self._warn_once(str(why))
        except Exception as error:  # noqa: BLE001 - the boundary: what we cannot make out, the model gets as it came
            self._warn_once(f"the call was not made out: {type(error).__name__}: {error}")
        else:
            return call, profile
        return None

    def _profile(self) -> Profile | None:
        """What is known of the model as it is now; None where it cannot be cached, and the log says why."""
        try:
            if self._profiles is None:  # a copy of the model: its weights are the copy's own
                self._profiles = self._new_profiles(None)
            return self._profiles.now()
        except NotCacheable as why:
            self._warn_once(f"{type(self.model).__name__}: {why}")
        except Exception as error:  # noqa: BLE001 - the boundary: a model that cannot be examined is not cached
            self._warn_once(f"{type(self.model).__name__} was not made out: {type(error).__name__}: {error}")
        return None

    def _allows(self, profile: Profile, rows: Rows) -> bool:
        """Whether a batch of this form is cached for this model."""
        if any(rows.pads) and not profile.padded:
            self._warn_once(f"{type(self.model).__name__} counts padding: only prompts without it are cached")
            return False
        if profile.kind == "rwkv" and len(rows.pads) > 1:
            self._warn_once("RWKV's step over one token mixes the rows of a batch")
            return False
        return True

    def _filled(
        self, profile: Profile, rows: Rows, cache_class: Any, room_tokens: int = ROOM_TOKENS
    ) -> tuple[Any, Restored]:
        """A cache with the longest prefix that is held, and how much that is."""
        restored = NOTHING
        try:
            assert profile.attention is not None
            restored = profile.attention.restore(rows, self.model.device, room_tokens)
        except Exception as error:  # noqa: BLE001 - the boundary: the engine only ever sees a miss
            self._warn_once(f"restoring failed, recomputing: {type(error).__name__}: {error}")
        if restored.length:
            cache = cache_class()  # a configuration would make layers of its own, of which none stays
            cache.layers = restored.layers
        else:
            cache = cache_class(config=identity.text_config(self.model))
        self.usage.restored_tokens += sum(rows.own(i, restored.length) for i in range(len(rows.pads)))
        return cache, restored

    def _count_saved(self, call: Call, passes: list[float], restored: int, spent_s: float) -> None:
        """Measure this call's prefill, or report what was saved of it. passes: when each began, and the end."""
        try:
            rows, width = call.ids.shape
            if not restored:
                if len(passes) > 1:
                    self._time.observe(rows, width, passes[1] - passes[0])
                return

            def prefill(tokens: int) -> None:
                engine = identity.engine_of(self.model)
                with torch.no_grad():
                    engine(call.ids[:, :tokens], past_key_values=DynamicCache(config=identity.text_config(self.model)))
                if call.ids.device.type != "cpu":
                    torch.accelerator.synchronize()

            may = None if self.model.training else prefill  # in training a pass may change more than its cache
            saved_s = self._time.restored(rows, width, restored, spent_s, may)
            self.usage.prefill_saved_s += saved_s
            self.guard.report(prefill_saved_s=saved_s)
        except Exception as error:  # noqa: BLE001 - the boundary: the answer is there and is returned
            self._warn_once(f"the prefill was not timed: {type(error).__name__}: {error}")

    def _keep(self, profile: Profile, call: Call, past: Any, out: Any) -> None:
        """Keep a prompt and its answer."""
        try:
            if profile.attention is not None and self._unmoved(profile):
                copy = not isinstance(out, torch.Tensor)
                profile.attention.keep(call.rows, self._with_answer(call, out), past, copy=copy)
        except Exception as error:  # noqa: BLE001 - the boundary: the answer is there and is returned
            self._warn_once(f"keeping failed: {type(error).__name__}: {error}")

    def _unmoved(self, profile: Profile) -> bool:
        assert self._profiles is not None
        if self._profiles.still(profile):
            return True
        self._warn_once(f"{type(self.model).__name__} changed while it answered: nothing was kept")
        return False

    def _with_answer(self, call: Call, out: Any) -> Rows:
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        return grown(call.rows, sequences, self._ends(call.settings)) if self._keep_answers else call.rows

    def _ends(self, settings: Any) -> frozenset[int]:
        settings = settings if settings is not None else self.model.generation_config
        return end_tokens(settings.eos_token_id)

    @torch.no_grad()
    def _advanced(self, profile: Profile, call: Call) -> Any:
        """A state before the prompt's last token, from the latest snapshot on; None where that fails.

        RWKV has no state before its first token: a prompt of one token is passed on.
        """
        try:
            assert profile.recurrent is not None
            assert profile.snapshots is not None
            began = time.perf_counter()
            state, at = self._restored(profile, call.rows)
            due, restored_at = call.rows.width - 1, time.perf_counter()
            if at < due:
                state = profile.recurrent.advance(state, call.ids, call.rows, at, due)
                if not at:
                    self._time.observe(len(call.rows.pads), due, time.perf_counter() - restored_at)
                if self._unmoved(profile):
                    profile.snapshots.keep(call.rows, due, state)
        except Exception as error:  # noqa: BLE001 - the boundary: the model computes it all
            self._warn_once(f"{type(self.model).__name__} was not advanced: {type(error).__name__}: {error}")
            return None
        self.usage.restored_tokens += sum(call.rows.own(i, at) for i in range(len(call.rows.pads)))
        saved_s = self._time.restored(len(call.rows.pads), due, at, restored_at - began)
        self.usage.prefill_saved_s += saved_s
        self.guard.report(prefill_saved_s=saved_s)
        return state

    def _restored(self, profile: Profile, rows: Rows) -> tuple[Any, int]:
        assert profile.recurrent is not None
        assert profile.snapshots is not None
        try:
            found = profile.snapshots.find(rows, self.model.device)
            if found is not None and profile.recurrent.is_worth(found.length, rows.width):
                return profile.recurrent.loaded(found.rows, found.length), found.length
        except Exception as error:  # noqa: BLE001 - the boundary: the engine only ever sees a miss
            self._warn_once(f"restoring failed, recomputing: {type(error).__name__}: {error}")
        return profile.recurrent.fresh(), 0

    def _from_snapshot(self, profile: Profile, call: Call, state: Any) -> Any:
        assert profile.recurrent is not None
        ids, arguments = profile.recurrent.arguments(call.ids, state)
        options = {**call.options, **arguments}
        if profile.kind in BLIND:
            if options.get("streamer") is not None:
                options["streamer"] = WholePrompt(options["streamer"], call.ids)
            return with_prompt(self._generate(ids, **options), call.ids)
        out = self._generate(ids, **options)
        self._keep_snapshot(profile, call, state, out)
        return out

    def _keep_snapshot(self, profile: Profile, call: Call, state: Any, out: Any) -> None:
        try:
            if self._keep_answers and profile.snapshots is not None and self._unmoved(profile):
                sequences = out if isinstance(out, torch.Tensor) else out.sequences
                # Rows that ended early went on with padding in the state: only full ones are kept (see `keep`).
                whole = grown(call.rows, sequences, self._ends(call.settings))
                profile.snapshots.keep(whole, int(sequences.shape[1]) - 1, state)
        except Exception as error:  # noqa: BLE001 - the boundary: the answer is there and is returned
            self._warn_once(f"keeping failed: {type(error).__name__}: {error}")

    def _warn_once(self, why: str) -> None:
        """One line in the log for each reason."""
        if why not in self._warned and len(self._warned) < _REASONS_MAX:
            self._warned.add(why)
            logger.warning("passed on to the model, or not kept: %s", why)
