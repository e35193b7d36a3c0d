"""What a codec does to transcripts: bench/fidelity.py --model whisper-base --speech FILE.wav ...

Two caches are judged apart: K and V of the encoder's 1,500 frames, which cross attention reads, in chunks of 256; and
those of the first 12 tokens of the transcript, one short chunk. The transcript is the model's own, teacher-forced; KL
is the mean over its tokens (behind the prefix). Recordings are WAV, 16 bits, 16 kHz, one channel; the figures in
bench/RESULTS.md are of Debian's pocketsphinx-testdata (LibriVox). Weights: `models.py`.
"""

import math
import struct
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import torch
from fidelity_others import Coded

RATE = 16000
LAYERS, HEADS, WIDTH = 6, 8, 512
PROMPT = (50258, 50259, 50359, 50363)
"""Start of a transcript, English, transcribe, no time stamps."""
END = 50257
TOKENS_MAX = 64
SHORT = 12
"""Tokens of the short prefix."""
_NAMES = {
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "encoder/conv1/": "model.encoder.conv1.",
    "encoder/conv2/": "model.encoder.conv2.",
    "decoder/layer_norm/": "model.decoder.layer_norm.",
    "encoder/layer_norm/": "model.encoder.layer_norm.",
}


class Whisper:
    """Whisper base in float32, from a file of CTranslate2's (version 6), read as data."""

    def __init__(self, name: str) -> None:
        from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

        self.name = name
        config = WhisperConfig(
            vocab_size=51865, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
            encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        )  # fmt: skip
        self._model: Any = WhisperForConditionalGeneration(config).eval()
        found = dict(_renamed(_tensors(models.path_of(name).read_bytes())))
        found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
        missing, unknown = self._model.load_state_dict(found, strict=False)
        if unknown or any(not name.endswith("k_proj.bias") for name in missing):
            raise SystemExit(f"{name}: not the weights of Whisper base: {missing[:3]}, {unknown[:3]}")
        self._features: Any = WhisperFeatureExtractor(feature_size=80)

    def heard(self, path: Path) -> torch.Tensor:
        """What the encoder makes of a recording: (1, 1500, 512)."""
        with wave.open(str(path)) as sound:
            if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (RATE, 1, 2):
                raise SystemExit(f"{path} is no WAV of 16 bits, {RATE} Hz and one channel")
            data = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16).float() / 32768
        features = self._features(data.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
        found: torch.Tensor = self._model.model.encoder(features).last_hidden_state
        return found

    def transcript(self, heard: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens one by one, the prompt before them: int64 (1, n)."""
        ids = list(PROMPT)
        while len(ids) < TOKENS_MAX and ids[-1] != END:
            ids.append(int(self.answers(heard, torch.tensor([ids]))[-1].argmax()))
        return torch.tensor([ids])

    def caches(self, heard: torch.Tensor, ids: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """K and V of the frames, and of the tokens: each (layers, tokens, heads, dim)."""
        cache = _cache()
        self._model.model.decoder(ids, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
        return _both(cache.cross_attention_cache), _both(cache.self_attention_cache)

    def answers(
        self,
        heard: torch.Tensor,
        ids: torch.Tensor,
        frames: tuple[torch.Tensor, torch.Tensor] | None = None,
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Log probabilities behind each token. frames, before: K and V of the frames, and of tokens before these."""
        cache = _cache()
        for layer in range(LAYERS):
            if frames is not None:
                cache.cross_attention_cache.update(*(x[layer].transpose(0, 1)[None] for x in frames), layer)
                cache.is_updated[layer] = True
            if before is not None:
                cache.self_attention_cache.update(*(x[layer].transpose(0, 1)[None] for x in before), layer)
        out = self._model.model.decoder(ids, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
        return torch.log_softmax(self._model.proj_out(out.last_hidden_state)[0], dim=-1)


def figures(
    model: Whisper, speech: Path, codecs: dict[str, Callable[[torch.Tensor, torch.Tensor], Coded]]
) -> Iterator[dict[str, Any]]:
    """KL of each codec, on the frames and on a short chunk of the transcript."""
    heard = model.heard(speech)
    ids = model.transcript(heard)
    if ids.shape[1] < SHORT + 2:
        raise SystemExit(f"{speech}: a transcript of {ids.shape[1]} tokens, {SHORT + 2} are needed")
    frames, tokens = model.caches(heard, ids)
    head = tokens[0][:, :SHORT], tokens[1][:, :SHORT]
    first, rest = len(PROMPT) - 1, ids[:, SHORT:]
    whole = model.answers(heard, ids, frames)[first:]
    behind = model.answers(heard, rest, frames, head)
    for what, k, v in (("cross attention", *frames), (f"{SHORT} tokens", *head)):
        baseline = math.nan
        for name, codec in codecs.items():
            ck, cv, bits = codec(k, v)
            got = (
                model.answers(heard, ids, (ck, cv))[first:]
                if k is frames[0]
                else model.answers(heard, rest, frames, (ck, cv))
            )
            exact = whole if k is frames[0] else behind
            kl = max(float((exact.exp() * (exact - got)).sum(-1).mean()), 0.0)
            baseline = kl if name == "bitsandbytes-nf4" else baseline
            params = {"model": model.name, "text": f"{what}, {speech.name}", "bits": round(bits, 3), "metric": "kl",
                      "prefix": k.shape[1]}  # fmt: skip
            ratios = {"bitsandbytes": round(baseline / kl, 2)} if kl and not math.isnan(baseline) else {}
            yield {"name": name, "params": params, "value": kl, "unit": "nats", "ratios": ratios}


def _cache() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _both(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values"))
    return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def _tensors(data: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float16 tensors of the file; what is of another type is left out."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    if number("I") != 6 or text() != "WhisperSpec":
        raise SystemExit("no file of CTranslate2's, version 6, of Whisper")
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, nbytes = number("B"), number("I")
        if kind == 4:
            yield name, torch.frombuffer(bytearray(data[at : at + nbytes]), dtype=torch.float16).view(shape).float()
        at += nbytes


def _renamed(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """By transformers' names: joined projections cut into theirs."""
    for name, x in tensors:
        start = next((old for old in _NAMES if name.startswith(old)), None)
        if start is not None:
            yield _NAMES[start] + _plain(name.removeprefix(start)), x
        elif "/layer_" in name:
            side, layer, part, *rest = name.split("/")
            yield from _of_layer(f"model.{side}.layers.{layer.removeprefix('layer_')}.", part, rest, x)


def _of_layer(where: str, part: str, rest: list[str], x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    norms = {
        "self_attention": "self_attn_layer_norm",
        "attention": "encoder_attn_layer_norm",
        "ffn": "final_layer_norm",
    }
    inner, kind = rest
    if inner == "layer_norm":
        yield f"{where}{norms[part]}.{_plain(kind)}", x
        return
    if part == "ffn":
        yield f"{where}{'fc1' if inner == 'linear_0' else 'fc2'}.{kind}", x
        return
    cross = part == "attention"
    own = f"{where}{'encoder_attn' if cross else 'self_attn'}."
    joined = {
        (False, "linear_0"): ("q_proj", "k_proj", "v_proj"), (False, "linear_1"): ("out_proj",),
        (True, "linear_0"): ("q_proj",), (True, "linear_1"): ("k_proj", "v_proj"), (True, "linear_2"): ("out_proj",),
    }[cross, inner]  # fmt: skip
    for name, piece in zip(joined, x.chunk(len(joined)), strict=True):
        if (name, kind) != ("k_proj", "bias"):  # Whisper's has none: zeros
            yield f"{own}{name}.{kind}", piece


def _plain(kind: str) -> str:
    return {"gamma": "weight", "beta": "bias"}.get(kind, kind)
