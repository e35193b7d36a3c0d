"""The README is true: its commands exist, its quick start runs, its links lead somewhere."""

import re
import subprocess
import sys

import pytest

from kvstored.cli import cli
from tests.conftest import ROOT, environment

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_quick_start_runs_as_it_stands(daemon):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 20
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(KVSTORED_ADDRESS=daemon.address), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "512 tokens need no prefill\nhot raw False\n2 chunks held\n"


def test_the_quick_start_means_the_same_without_a_daemon(tmp_path):
    (code,) = blocks("python")
    code = code.replace("from kvstored_client import Client", "from kvstore import Store")
    code = code.replace("Client()", f"Store.open({str(tmp_path / 'kv')!r})")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "512 tokens need no prefill\nhot raw False\n2 chunks held\n"


def test_its_commands_are_targets_of_make():
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert commands == ["make demo", "make test"]
    for command in commands:
        done = subprocess.run(
            [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_verbs_it_names_exist():
    line = next(line for line in README.splitlines() if line.startswith("On the command line:"))
    verbs = [word.removeprefix("kvstored ") for word in re.findall(r"`([a-z ]+)`", line)]
    assert verbs
    assert set(verbs) <= set(cli.commands)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/operations.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page):
    path = ROOT / page
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
