"""docs/contributing.md, followed: every step is done in a copy of the tree, and the tests that it names run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "contributing.md").read_text()
COPIED = ("bench", "client", "daemon", "docs", "examples", "experiments", "kvstore", "proto", "tests", "tools")
STEP = re.compile(r"^\*\*`([^`]+)`\*\*( \(new\))?\n((?:\n```\w+\n.*?^```\n)+)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 600
RECIPES = ("A policy", "A codec", "An engine adapter", "A verb of the command line", "A setting")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def steps(heading: str) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """(file, whether it is new, its blocks) of each step of a recipe."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [(name, bool(new), BLOCK.findall(blocks)) for name, new, blocks in STEP.findall(section)]
    assert sum(len(blocks) for *_, blocks in found) == section.count("\n```") / 2, "a block that no step owns"
    return found


def changed(text: str, diff: str) -> str:
    """A text after a change, whose lines begin with a blank, - or +."""
    lines = diff.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert text.count(f"\n{old}\n") == 1, f"not once in the file:\n{old}"
    return text.replace(f"\n{old}\n", f"\n{new}\n")


def follow(heading: str, tree: Path) -> list[str]:
    """Do the steps of a recipe. Returns the new files."""
    made = []
    for name, new, blocks in steps(heading):
        path = tree / name
        assert path.exists() is not new, name
        for kind, text in blocks:
            assert (kind == "diff") is not new, name
            path.write_text(text if new else changed(path.read_text(), text))
        if new:
            made.append(name)
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests of the recipes need, with every step of the page done."""
    top = tmp_path_factory.mktemp("tree")
    left_out = shutil.ignore_patterns("__pycache__", "weights", "data", "*.so")
    for name in COPIED:
        shutil.copytree(ROOT / name, top / name, ignore=left_out)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, top)
    made = [name for heading in RECIPES for name in follow(heading, top) if name.endswith(".py")]
    assert len(made) == 7
    run(top, "-m", "ruff", "check", *made)  # the page's code is as the linter wants it
    run(top, "-m", "ruff", "format", "--check", *made)
    (top / "docs" / "cli.md").write_text(run(top, "-m", "kvstored.cli.manual"))
    return top


def run(tree: Path, *command: str) -> str:
    paths = [tree, tree / "daemon", tree / "client", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_page_adds_passes_the_tests_that_it_names(tree):
    """The policy its contract, the codec warm and cold, the verb and the setting their own tests and the documents'."""
    wanted = "clock or bounds_its_ghosts or bf16 or uptime or banner or verb or setting"
    files = [
        "tests/contract/test_policies.py", "tests/kvstore/codecs/test_bf16.py", "tests/kvstored/cli/test_uptime.py",
        "tests/kvstored/test_banner.py", "tests/e2e/test_house.py",
    ]  # fmt: skip
    said = run(tree, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", *files, "-k", wanted)
    for part in ("[clock]", "test_bf16", "test_uptime", "test_banner", "every_verb", "every_setting"):
        assert part in said, f"nothing of {part} was run:\n{said}"


def test_an_adapter_added_by_the_page_keeps_the_contract(tree):
    keeps = "bit_for_bit or what_is_gone or keeping_twice or deadline_of_a_lookup"
    said = run(
        tree, "-m", "pytest", "tests/e2e/adapters", "--engine", "toy", "-k", keeps, "-W", "ignore", "-q",
        "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
    )  # fmt: skip
    assert "4 passed" in said
