"""Teach the byte-level models of rows 21 and 22, once: `python -m experiments.teach rwkv` and `... mamba`.

Real pretrained weights of RWKV and Mamba are hundreds of megabytes; random ones say nothing beside real figures. So two
small models are taught here from text that every Debian machine with Python has: the licences and the standard library.
GPL-3 and MPL-2.0 are held out: the experiments continue them. The weights are committed as bfloat16 under
`experiments/weights/KIND`, with the loss in `taught.json`. Seeded, one thread, about ten minutes of it each; glibc's
malloc gives pages back and takes them again at each step unless MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 are set.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

WEIGHTS = Path(__file__).parent / "weights"
LICENSES = Path("/usr/share/common-licenses")
HELD_OUT = ("GPL-3", "MPL-2.0")
LIBRARY = ("asyncio", "email", "http", "json", "logging", "pydoc_data", "unittest")
"""Packages of the standard library, and what lies directly in it."""
SEED, RATE, WARM_STEPS = 0, 4e-3, 40
LENGTHS = {"rwkv": 96, "mamba": 128}
"""Bytes of a training example."""
BATCH = 24
STEPS = {"rwkv": 900, "mamba": 300}
KINDS = tuple(STEPS)


def configured(kind: str) -> Any:
    """A fresh model of this kind, with seeded random weights."""
    import transformers

    torch.manual_seed(SEED)
    shape: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if kind == "mamba":
        config = transformers.Mamba2Config(
            **shape, num_hidden_layers=6, num_heads=4, head_dim=64, expand=2, state_size=32, n_groups=1, chunk_size=16
        )
        return transformers.Mamba2ForCausalLM(config)
    config = transformers.RwkvConfig(
        **shape, num_hidden_layers=4, attention_hidden_size=128, intermediate_size=512, context_length=1024,
        rescale_every=0,
    )  # fmt: skip
    return transformers.RwkvForCausalLM(config)


def corpus() -> torch.Tensor:
    """All training text as bytes, int64 (n,)."""
    library = Path(json.__file__).parents[1]
    paths = [p for p in sorted(LICENSES.iterdir()) if p.is_file() and not p.is_symlink() and p.name not in HELD_OUT]
    paths += sorted(library.glob("*.py"))
    paths += [p for name in LIBRARY for p in sorted((library / name).glob("*.py"))]
    data = bytearray(b"\n".join(p.read_bytes() for p in paths))
    return torch.frombuffer(data, dtype=torch.uint8).long()


def wkv_in_parallel(
    time_decay: torch.Tensor, time_first: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """RWKV-4's attention over all positions at once: a matrix of decays a channel, instead of a loop over time.

    time_decay, time_first: (channels,); key, value: (batch, time, channels). Ten times faster than transformers' loop
    in training; inference keeps the loop. The same numbers as long as keys of one example differ by less than about 80.
    """
    t = torch.arange(key.shape[1])
    gap = (t[:, None] - 1 - t[None, :]).clamp(min=0)
    decay = torch.exp(-time_decay.exp()[:, None, None] * gap) * (t[:, None] > t[None, :])
    k = key - key.amax(1, keepdim=True).detach()
    past, now = k.exp(), (k + time_first).exp()
    numerator = torch.einsum("cti,bic->btc", decay, past * value) + now * value
    denominator = torch.einsum("cti,bic->btc", decay, past) + now
    return numerator / denominator.clamp(min=1e-30), None


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next byte, nats. x: (batch, length + 1)."""
    logits = model(x[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def taught(kind: str, steps: int) -> tuple[Any, float]:
    """A model after `steps` steps, and its loss over the last 50 of them."""
    model, data, length = configured(kind), corpus(), LENGTHS[kind]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    generator, started = torch.Generator().manual_seed(SEED), time.monotonic()
    last: list[float] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_STEPS) * cosine + RATE / 100
        starts = torch.randint(0, len(data) - length - 1, (BATCH,), generator=generator)
        loss = loss_of(model, torch.stack([data[at : at + length + 1] for at in starts.tolist()]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = [*last[-49:], float(loss.detach())]
        if step % 50 == 49:
            print(f"{step + 1}/{steps} {time.monotonic() - started:.0f} s {sum(last) / len(last):.3f} nats", flush=True)
    return model.eval(), sum(last) / len(last)


def held_out(model: Any) -> float:
    """Mean loss over 8 KiB of GPL-3, nats a byte."""
    data = torch.tensor(list((LICENSES / HELD_OUT[0]).read_bytes()[:8193]))
    with torch.inference_mode():
        return sum(float(loss_of(model, data[at : at + 513][None])) for at in range(0, 8192, 512)) / 16


def main() -> None:
    """Teach one kind and write its weights."""
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in KINDS:
        raise SystemExit(f"which: {' or '.join(KINDS)}? got {kind!r}")
    from transformers.models.rwkv import modeling_rwkv

    torch.set_num_threads(1)
    modeling_rwkv.rwkv_linear_attention = wkv_in_parallel
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS[kind]
    model, loss = taught(kind, steps)
    found = {
        "kind": kind, "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": SEED,
        "training_loss": round(loss, 3), "held_out_loss": round(held_out(model), 3),
    }  # fmt: skip
    home = WEIGHTS / kind
    model.to(torch.bfloat16).save_pretrained(home)
    (home / "taught.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
