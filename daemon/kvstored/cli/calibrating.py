"""What `kvstored learn` asks a model: how its keys turn with the position, its K and V of texts, and what errors in
them do to its answers.

The model runs on this process's CPU, on the files that were named and on nothing else. The Fisher information is the
mean outer product of gradients of log p(label) with respect to K and V, for labels drawn from the model's own
distribution over a continuation of the prefix: an error e in them costs about e F e / 2 nats for each token that
follows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore.codecs import Codec
from kvstore.codecs.hints import Hints
from kvstore.codecs.learning import Piece
from kvstore.codecs.rotation import Rotation, measured

PREFIX, CONTINUATION = 512, 384
_PROBES = (0, 1, 4, 16, 64, 256, 1024)
"""Positions at which one token's keys are looked at: each makes the angle found before finer."""


class Model:
    """A causal model of transformers in float32: from a directory of its own, or of a GGUF file."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        files = [directory] if directory.is_file() else sorted(directory.glob("*.gguf"))
        # Weights in pickles are never read.
        safe: dict[str, Any] = {"use_safetensors": True}
        home, more = (directory, safe) if (directory / "config.json").is_file() else _of_gguf(files)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            home, local_files_only=True, **{k: v for k, v in more.items() if k == "gguf_file"}
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True, **more)
        self.model: Any = loaded.eval().requires_grad_(False)

    def ids(self, text: str) -> torch.Tensor:
        """The tokens of a text: int64 (n,)."""
        found: torch.Tensor = self.tokenizer(text, return_tensors="pt").input_ids[0]
        return found

    def prefix(self, ids: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens (n,) at positions from `first` on: float32 (layers, n, heads, dim)."""
        at = torch.arange(first, first + ids.shape[0])[None]
        cache = _cache()
        with torch.no_grad():
            self.model(ids[None], past_key_values=cache, position_ids=at, logits_to_keep=1)
        return _stacked(cache, "keys")[0], _stacked(cache, "values")[0]

    def continued(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log probabilities (n, vocabulary) of tokens (n,) after a prefix with this K and V."""
        cache = _cache()
        for layer, (keys, values) in enumerate(zip(k, v, strict=True)):
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
        return torch.log_softmax(self.model(ids[None], past_key_values=cache).logits[0], dim=-1)

    def rotation(self) -> Rotation:
        """How the keys turn with the position. A single token attends to itself alone, so nothing else moves them."""
        ids = torch.linspace(1, self.model.config.get_text_config().vocab_size - 1, 8).long()[:, None]
        keys = []
        with torch.no_grad():
            for at in _PROBES:
                cache = _cache()
                self.model(ids, past_key_values=cache, position_ids=torch.full_like(ids, at), logits_to_keep=1)
                keys.append(_stacked(cache, "keys")[:, :, 0])
        return measured(_PROBES, torch.stack(keys).transpose(1, 2))

    def piece(self, ids: torch.Tensor, prefix: int, draw: torch.Generator) -> Piece:
        """K and V of the first `prefix` tokens, and their gradients from the rest."""
        k, v = self.prefix(ids[:prefix])
        k.requires_grad_()
        v.requires_grad_()
        with torch.enable_grad():
            answers = self.continued(k, v, ids[prefix:])
            labels = torch.multinomial(answers.detach().exp(), 1, generator=draw)
            answers.gather(1, labels).sum().backward()  # type: ignore[no-untyped-call]
        assert k.grad is not None
        assert v.grad is not None
        return Piece(k.detach(), v.detach(), k.grad, v.grad, ids.shape[0] - prefix)


@dataclass(frozen=True, slots=True)
class Harm:
    """What a codec does: bits a value with all side data, and KL in nats a token."""

    bits: float
    kl: float


def harm(model: Model, ids: torch.Tensor, prefix: int, codecs: Sequence[Codec], chunk: int = 256) -> list[Harm]:
    """Each codec's harm to a continuation, behind a prefix that is encoded in chunks as the store holds them."""
    k, v = model.prefix(ids[:prefix])
    exact = model.continued(k, v, ids[prefix:])
    found = []
    for codec in codecs:
        out_k, out_v, nbytes = torch.empty_like(k), torch.empty_like(v), 0
        for start in range(0, prefix, chunk):
            part, hints = slice(start, start + chunk), Hints(prefix_start=start == 0)
            for name, x, out in (("k", k, out_k), ("v", v, out_v)):
                encoded = codec.encode(name, x[:, part].contiguous(), hints)
                nbytes += sum(p.numel() * p.element_size() for p in encoded.parts.values())
                out[:, part] = codec.decode(encoded)
        got = model.continued(out_k, out_v, ids[prefix:])
        kl = float((exact.exp() * (exact - got)).sum(dim=-1).mean())
        found.append(Harm(nbytes * 8 / (k.numel() + v.numel()), max(kl, 0.0)))
    return found


def pieces_of(
    model: Model, texts: Sequence[Path], prefix: int = PREFIX, continuation: int = CONTINUATION, most: int = 24
) -> list[torch.Tensor]:
    """Tokens of up to `most` pieces, from all texts in turn, each of prefix and continuation."""
    whole = prefix + continuation
    cut = [list(_cut(model.ids(text.read_text(encoding="utf-8", errors="replace")), whole)) for text in texts]
    found = [of[at] for at in range(max(map(len, cut), default=0)) for of in cut if at < len(of)]
    return found[:most]


def _cut(ids: torch.Tensor, whole: int) -> Iterator[torch.Tensor]:
    for start in range(0, ids.shape[0] - whole + 1, whole):
        yield ids[start : start + whole]


def _of_gguf(files: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    from transformers import GgufConfig

    return files[0].parent, {"gguf_file": files[0].name, "quantization_config": GgufConfig(dequantize=True)}


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()  # without a configuration: every layer whole; where a window slides, the mask says so


def _stacked(cache: Any, name: str) -> torch.Tensor:
    """Of each batch and layer: (batch, layers, tokens, heads, dim)."""
    return torch.stack([getattr(layer, name) for layer in cache.layers], dim=1).transpose(2, 3).contiguous()
