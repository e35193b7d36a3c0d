"""RWKV and Mamba: the state has one size at any length. Byte-level models that `experiments.teach` taught once."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab

WEIGHTS = Path(__file__).parent / "weights"


class RWKV(Baseline):
    """RWKV-4: five numbers a channel and layer."""

    row = 21
    name = "rwkv"
    category = "recurrent"
    source = "arXiv 2305.13048, transformers RwkvForCausalLM"
    kept = "a byte-level model of 0.9 million parameters, taught here: its tokens are bytes, its KL is from itself"
    units = "bytes"
    kind: ClassVar[str] = "rwkv"

    def state(self, lab: Lab) -> Tensors:
        """All of its state."""
        from kvstored_client.integrations.transformers.snapshot import dump_row

        model, cache = taught(self.kind), self._empty()
        with torch.inference_mode():
            out = model(lab.ids, use_cache=True, **({} if cache is None else {"cache_params": cache}))
        return dump_row(out.state if cache is None else cache, 0, 0, int(lab.ids.shape[1]))

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model from that state, a byte at a time: a forward over several does not look at the state."""
        from kvstored_client.integrations.transformers.snapshot import load_rows

        model, cache = taught(self.kind), self._empty()
        state: Any = None
        if cache is None:
            state = [tensors[name].clone() for name in sorted(tensors)]
        else:
            load_rows(cache, [dict(tensors)], int(lab.ids.shape[1]))

        def one(ids: torch.Tensor) -> torch.Tensor:
            nonlocal state
            with torch.inference_mode():
                given = {"state": state} if cache is None else {"cache_params": cache}
                out = model(ids, use_cache=True, **given)
            state = out.state if cache is None else None
            logits: torch.Tensor = out.logits[0]
            return logits

        return lambda ids: torch.cat([one(ids[:, i : i + 1]) for i in range(ids.shape[1])])

    def notes(self, lab: Lab) -> str:
        """How well it was taught."""
        found = json.loads((WEIGHTS / self.kind / "taught.json").read_text())
        return (
            f"taught {found['steps']} steps, {found['parameters'] / 1e6:.1f} million parameters, training loss "
            f"{found['training_loss']} nats a byte, held out {found['held_out_loss']}; the state is as large after any "
            f"number of bytes, here {lab.ids.shape[1]}; ms/token is of a model that much smaller than the baseline"
        )

    def _empty(self) -> Any:
        return None


class Mamba(RWKV):
    """Mamba-2: a matrix a head and the last inputs of a convolution."""

    row = 22
    name = "mamba"
    source = "arXiv 2405.21060, transformers Mamba2ForCausalLM"
    kept = "a byte-level model of 0.7 million parameters, taught here: its tokens are bytes, its KL is from itself"
    kind = "mamba"

    def _empty(self) -> Any:
        from kvstored_client.integrations.transformers import KvstoredCache

        return KvstoredCache(config=taught(self.kind).config)


@lru_cache(maxsize=2)
def taught(kind: str) -> Any:
    """The committed model in float32. Raises OSError where it was not taught yet."""
    import transformers

    found = transformers.Mamba2ForCausalLM if kind == "mamba" else transformers.RwkvForCausalLM
    return found.from_pretrained(WEIGHTS / kind, dtype=torch.float32, local_files_only=True).eval()
