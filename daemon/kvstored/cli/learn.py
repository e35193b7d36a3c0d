"""`kvstored learn`: a basis for the codec kv-learned, from a model and texts. No daemon is asked."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.errors import ConfigError
from kvstore.printable import size
from kvstored.cli.exits import BadUsage
from kvstored.cli.experiments import Tokens
from kvstored.cli.progress import waiting
from kvstored.cli.remote import print_json
from kvstored.cli.text import duration

if TYPE_CHECKING:
    from kvstore.codecs.basis import Basis
    from kvstore.codecs.learning import Found, Learning, Statistics
    from kvstored.cli.calibrating import Model

    Made = tuple[Basis, dict[str, float]]
    """A basis, and what was measured of it."""

_EXTRA = ("torch", "transformers", "safetensors")
BITS = 2.3
"""Bits a value: SmolLM2 answers better with them than with nf4-kv's 4.28 (bench/RESULTS.md)."""
_ROUNDS = 3
"""Times a step is chosen again by what was measured, until KL is within --max-kl."""
_TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--model", "directory", required=True, type=click.Path(exists=True, path_type=Path),
              help="A directory of transformers', or a GGUF file.")  # fmt: skip
@click.option("--text", "texts", multiple=True, required=True, type=_TEXT,
              help="Plain text to learn from; more files may follow, or the option again.")  # fmt: skip
@click.argument("more", nargs=-1, metavar="[FILE]...", type=_TEXT)
@click.option("--bits", type=click.FloatRange(0.5, 8), help=f"Bits a value.  [default: {BITS}]")
@click.option("--max-kl", type=click.FloatRange(min=0, min_open=True), help="Nats a token instead, as measured.")
@click.option("--group", type=click.Choice(["1", "3", "10"]), default="3", show_default=True,
              help="Layers transformed together: more are fewer bits and slower.")  # fmt: skip
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: NAME.safetensors]")
@click.option("--coarser", type=click.Path(dir_okay=False, path_type=Path),
              help="Write there the coarser form for cold (store.cold.bits) as well.")  # fmt: skip
@click.option("--times", type=click.Choice(["3", "5", "7", "9"]), default="3", show_default=True,
              help="Steps of the finer form that one of the coarser is wide.")  # fmt: skip
@click.option("--name", help="Whose basis it is, for people.  [default: the model's directory]")
@click.option("--tokens", type=Tokens(), default="512+384", show_default=True, help="Of prefix and continuation.")
@click.option("--pieces", type=click.IntRange(1, 10_000), default=24, show_default=True, help="Of text, at most.")
@click.option("--json", "as_json", is_flag=True, help="What was found, as JSON.")
def learn(directory: Path, texts: tuple[Path, ...], more: tuple[Path, ...], **given: Any) -> None:
    """Learn the basis that the codec kv-learned needs for a model, from files alone.

    Name the file that is written in store.warm.bases. The predicted KL is reckoned from gradients, the measured one is
    the model's own on a piece of text that taught nothing else, beside nf4-kv2's on the same piece.
    """
    bits, max_kl = given["bits"], given["max_kl"]
    if bits is not None and max_kl is not None:
        raise BadUsage("--bits and --max-kl exclude each other: the step is chosen by one of them")
    missing = [module for module in _EXTRA if find_spec(module) is None]
    if missing:
        raise BadUsage(f"learn needs the model's library: {', '.join(missing)}: pip install 'kvstored[experiments]'")
    name = given["name"] or directory.resolve().stem
    output = given["output"] or Path(f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.safetensors")
    files = [file for file in (output, given["coarser"]) if file is not None]
    for file in files:
        if not file.parent.is_dir():
            raise BadUsage(f"{file.parent} is no directory to write {file.name} to")
    began = time.monotonic()
    try:
        how = int(given["group"]), name
        model, learning, piece = _studied(directory, [*texts, *more], how, given["tokens"], given["pieces"])
        with waiting("choosing the step", 0):
            found, made = _chosen(model, learning, piece, (bits, max_kl))
            results = [made]
            if given["coarser"] is not None:
                results.append(_made_coarser(model, learning, (found, made[0], int(given["times"])), piece))
    except ConfigError as error:
        raise BadUsage(str(error)) from None
    for file, (basis, _measured_on) in zip(files, results, strict=True):
        _written(file, basis.to_bytes())
    _told(files, results, time.monotonic() - began, as_json=given["as_json"])


COMMANDS = (learn,)


def _studied(
    directory: Path, texts: list[Path], how: tuple[int, str], tokens: tuple[int, int], most: int
) -> "tuple[Model, Learning, Any]":
    """The model, what was learned from the texts, and the tokens of the piece to measure on. how: group and name."""
    import torch

    from kvstore.codecs.learning import Learning, Statistics
    from kvstored.cli.calibrating import Model, pieces_of

    with waiting("loading the model", 0):
        try:
            model = Model(directory)
        except (OSError, ValueError, IndexError) as error:
            raise BadUsage(f"{directory} is no model that transformers can load: {str(error)[:300]}") from None
        rotation = model.rotation()
        pieces = pieces_of(model, texts, *tokens, most=most)
    if not pieces:
        raise BadUsage(f"no text has {sum(tokens)} tokens: name longer ones, or lower --tokens")
    draw, statistics = torch.Generator().manual_seed(0), None
    with click.progressbar(pieces, label="learning from pieces", file=sys.stderr) as bar:
        for ids in bar:
            piece = model.piece(ids, tokens[0], draw)
            if statistics is None:
                layers, _, heads, dim = piece.k.shape
                statistics = Statistics((layers, heads, dim), how[0], rotation)
            statistics.add(piece)
    assert statistics is not None
    with waiting("computing the transform", 0):
        return model, Learning(statistics, how[1], tokens[0]), pieces[_judged(statistics)]


def _judged(statistics: "Statistics") -> int:
    """The piece to measure on: the first that only gradients were learned from, or else the last."""
    from kvstore.codecs.learning import HELD_OUT

    return min(HELD_OUT, statistics.pieces) - 1


def _chosen(
    model: "Model", learning: "Learning", ids: Any, wanted: tuple[float | None, float | None]
) -> "tuple[Found, Made]":
    bits, max_kl = wanted
    if max_kl is None:
        found = learning.for_bits(bits or BITS)
        return found, _measured(model, learning, found, ids)
    found = learning.for_kl(max_kl)
    basis, measured = _measured(model, learning, found, ids)
    target = max_kl
    for _ in range(_ROUNDS):
        if measured["kl"] <= max_kl:
            break
        target *= 0.97 * max_kl / measured["kl"]  # KL goes with the square of the step, predicted and measured alike
        found = learning.for_kl(target)
        basis, measured = _measured(model, learning, found, ids)
    if measured["kl"] <= max_kl:
        return found, (basis, measured)
    raise ConfigError(f"no step keeps KL within {max_kl}: measured {measured['kl']:.2e} at {measured['bits']:.2f} bits")


def _measured(model: "Model", learning: "Learning", found: "Found", ids: Any, finer: "Basis | None" = None) -> "Made":
    """The basis with what it does to the model's answers behind a prefix, and the same of nf4-kv2.

    finer: the basis that it is the coarser form of.
    """
    import torch

    from kvstore.codecs.coarser import Coarser
    from kvstore.codecs.kv_learned import Learned
    from kvstore.codecs.nf4_kv2 import NF4KV2
    from kvstored.cli.calibrating import harm

    basis = learning.basis(found)
    codec = Learned(basis, NF4KV2()) if finer is None else Coarser(finer, basis)
    with torch.no_grad(), _used(basis, *([finer] if finer else [])):
        ours, theirs = harm(model, ids, learning.prefix, [codec, NF4KV2()])
    basis = learning.basis(found, ours.kl)
    return basis, {"kl": ours.kl, "bits": ours.bits, "nf4-kv2 kl": theirs.kl, "nf4-kv2 bits": theirs.bits}


def _made_coarser(model: "Model", learning: "Learning", finer: "tuple[Found, Basis, int]", ids: Any) -> "Made":
    found, basis, times = finer
    return _measured(model, learning, learning.coarser(found, times), ids, basis)


@contextmanager
def _used(*bases: "Basis") -> Iterator[None]:
    from kvstore.codecs.basis import use

    held = [use(basis) for basis in bases]
    yield
    del held


def _written(path: Path, data: bytes) -> None:
    """Whole or not at all: a daemon may read it at any time."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    beside.replace(path)


def _told(files: list[Path], results: "list[Made]", seconds: float, *, as_json: bool) -> None:
    told = [_facts(file, *made) for file, made in zip(files, results, strict=True)]
    if as_json:
        print_json({**told[0], "seconds": seconds, **({"coarser": told[1]} if told[1:] else {})})
        return
    for at, (file, (basis, measured)) in enumerate(zip(files, results, strict=True)):
        about = basis.about
        shape = f"{about.layers} layers, {about.heads} heads, {about.dim} channels, groups of {about.group}"
        what = f"of {about.model}: {shape}" if not at else f"the coarser form, {basis.times(results[0][0])} steps wide"
        click.echo(f"{file}: {size(basis.nbytes)}, digest {basis.digest[:16]}, {what}")
        if not at:
            click.echo(f"learned from {about.tokens:,} tokens in {duration(seconds)}")
        click.echo(f"{about.bits:.2f} bits a value; KL predicted {about.kl:.2e} nats a token")
        click.echo(
            f"measured with what is kept in 16 bits: {measured['bits']:.2f} bits, KL {measured['kl']:.2e}; "
            f"nf4-kv2 there: {measured['nf4-kv2 bits']:.2f} bits, KL {measured['nf4-kv2 kl']:.2e}"
        )


def _facts(file: Path, basis: "Basis", measured: dict[str, float]) -> dict[str, object]:
    about = basis.about
    return {
        "file": str(file), "digest": basis.digest, "nbytes": basis.nbytes, "model": about.model,
        "layers": about.layers, "kv_heads": about.heads, "head_dim": about.dim, "group": about.group,
        "tokens": about.tokens, "bits": about.bits, "kl_predicted": about.kl, "kl_measured": measured["kl"],
        "bits_measured": measured["bits"],
        "nf4-kv2": {"kl": measured["nf4-kv2 kl"], "bits": measured["nf4-kv2 bits"]},
    }  # fmt: skip
