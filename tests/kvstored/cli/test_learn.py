"""kvstored learn: a basis of a real model, better than nf4-kv on a text that taught nothing, and what is refused."""

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from experiments import ExperimentFailed
from experiments.smollm import default_model
from kvstore.codecs.basis import read_basis, use
from kvstore.codecs.kv_learned import Learned
from kvstore.codecs.nf4_kv import NF4KV
from kvstored.cli import cli
from kvstored.cli.calibrating import Model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return default_model()
    except ExperimentFailed as error:
        pytest.skip(str(error))


@pytest.mark.model
@pytest.mark.slow
def test_what_smollm2_teaches_takes_fewer_bits_than_nf4_kv_and_does_less_harm(smollm2: Path, tmp_path: Path) -> None:
    """Learned from Python's manual, judged on a licence."""
    from kvstored.cli.calibrating import Model, harm

    path = tmp_path / "basis.safetensors"
    given = ["learn", "--model", str(smollm2), "--text", str(pydoc_data.topics.__file__), "--tokens", "160+64",
             "--pieces", "5", "--group", "1", "--bits", "2.6", "--output", str(path), "--json",
             "--coarser", str(tmp_path / "coarser.safetensors")]  # fmt: skip
    done = CliRunner().invoke(cli, given)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    basis = read_basis(path)
    assert (told["digest"], told["layers"], told["kv_heads"], told["head_dim"]) == (basis.digest, 30, 3, 64)
    assert 2.4 < told["bits"] <= 2.65
    assert told["kl_measured"] == basis.about.kl_measured > 0
    assert told["kl_predicted"] > 0
    below, coarser = told["coarser"], read_basis(tmp_path / "coarser.safetensors")
    assert (below["digest"], coarser.times(basis)) == (coarser.digest, 3)
    assert below["bits"] < told["bits"] - 0.8
    assert below["kl_measured"] == coarser.about.kl_measured > told["kl_measured"]
    frequencies = basis.rotation.angles[0, 1:] / basis.rotation.angles[0, :-1]
    base = torch.full_like(frequencies, 1e5 ** (-1 / 32))
    assert torch.allclose(frequencies, base, atol=1e-4), "measured on one token: RoPE of base 100,000"
    model = Model(smollm2)
    ids = model.ids((ROOT / "LICENSE").read_text())[600:856]
    with torch.no_grad():
        learned, plain = harm(model, ids, 192, [Learned(use(basis), NF4KV()), NF4KV()])
    assert learned.bits < 0.85 * plain.bits
    assert learned.kl < plain.kl


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--bits", "3", "--max-kl", "0.01"], "exclude each other"),
        (["--group", "2"], "'2' is not one of"),
        (["--bits", "20"], "0.5<=x<=8"),
        (["--output", "/nowhere/at/all/x.safetensors"], "is no directory"),
        ([], "is no model that transformers can load"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_run(given: list[str], why: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    done = CliRunner().invoke(cli, ["learn", "--model", str(tmp_path), "--text", str(text), *given])
    assert done.exit_code == 2
    assert why in done.output.replace("\n", " ")


def test_weights_in_a_pickle_are_not_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    words = Tokenizer(models.WordLevel({str(i): i for i in range(16)}))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    Model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Model(tmp_path)
