"""What a codec does to answers: a model continues a text from a prefix that went through the codec.

    .venv/bin/python bench/fidelity.py --json                       # five texts: about ten minutes
    .venv/bin/python bench/fidelity.py --model qwen2.5-0.5b gemma3-270m --text FILE FILE
    .venv/bin/python bench/fidelity.py --text FILE FILE --plot bench/fidelity.svg
    .venv/bin/python bench/fidelity.py --model whisper-base --speech FILE.wav FILE.wav
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

import fidelity_others as others
import fidelity_whisper as whisper
import models
import torch
from fidelity_others import Coded

from kvstore.codecs.basis import read_basis, use
from kvstore.codecs.hints import Hints
from kvstore.codecs.int8 import Int8
from kvstore.codecs.kv_learned import Learned
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.config import MAX_RELATIVE_ERROR, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

PREFIX, CONTINUATION, CHUNK = 1024, 512, 256
QUARTERS = 4
"""Parts of the continuation whose KL is told: whether harm grows with the distance from the prefix."""
LICENSES = Path("/usr/share/common-licenses")
DEFAULT_TEXTS = (
    LICENSES / "GPL-3",
    LICENSES / "MPL-2.0",
    LICENSES / "Apache-2.0",
    Path(str(pydoc_data.topics.__file__)),
    Path(argparse.__file__),
)
"""Licences, manual pages and Python source: on every Debian machine."""
NAMES_ASKED = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
ANSWER = 6
"""Tokens of an answer."""
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

    def answered(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        question: torch.Tensor,
        n: int,
        along: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The n likeliest next tokens one by one, and log probabilities (n, vocabulary).

        Where along is given, each token is what is likeliest after the tokens of `along` before it.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k.transpose(0, 1)[None].contiguous(), v.transpose(0, 1)[None].contiguous(), layer)
        ids, found, logs = question, [], []
        for at in range(n):
            log = torch.log_softmax(self._model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1], dim=-1)
            found.append(log.argmax())
            logs.append(log)
            ids = (found[-1] if along is None else along[at])[None, None]
        return torch.stack(found), torch.stack(logs)


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


CODECS: dict[str, Callable[[torch.Tensor, torch.Tensor], Coded]] = {
    "exact": lambda k, v: (k, v, 32.0),
    "bfloat16": lambda k, v: (k.bfloat16().float(), v.bfloat16().float(), 16.0),
    "int8": lambda k, v: chunked(Int8(), k, v),
    "fp8": others.fp8,
    "bitsandbytes-nf4": others.bitsandbytes_nf4,
    "one-scale": others.one_scale,
    "nvfp4": others.nvfp4,
    "q4_0-hadamard": others.q4_0_rotated,
    "turboquant-4": others.turboquant,
    "kivi-int4": others.kivi_int4,
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


def figures(model: Model, text: Path, names: list[str], prefix: int, judged: int) -> Iterator[dict[str, Any]]:
    """All rows of one text."""
    ids = model.tokenizer(text.read_text(errors="replace"), return_tensors="pt").input_ids[:, : prefix + judged]
    if ids.shape[1] < prefix + judged:
        raise SystemExit(f"{text} has {ids.shape[1]} tokens, {prefix + judged} are needed")
    rest = ids[:, prefix:]
    k, v = model.prefix(ids[:, :prefix])
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
        by_token = (exact.exp() * (exact - got)).sum(-1)
        kl = max(float(by_token.mean()), 0.0)
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
            **{
                f"kl of tokens {at} to {at + len(some) - 1}": (float(some.mean()), "nats")
                for at, some in zip(range(0, judged, -(-judged // QUARTERS)), by_token.chunk(QUARTERS), strict=True)
            },
            **{f"receipt {tensor}": (error, "") for tensor, error in RECEIPTS.items()},
        }
        for metric, (value, unit) in values.items():
            ratios = (
                {"bitsandbytes": round(baseline / kl, 2)} if metric == "kl" and kl and not math.isnan(baseline) else {}
            )
            params = {
                "model": model.name,
                "text": text.name,
                "bits": round(bits, 3),
                "metric": metric,
                "prefix": prefix,
            }
            finite = value if math.isfinite(value) else None
            yield {"name": name, "params": params, "value": finite, "unit": unit, "ratios": ratios}


def needles(model: Model, text: Path, names: list[str], prefix: int, count: int) -> Iterator[dict[str, Any]]:
    """Facts spread over a prefix, each asked for behind it: how many answers are, letter by letter, the exact cache's.

    Beside them: how many answers of the exact cache are right, and the KL on the tokens of its answers.
    """
    facts = [(f"the locker of {name}", str(3017 + 1193 * at)) for at, name in enumerate(NAMES_ASKED[:count])]
    ids = model.tokenizer(text.read_text(errors="replace"), return_tensors="pt").input_ids[0]
    told = [
        model.tokenizer(f"\nThe code of {what} is {code}.\n", add_special_tokens=False).input_ids
        for what, code in facts
    ]
    piece = (prefix - sum(map(len, told))) // count
    parts = [part for at, fact in enumerate(told) for part in (ids[at * piece : (at + 1) * piece], torch.tensor(fact))]
    whole = torch.cat(parts)
    whole = torch.cat((whole, ids[count * piece : count * piece + prefix - len(whole)]))[None]
    if whole.shape[1] < prefix:
        raise SystemExit(f"{text} has {len(ids)} tokens, too few for a prefix of {prefix}")
    asked = [
        model.tokenizer(f"\n\nThe code of {what} is", add_special_tokens=False, return_tensors="pt").input_ids
        for what, _code in facts
    ]
    k, v = model.prefix(whole)
    exact = [model.answered(k, v, question, ANSWER) for question in asked]
    right = sum(
        model.tokenizer.decode(answer).strip().startswith(code)
        for (answer, _), (_, code) in zip(exact, facts, strict=True)
    )
    params = {"model": model.name, "text": f"{count} needles in {text.name}", "prefix": prefix}
    for name, codec in CODECS.items():
        if names and name not in names and name.partition(" ")[0] not in names:
            continue
        ck, cv, bits = codec(k, v)
        got = [
            model.answered(ck, cv, question, ANSWER, along=answer)
            for question, (answer, _) in zip(asked, exact, strict=True)
        ]
        same = sum(torch.equal(mine, answer) for (mine, _), (answer, _) in zip(got, exact, strict=True))
        kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for (_, q), (_, p) in zip(got, exact, strict=True)) / count
        found = {
            "answers as exact": (same, ""),
            "right answers of the exact cache": (right, ""),
            "kl of answers": (max(kl, 0.0), "nats"),
        }
        for metric, (value, unit) in found.items():
            yield {
                "name": name,
                "params": {**params, "bits": round(bits, 3), "metric": metric},
                "value": value,
                "unit": unit,
                "ratios": {},
            }


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The geometric mean of KL over the texts for each codec with the mean of its bits, and its worst ratio."""
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
        bits = sum(row["params"]["bits"] for row in kls) / len(kls)
        params = {**kls[0]["params"], "text": "geometric mean", "bits": round(bits, 3)}
        yield {"name": name, "params": params, "value": mean, "unit": "nats", "ratios": ratios}


def heard(model: whisper.Whisper, speech: list[Path], names: list[str], show: Any) -> Iterator[dict[str, Any]]:
    """The means over recordings of each cache apart; each row is printed as it is found."""
    codecs = {name: codec for name, codec in CODECS.items() if name != "auto" and (not names or name in names)}
    if not speech:
        raise SystemExit(f"{model.name} hears: name recordings by --speech")
    codecs["kivi-int4"] = lambda k, v: padded(others.kivi_int4, k, v)
    codecs["nf4-kv2"] = lambda k, v: chunked(NF4KV2(), k, v)  # a short chunk is no chunk of a prefix
    codecs = {name: codec for name, codec in codecs.items() if not names or name in names}
    rows = [row for path in speech for row in whisper.figures(model, path, codecs)]
    for what in dict.fromkeys(row["params"]["text"].partition(",")[0] for row in rows):
        some = [row for row in rows if row["params"]["text"].startswith(f"{what},")]
        for row in some:
            print(show(row), flush=True)
        for mean in summary(some):
            yield {**mean, "params": {**mean["params"], "model": f"{model.name}, {what}"}}


def padded(codec: Callable[[torch.Tensor, torch.Tensor], Coded], k: torch.Tensor, v: torch.Tensor) -> Coded:
    """Through a codec that wants a multiple of 32 tokens: the last one again and again."""
    more = -k.shape[1] % 32
    long_k, long_v, bits = codec(*(torch.cat((x, x[:, -1:].expand(-1, more, -1, -1)), dim=1) for x in (k, v)))
    return long_k[:, : k.shape[1]], long_v[:, : v.shape[1]], bits


def frontier(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points that no other has fewer bits and less harm than, by bits."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot(means: list[dict[str, Any]], path: Path) -> None:
    """KL against bits a value as an SVG, a panel for each model and prefix, its frontier as a line."""
    panels: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for row in means:
        key = row["params"]["model"], row["params"]["prefix"]
        panels.setdefault(key, []).append((row["params"]["bits"], row["value"], row["name"]))
    columns = min(2, len(panels))
    size = PANEL[0] * columns, PANEL[1] * -(-len(panels) // columns)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" {FONT}>']
    parts.append(f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>')
    for at, ((model, prefix), points) in enumerate(panels.items()):
        place = f"{at % columns * PANEL[0]},{at // columns * PANEL[1]}"
        parts.append(f'<g transform="translate({place})">{_panel(f"{model}, {prefix:,} tokens", points)}</g>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


PANEL = 560, 400
FONT = 'font-family="sans-serif" font-size="11"'
BITS_SHOWN = 2.0, 9.0


def _panel(title: str, points: list[tuple[float, float, str]]) -> str:
    shown = [point for point in points if point[0] <= BITS_SHOWN[1]]
    low = math.floor(min(math.log10(kl) for _bits, kl, _name in shown))
    high = math.ceil(max(math.log10(kl) for _bits, kl, _name in shown))

    def place(bits: float, kl: float) -> tuple[float, float]:
        across = (bits - BITS_SHOWN[0]) / (BITS_SHOWN[1] - BITS_SHOWN[0])
        return 50 + across * 440, 30 + (high - math.log10(kl)) / max(high - low, 1) * 310

    parts = [f'<text x="50" y="18" font-weight="bold">{title}</text>']
    for power in range(low, high + 1):
        y = place(4, 10.0**power)[1]
        parts.append(f'<path d="M50 {y:.0f}H490" stroke="#ddd"/><text x="8" y="{y + 4:.0f}">1e{power}</text>')
    for bits in range(2, 10):
        x = place(bits, 10.0**low)[0]
        parts.append(f'<path d="M{x:.0f} 30V340" stroke="#eee"/><text x="{x - 4:.0f}" y="355">{bits}</text>')
    parts.append('<text x="150" y="378">bits a value, side data included; KL in nats</text>')
    line_of = " ".join("{:.1f},{:.1f}".format(*place(bits, kl)) for bits, kl, _name in frontier(shown))
    parts.append(f'<polyline points="{line_of}" fill="none" stroke="#c33"/>')
    for bits, kl, name in shown:
        x, y = place(bits, kl)
        colour = "#c33" if name in {"nf4-kv2", "auto"} or name.startswith("kv-learned") else "#336"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return "".join(parts)


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
    parser.add_argument("--speech", type=Path, nargs="+", default=[], help="WAV files for whisper-base, 16 kHz")
    parser.add_argument(
        "--model", nargs="+", default=[models.SMOLLM2], help=f"{', '.join(models.NAMES)}, a file or DIR"
    )
    parser.add_argument("--continuation", type=int, default=CONTINUATION, help="tokens that are judged, %(default)s")
    parser.add_argument("--prefix", type=int, nargs="+", default=[PREFIX], help="tokens of prefix, %(default)s")
    parser.add_argument("--needles", type=int, default=0, help="facts that are hidden in a prefix of the first text")
    parser.add_argument("--codec", nargs="+", default=[], help=f"these alone: {', '.join(CODECS)}, kv-learned")
    parser.add_argument("--basis", type=Path, nargs="+", default=[], help="of kv-learned: a row for each, of one model")
    parser.add_argument("--plot", type=Path, help="write KL against bits as an SVG")
    args = parser.parse_args()
    show = json.dumps if args.json else line
    CODECS.update(learned_rows(args.basis))
    torch.set_grad_enabled(False)
    means: list[dict[str, Any]] = []
    for name in args.model:
        if name in models.SPEECH:
            means += heard(whisper.Whisper(name), args.speech, args.codec, show)
            continue
        model = Model(name)
        for prefix in args.prefix:
            seen = []
            for text in args.text:
                for row in figures(model, text, args.codec, prefix, args.continuation):
                    seen.append(row)
                    print(show(row), flush=True)
            means += summary(seen)
            if args.needles:
                for row in needles(model, args.text[0], args.codec, prefix, args.needles):
                    print(show(row), flush=True)
    for row in means:
        print(show(row), flush=True)
    if args.plot:
        plot(means, args.plot)


if __name__ == "__main__":
    main()
