"""What a codec does to answers: a model continues a text from a prefix that went through the codec.

    .venv/bin/python bench/fidelity.py --json                       # five texts: about ten minutes
    .venv/bin/python bench/fidelity.py --model qwen2.5-0.5b gemma3-270m --text FILE FILE
    .venv/bin/python bench/fidelity.py --text FILE FILE --plot bench/fidelity.svg
    .venv/bin/python bench/fidelity.py --basis smollm2.safetensors  # rows of kv-learned, from `kvstored learn`

A text gives 1,024 tokens of prefix, encoded in chunks of 256, and 512 tokens of continuation, teacher-forced. One
figure a line: KL divergence of the next-token distribution from the exact one (nats, mean over the 512), change of
perplexity, top-1 agreement, cosine and SNR of K and V, bits a value with all side data. The ratio `bitsandbytes` is
bitsandbytes' KL over the row's own. Judge by KL: cosine and SNR mislead (centring keys gains 7 dB and loses by KL
unless the first tokens stay out), perplexity and agreement are too coarse. The models: bench/models.py (SmolLM2-135M,
which `make demo` installs, unless another is named).
"""

import argparse
import json
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import torch

from kvstore.codecs.basis import read_basis, use
from kvstore.codecs.hints import Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.kv_learned import Learned
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.config import MAX_RELATIVE_ERROR, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

PREFIX, CONTINUATION, CHUNK = 1024, 512, 256
LICENSES = Path("/usr/share/common-licenses")
DEFAULT_TEXTS = (
    LICENSES / "GPL-3",
    LICENSES / "MPL-2.0",
    LICENSES / "Apache-2.0",
    Path(str(pydoc_data.topics.__file__)),
    Path(argparse.__file__),
)
"""Licences, manual pages and Python source: on every Debian machine."""
Coded = tuple[torch.Tensor, torch.Tensor, float]
"""K and V after a codec, (layers, tokens, heads, dim), and bits a value."""
RECEIPTS: dict[str, float] = {}
"""The largest receipt of what went through the store last, by tensor."""


class Model:
    """A causal model in float32 from a GGUF file, by name or path (`models.path_of`)."""

    def __init__(self, name: str = models.SMOLLM2) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        gguf = models.path_of(name)
        self.name = name if name in models.NAMES else gguf.stem
        self.tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()

    def prefix(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of ids (1, tokens), float32 (layers, tokens, heads, dim)."""
        from transformers import DynamicCache

        cache = DynamicCache()  # every layer whole: where a window slides, the mask says so
        self._model(ids, past_key_values=cache, logits_to_keep=1)
        keys = torch.stack([layer.keys[0] for layer in cache.layers]).transpose(1, 2)
        values = torch.stack([layer.values[0] for layer in cache.layers]).transpose(1, 2)
        return keys.contiguous(), values.contiguous()

    def continued(self, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log probabilities (tokens, vocabulary) of a continuation after a prefix."""
        from transformers import DynamicCache

        cache = DynamicCache()  # every layer whole: where a window slides, the mask says so
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k.transpose(0, 1)[None].contiguous(), v.transpose(0, 1)[None].contiguous(), layer)
        return torch.log_softmax(self._model(ids, past_key_values=cache).logits[0], dim=-1)


def chunked(codec: Any, k: torch.Tensor, v: torch.Tensor) -> Coded:
    """Through one of our codecs, a chunk of 256 tokens at a time, as the store holds them."""
    out_k, out_v, nbytes = torch.empty_like(k), torch.empty_like(v), 0
    for start in range(0, k.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        hints = Hints(prefix_start=start == 0)
        for name, x, out in (("k", k, out_k), ("v", v, out_v)):
            encoded = codec.encode(name, x[:, part].contiguous(), hints)
            nbytes += sum(p.numel() * p.element_size() for p in encoded.parts.values())
            out[:, part] = codec.decode(encoded)
    return out_k, out_v, nbytes * 8 / (k.numel() + v.numel())


def through_the_store(k: torch.Tensor, v: torch.Tensor, bound: float = MAX_RELATIVE_ERROR) -> Coded:
    """Put as a prefix, demoted to warm and read back: the codec as users get it. Bits: all that is counted in warm."""
    layers, tokens, heads, dim = k.shape
    config = StoreConfig(HotConfig(1 << 30), WarmConfig(1 << 30, max_relative_error=bound))
    with Store.open(config, framework="torch", background=False) as store:
        space = store.namespace(
            model="bench",
            revision="0",
            dtype="float32",
            layers=layers,
            kv_heads=heads,
            head_dim=dim,
            layout="lthd",
            chunk_tokens=CHUNK,
        )
        ids = list(range(tokens))
        space.put_prefix(ids, k, v)
        store.demote(*space.keys(ids))
        warm = store.stats().tiers["warm"]
        n, out_k, out_v = space.get_prefix(ids)
        assert (n, warm.entries) == (tokens, tokens // CHUNK)
        for hit in store.get_many(space.keys(ids)):
            for name, error in hit.receipt.items() if hit else ():
                RECEIPTS[name] = max(RECEIPTS.get(name, 0.0), error)
        return out_k, out_v, warm.used_nbytes * 8 / (k.numel() + v.numel())


def bitsandbytes_nf4(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """NF4 of bitsandbytes with nested scales."""
    import bitsandbytes.functional as bnb

    def both(x: torch.Tensor) -> torch.Tensor:
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        return bnb.dequantize_4bit(packed, state).view_as(x)

    return both(k), both(v), 4 + 8 / 64 + 32 / (64 * 256)


def one_scale(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """NF4 levels under one scale for the whole tensor: the naive design."""
    from kvstore.kernels.reference import codes_of
    from kvstore.kernels.tables import table

    def both(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max()
        return table("code", x.device)[codes_of(x / scale).int()] * scale

    return both(k), both(v), 4.0


def kivi_int4(k: torch.Tensor, v: torch.Tensor) -> Coded:
    """Asymmetric int4 as KIVI has it: keys a channel over 32 tokens, values a token over 32 channels, fp16 scales."""

    def quantized(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True).half().float(), x.amax(dim, keepdim=True).half().float()
        step = ((high - low) / 15).half().float().clamp(min=1e-8)
        return torch.round((x - low) / step).clamp(0, 15) * step + low

    layers, tokens, heads, d = k.shape
    keys = quantized(k.view(layers, tokens // 32, 32, heads, d), 2).view_as(k)
    return keys, quantized(v.view(layers, tokens, heads, d // 32, 32), 4).view_as(v), 4 + 32 / 32


CODECS: dict[str, Callable[[torch.Tensor, torch.Tensor], Coded]] = {
    "exact": lambda k, v: (k, v, 32.0),
    "bfloat16": lambda k, v: (k.bfloat16().float(), v.bfloat16().float(), 16.0),
    "int8": lambda k, v: chunked(Int8(), k, v),
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "one-scale": one_scale,
    "kivi-int4": kivi_int4,
    "nf4-kv": lambda k, v: chunked(NF4KV(), k, v),
    "nf4-kv2": lambda k, v: through_the_store(k, v, 0),
    "auto": through_the_store,
}


def learned_rows(paths: list[Path]) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Coded]]:
    """A row for each basis (`kvstored learn`): "kv-learned", and the file's name where there are several."""
    rows: dict[str, Callable[[torch.Tensor, torch.Tensor], Coded]] = {}
    for path in paths:
        codec = Learned(use(read_basis(path)), NF4KV2())
        name = "kv-learned" if len(paths) == 1 else f"kv-learned {path.stem}"
        rows[name] = lambda k, v, codec=codec: chunked(codec, k, v)  # type: ignore[misc]
    return rows


def snr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    """Signal over error in dB; inf where equal."""
    error = float((x - y).square().sum())
    return 10 * math.log10(float(x.square().sum()) / error) if error else math.inf


def figures(model: Model, text: Path, names: list[str], judged: int = CONTINUATION) -> Iterator[dict[str, Any]]:
    """All rows of one text."""
    ids = model.tokenizer(text.read_text(errors="replace"), return_tensors="pt").input_ids[:, : PREFIX + judged]
    if ids.shape[1] < PREFIX + judged:
        raise SystemExit(f"{text} has {ids.shape[1]} tokens, {PREFIX + judged} are needed")
    rest = ids[:, PREFIX:]
    k, v = model.prefix(ids[:, :PREFIX])
    exact = model.continued(k, v, rest)
    answers, targets = exact.argmax(-1), rest[0, 1:, None]
    nll = -float(exact[:-1].gather(1, targets).mean())
    baseline = math.nan
    for name, codec in CODECS.items():
        if names and name not in names and name.partition(" ")[0] not in names:
            continue
        RECEIPTS.clear()
        ck, cv, bits = codec(k, v)
        got = model.continued(ck, cv, rest)
        kl = max(float((exact.exp() * (exact - got)).sum(-1).mean()), 0.0)
        baseline = kl if name == "bitsandbytes-nf4" else baseline
        change = math.exp(-float(got[:-1].gather(1, targets).mean()) - nll) - 1
        cosine = torch.nn.functional.cosine_similarity
        values = {
            "kl": (kl, "nats"),
            "perplexity change": (100 * change, "%"),
            "top-1 agreement": (100 * float((got.argmax(-1) == answers).float().mean()), "%"),
            "K cosine": (float(cosine(k, ck, dim=-1).mean()), ""),
            "V cosine": (float(cosine(v, cv, dim=-1).mean()), ""),
            "K SNR": (snr_db(k, ck), "dB"),
            "V SNR": (snr_db(v, cv), "dB"),
            **{f"receipt {tensor}": (error, "") for tensor, error in RECEIPTS.items()},
        }
        for metric, (value, unit) in values.items():
            ratios = (
                {"bitsandbytes": round(baseline / kl, 2)} if metric == "kl" and kl and not math.isnan(baseline) else {}
            )
            params = {"model": model.name, "text": text.name, "bits": round(bits, 3), "metric": metric}
            finite = value if math.isfinite(value) else None
            yield {"name": name, "params": params, "value": finite, "unit": unit, "ratios": ratios}


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The geometric mean of KL over the texts for each codec, and its worst ratio."""
    for name in CODECS:
        kls = [row for row in rows if row["name"] == name and row["params"]["metric"] == "kl" and row["value"]]
        if not kls:
            continue
        mean = math.exp(sum(math.log(row["value"]) for row in kls) / len(kls))
        found = [row["ratios"]["bitsandbytes"] for row in kls if row["ratios"]]
        ratios = {}
        if found:
            ratios = {
                "bitsandbytes": round(math.exp(sum(map(math.log, found)) / len(found)), 2),
                "bitsandbytes, worst text": min(found),
            }
        params = {**kls[0]["params"], "text": "geometric mean"}
        yield {"name": name, "params": params, "value": mean, "unit": "nats", "ratios": ratios}


def plot(means: list[dict[str, Any]], path: Path) -> None:
    """KL against bits a value as an SVG: no plotting library is needed for seven points."""
    points = [(row["params"]["bits"], row["value"], row["name"]) for row in means]
    low = math.floor(min(math.log10(kl) for _bits, kl, _name in points))
    high = math.ceil(max(math.log10(kl) for _bits, kl, _name in points))

    def place(bits: float, kl: float) -> tuple[float, float]:
        return 70 + (bits - 3.5) / 13.5 * 500, 20 + (high - math.log10(kl)) / (high - low) * 320

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="400" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="640" height="400" fill="white"/>')
    for power in range(low, high + 1):
        y = place(4, 10.0**power)[1]
        parts.append(f'<path d="M70 {y:.0f}H590" stroke="#ddd"/><text x="20" y="{y + 4:.0f}">1e{power}</text>')
    for bits in range(4, 17, 2):
        x = place(bits, 10.0**low)[0]
        parts.append(f'<path d="M{x:.0f} 20V340" stroke="#eee"/><text x="{x - 4:.0f}" y="356">{bits}</text>')
    parts.append('<text x="240" y="384">bits a value, side data included</text><text x="8" y="14">KL, nats</text>')
    for bits, kl, name in points:
        x, y = place(bits, kl)
        colour = "#c33" if name == "nf4-kv2" else "#336"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    value = "-" if row["value"] is None else f"{row['value']:.6g}"
    ratios = "".join(f"  {who} x{ratio:g}" for who, ratio in row["ratios"].items())
    p = row["params"]
    head = f"{p['model']:13} {p['text']:16} {row['name']:17} {p['bits']:6.3f} bits  {p['metric']:18}"
    return f"{head} {value:>12} {row['unit']:4}{ratios}"


def main() -> None:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--text", type=Path, nargs="+", default=list(DEFAULT_TEXTS), help="plain text files")
    parser.add_argument(
        "--model", nargs="+", default=[models.SMOLLM2], help=f"{', '.join(models.NAMES)}, a file or DIR"
    )
    parser.add_argument("--continuation", type=int, default=CONTINUATION, help="tokens that are judged, %(default)s")
    parser.add_argument("--codec", nargs="+", default=[], help=f"these alone: {', '.join(CODECS)}, kv-learned")
    parser.add_argument("--basis", type=Path, nargs="+", default=[], help="of kv-learned: a row for each, of one model")
    parser.add_argument("--plot", type=Path, help="write KL against bits as an SVG")
    args = parser.parse_args()
    show = json.dumps if args.json else line
    CODECS.update(learned_rows(args.basis))
    torch.set_grad_enabled(False)
    means: list[dict[str, Any]] = []
    for name in args.model:
        model, seen = Model(name), []
        for text in args.text:
            for row in figures(model, text, args.codec, args.continuation):
                seen.append(row)
                print(show(row), flush=True)
        means += summary(seen)
    for row in means:
        print(show(row), flush=True)
    if args.plot:
        plot(means, args.plot)


if __name__ == "__main__":
    main()
