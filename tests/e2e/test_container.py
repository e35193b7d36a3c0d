"""The container file, where nothing here can build one: what it names exists, what it starts is a command of ours."""

import json
import re
import shlex
import tomllib

import pytest
from click.testing import CliRunner

from kvstored.cli import cli
from kvstored.settings import load_settings
from tests.conftest import ROOT

LINES = (ROOT / "daemon/Containerfile").read_text().replace("\\\n", " ").splitlines()
IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "*", "."))
]


def arguments(word):
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{word} ")]


def test_every_file_it_copies_is_in_the_tree_and_is_sent():
    for line in arguments("COPY"):
        if line.startswith("--from="):
            continue
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] not in IGNORED, f"{source} is in .dockerignore"


def test_what_the_build_reads_is_sent():
    """The tree's own build file is run: its packages, and what it includes by force."""
    text = (ROOT / "pyproject.toml").read_text()
    wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    forced = re.findall(r'^"([a-z/.]+)" = "kvstored/', text, re.MULTILINE)
    assert wheel
    assert forced
    shared = re.findall(r'^"([\w/.]+)" = "share/', text, re.MULTILINE)
    assert shared
    for path in (*forced, *wheel, *shared, "README.md", "LICENSE", "constraints.txt", "kernel/pyproject.toml"):
        assert (ROOT / path).exists(), path
        assert path.split("/")[0] not in IGNORED, path


def test_it_installs_the_kernel_and_a_torch_without_cuda():
    (build,) = (line for line in arguments("RUN") if "venv" in line)
    assert " /src/kernel '/src[daemon]'" in build
    assert arguments("ARG") == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]
    assert any("g++" in line for line in arguments("RUN")), "the kernel is compiled there"


@pytest.mark.parametrize("word", ["CMD", "HEALTHCHECK"])
def test_what_it_runs_is_a_verb_with_options_that_exist(word):
    (line,) = arguments(word)
    program, verb, *options = json.loads(line[line.index("[") :])
    assert program == "kvstored"
    known = {name for option in cli.commands[verb].params for name in option.opts}
    assert {one for one in options if one.startswith("--")} <= known
    assert CliRunner().invoke(cli, [verb, "--help"]).exit_code == 0


def test_it_runs_without_rights_on_directories_that_it_makes_for_that_user():
    (user,) = arguments("USER")
    made = " ".join(arguments("RUN"))
    (volumes,) = arguments("VOLUME")
    for path in json.loads(volumes):
        assert re.search(rf"install -d -o {user} -g {user} -m 07[05]0 {path}(?: |$)", made), path
    (environment,) = arguments("ENV")
    names = dict(word.split("=", 1) for word in shlex.split(environment))
    settings = load_settings(ROOT / "daemon/kvstored.toml", environ=names)
    assert {settings.server.data_dir, "/run/kvstored"} == set(json.loads(volumes))
    assert settings.server.address == "unix:/run/kvstored/kvstored.sock"
