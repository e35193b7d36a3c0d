"""What a call of `generate` asks for: arguments by name, settings as transformers itself merges them.

The same setting comes as a keyword, in a GenerationConfig, by position, or in `model.generation_config`; transformers
is asked for the outcome, so all routes mean the same here. Fails closed: an argument or a setting that is not listed
below must be off, or the call is passed on. Changes nothing of the caller's.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from kvstored_client.integrations.transformers.rows import Rows, read_rows

_NAMES = tuple(
    name
    for name, parameter in inspect.signature(GenerationMixin.generate).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
)
"""Arguments of `generate` in their order; all others are settings or go to the model's forward."""

_ARGUMENTS = frozenset({
    "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
})  # fmt: skip
"""Arguments that may have any value: they see the same ids and the same last logits with a filled cache."""

_BESIDE = frozenset({"tokenizer", "assistant_tokenizer"})
"""Keywords that `generate` takes out before it merges the settings."""

_TO_FORWARD = frozenset({"input_ids", "attention_mask", "output_attentions", "output_hidden_states"})
"""What may be left for the model's forward. The two outputs are judged as settings."""

_LENGTHS_AND_SAMPLING = frozenset({
    "max_new_tokens", "max_time", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values", "suppress_tokens",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
})  # fmt: skip
"""Settings that look at the last logits and at new tokens only."""

_INERT = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "decoder_start_token_id", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "disable_compile", "compile_config",
    "continuous_batching_config", "max_cache_len", "cache_config", "transformers_version",
})  # fmt: skip
"""Settings of modes that are passed on (beams, assistants, static caches): without their mode they do nothing."""

_OF_THE_PROMPT = frozenset({
    "max_length", "min_length", "min_new_tokens", "stop_strings", "repetition_penalty", "encoder_repetition_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens", "sequence_bias",
    "watermarking_config",
})  # fmt: skip
"""Settings that look at the prompt's tokens or count them: understood where `generate` is given the whole prompt."""

_LAST_TOKEN_ONLY = _LENGTHS_AND_SAMPLING | _INERT
_UNDERSTOOD = _LAST_TOKEN_ONLY | _OF_THE_PROMPT
_DEFAULTS: dict[str, Any] = getattr(GenerationConfig(), "_get_default_generation_params", dict)()
_FIELDS = frozenset(vars(GenerationConfig()))
_MODES = ("greedy_search", "sample")


class NotUnderstood(Exception):
    """This call is passed on; the message says why."""


@dataclass(frozen=True)
class Call:
    """A call that is understood. ids: (batch, width). options: all other arguments by name, as the caller gave them."""

    ids: torch.Tensor
    rows: Rows
    options: dict[str, Any]
    settings: Any


def read_call(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Call:
    """The call that these arguments make on a transformers model. Raises NotUnderstood."""
    given = by_name(args, options)
    named = {name: given[name] for name in _NAMES if given.get(name) is not None}
    for name, value in named.items():
        if name not in _ARGUMENTS and value is not False:
            raise NotUnderstood(f"the argument {name} is set")
    keywords = {k: v for k, v in given.items() if k not in _NAMES and k not in _BESIDE}
    settings, rest = model._prepare_generation_config(named.get("generation_config"), **keywords)  # noqa: SLF001 - the only place where transformers says what a call comes to
    _check_settings(settings, _UNDERSTOOD)
    for name, value in rest.items():
        if value is not None and name not in _TO_FORWARD:
            raise NotUnderstood(f"the argument {name} is set")
    ids = _ids(named, rest)
    rows = read_rows(ids, rest.get("attention_mask"))
    if rows is None:
        raise NotUnderstood("the prompt is not a batch of token ids with padding on the left only")
    if rest.get("attention_mask") is None and _mask_is_guessed(ids, settings):
        raise NotUnderstood("there is padding and no attention_mask")
    passed = {name: value for name, value in given.items() if name not in ("inputs", "input_ids")}
    return Call(ids, rows, passed, settings)


def by_name(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name. Raises NotUnderstood for what is no call of `generate`."""
    if len(args) > len(_NAMES) or any(name in options for name in _NAMES[: len(args)]):
        raise NotUnderstood("an argument is given twice, or there are too many")
    return {**dict(zip(_NAMES, args, strict=False)), **options}


def _ids(named: dict[str, Any], rest: dict[str, Any]) -> Any:
    found = [x for x in (named.get("inputs"), rest.get("input_ids")) if x is not None]
    if len(found) != 1:
        raise NotUnderstood("there are no token ids, or they are given twice")
    return found[0]


def _check_settings(settings: Any, understood: frozenset[str]) -> None:
    """Every setting that this version of transformers has is understood, or off."""
    for name, value in vars(settings).items():
        if name in understood or name not in _FIELDS or name.startswith("_"):
            continue
        off = value is None or value is False or (name in _DEFAULTS and value == _DEFAULTS[name])
        if not off and not (name == "use_cache" and value is True):
            raise NotUnderstood(f"the setting {name} is {_short(value)}")
    if settings.use_cache is False:
        raise NotUnderstood("the setting use_cache is False")
    mode = str(getattr(settings.get_generation_mode(None), "value", settings.get_generation_mode(None)))
    if mode not in _MODES:
        raise NotUnderstood(f"the decoding mode is {mode}")


def check_last_token_only(call: Call) -> None:
    """Raises NotUnderstood for what looks at the prompt: this kind of model's `generate` is given its last token."""
    _check_settings(call.settings, _LAST_TOKEN_ONLY)
    for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"):
        if call.options.get(name):
            raise NotUnderstood(f"{name} sees the prompt, of which this kind of model is given the last token")
    if call.settings.max_new_tokens is None:
        raise NotUnderstood("max_new_tokens is not set, and this kind of model is given the last token only")


def _mask_is_guessed(ids: torch.Tensor, settings: Any) -> bool:
    """Whether transformers would make a mask from padding ids: there are some, and they do not end a sequence."""
    pad, ends = settings.pad_token_id, settings.eos_token_id
    if pad is None:
        return False  # then the first end of sequence serves, which never counts as padding
    pad = int(pad) if not isinstance(pad, torch.Tensor) else int(pad.flatten()[0])
    return pad not in end_tokens(ends) and bool((ids == pad).any())


def end_tokens(ends: Any) -> frozenset[int]:
    """The tokens that end a sequence: None, one, a list or a tensor of them."""
    if ends is None:
        return frozenset()
    return frozenset(int(x) for x in torch.as_tensor(ends).flatten().tolist())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
