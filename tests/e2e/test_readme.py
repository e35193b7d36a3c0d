"""The README is true: its commands exist, its snippets run, its sizes are measured, its links lead somewhere."""

import re
import runpy
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvstore.config import StoreConfig
from kvstored.cli import cli
from tests.conftest import ROOT, environment

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "docs/architecture.md", "docs/operations.md", "CONTRIBUTING.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def ran(code: str, cwd: object = None, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.model
def test_the_first_snippet_runs_without_a_daemon_and_its_second_run_finds_the_document(smollm, tmp_path):
    first, _ = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 20
    name = 'name = "HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert first.count(name) == 1
    code = first.replace(name, f"name = {smollm[0].config.name_or_path!r}")
    shown = [ran(code, tmp_path, OMP_NUM_THREADS="1", KVSTORED_ADDRESS="unix:/nowhere/k.sock") for _ in range(2)]
    usages = [dict(re.findall(r"(\w+)=(\d+)", text.splitlines()[-1])) for text in shown]
    assert shown[0].splitlines()[:-1] == shown[1].splitlines()[:-1], "the same answers"
    asked, *restored = (int(usages[0]["prompt_tokens"]), *(int(usage["restored_tokens"]) for usage in usages))
    assert 512 <= restored[0] < asked / 2 + 256, "the second question finds the document"
    assert restored[1] == asked - 2, "the second process finds all but the token that every prompt needs"


def test_the_snippet_of_the_client_runs_as_it_stands(daemon):
    _, code = blocks("python")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 20
    assert ran(code, KVSTORED_ADDRESS=daemon.address) == "512 tokens need no prefill\nhot raw False\n2 chunks held\n"


def test_the_snippet_of_the_client_means_the_same_without_a_daemon(tmp_path):
    _, code = blocks("python")
    code = code.replace("from kvstored_client import Client", "from kvstore import Store")
    code = code.replace("Client()", f"Store.open({str(tmp_path / 'kv')!r})")
    assert ran(code) == "512 tokens need no prefill\nhot raw False\n2 chunks held\n"


def test_the_snippet_of_the_client_ends_well_where_no_daemon_runs(tmp_path):
    """It ended in an AttributeError of None."""
    _, code = blocks("python")
    assert ran(code, KVSTORED_ADDRESS=f"unix:{tmp_path}/k.sock") == "0 tokens need no prefill\n"


def commands() -> list[str]:
    return [
        line.split("  #")[0].strip().removesuffix("&").strip()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.strip()
    ]


def test_its_commands_are_targets_of_make_verbs_or_installs_that_name_what_is_there():
    made = [command for command in commands() if command.startswith("make ")]
    assert made == ["make demo", "make test"]
    for command in made:
        done = subprocess.run(
            [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    verbs = [command.split()[1:] for command in commands() if command.startswith("kvstored ")]
    assert verbs == [["serve"], ["doctor"]]
    for verb in verbs:
        assert CliRunner().invoke(cli, [*verb, "--help"]).exit_code == 0
    installs = [command for command in commands() if command.startswith("pip install ")]
    assert installs == [
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "pip install ./kernel '.[daemon,transformers]'",
    ]
    assert len(commands()) == len([*made, *verbs, *installs])


def test_the_verbs_it_names_exist():
    line = next(line for line in README.splitlines() if line.startswith("On the command line:"))
    verbs = [word.removeprefix("kvstored ") for word in re.findall(r"`([a-z ]+)`", line)]
    assert verbs
    assert set(verbs) <= set(cli.commands)


def test_what_a_thousand_tokens_take_is_measured(smollm):
    capacity = runpy.run_path(str(ROOT / "tools/capacity.py"))
    rows = capacity["rows"]()
    assert len(rows) == 8
    assert [row for row in rows if row not in README.splitlines()] == [], "python tools/capacity.py writes them"
    config = smollm[0].config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = config.num_hidden_layers, config.num_key_value_heads, head_dim
    assert capacity["MODELS"]["SmolLM2-135M"] == shape
    (told,) = re.findall(r"64 GiB of warm hold about ([\d,]+) tokens of (\S+), or ([\d,]+) of (\S+)\.\n", README)
    for tokens, name in (told[:2], told[2:]):
        nf4 = next(float(row.split("|")[5]) for row in rows if f" {name} " in row)
        assert int(tokens.replace(",", "")) == round(64 * 2**30 / (nf4 * 1e6), -4)


def test_the_deadline_it_states_is_the_default():
    assert "**Entries leave one hour after their last use**" in README
    assert StoreConfig().ttl_s == 3600


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    path = ROOT / page
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
