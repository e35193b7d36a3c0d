"""The house: documents that name everything there is, a tree without what may not be in it."""

import dataclasses
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

import kvstore
from kvstore import errors
from kvstore.config import StoreConfig
from kvstore.keys import KEY_MAX_NBYTES
from kvstored.cli import cli, exits
from kvstored.settings import Settings
from tests.conftest import ROOT
from tests.mutants.mutations import Mutant
from tests.mutants.prepared import prepared
from tests.mutants.running import change, put_first

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MANUAL = (ROOT / "docs" / "cli.md").read_text()


def settings_of(kind: object, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        nested = dataclasses.is_dataclass(value)
        names += settings_of(value, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return names


def files() -> list:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_setting_is_documented():
    missing = [name for name in settings_of(Settings()) if f"`{name}`" not in OPERATIONS]
    assert missing == []


def test_no_setting_is_documented_that_does_not_exist():
    named = set(re.findall(r"`((?:server|store)\.[a-z_.]+)`", OPERATIONS))
    assert named - set(settings_of(Settings())) == set()


def test_every_verb_and_each_of_its_options_is_documented():
    for name, command in cli.commands.items():
        assert f"## kvstored {name}\n" in MANUAL, name
        for option in command.params:
            if option.param_type_name == "option":
                assert all(word in MANUAL for word in option.opts), option.opts
    assert set(re.findall(r"`kvstored ([a-z-]+)", OPERATIONS)) <= set(cli.commands)


def test_what_is_too_long_is_named_with_the_limit(tmp_path, capsys):
    sizes = runpy.run_path(str(ROOT / "tools" / "sizes.py"))
    folder = tmp_path / "kvstore" / "folder"
    (folder / "_pb").mkdir(parents=True)
    (folder / "_pb" / "generated.py").write_text("\n" * 501)
    (folder / "short.py").write_text("x = 1\n" * 500)
    long = ["async def f():", *["    x = 1"] * 60, "class C:", "    def g(self):", *["        x = 1"] * 59]
    (folder / "functions.py").write_text("\n".join(long))
    assert list(sizes["too_long"](tmp_path)) == ["kvstore/folder/functions.py:1 f: 61 lines, at most 60; split it"]
    assert sizes["main"](tmp_path) == 1
    assert "functions.py:1" in capsys.readouterr().out
    (folder / "functions.py").write_text("x = 1\n" * 501)
    (found,) = sizes["too_long"](tmp_path)
    assert found == "kvstore/folder/functions.py: 501 lines, at most 500; split it by subject"
    (folder / "functions.py").unlink()
    assert sizes["main"](tmp_path) == 0


def test_every_exit_code_is_documented():
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", OPERATIONS, re.MULTILINE)} == codes | {70}


def test_every_error_is_documented_with_what_to_do():
    named = [kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)]
    rows = re.findall(
        r"^\| (.+?) \| [^|]*\| (.+?) \|$", OPERATIONS.split("## Errors")[1].split("\n## ")[0], re.MULTILINE
    )
    assert all(todo for _, todo in rows)
    assert [name for name in named if not any(what.startswith(name) for what, _ in rows)] == []


def test_every_error_of_ours_is_importable_from_kvstore_errors_and_in_its_tree():
    """What a caller may want to catch has one address; what is only said within the daemon has none."""
    for path in sorted((ROOT / "kvstore").rglob("*.py")) + sorted((ROOT / "client").rglob("*.py")):
        text = path.read_text()
        if path.name != "errors.py":
            for name, base in re.findall(r"^class (\w+)\((\w+)\):", text, re.MULTILINE):
                assert not issubclass(getattr(errors, base, object), errors.KvstoreError), f"{name} in {path}"
    drawn = re.findall(r"(?:\|--|`--) (\w+)  ", errors.__doc__)
    named = [kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)]
    assert sorted([*drawn, "KvstoreError"]) == sorted(named)
    assert "Busy" not in named
    assert not hasattr(errors, "Busy")


def test_every_counter_is_documented(daemon):
    with daemon.client() as client:
        values = client.stats().values
    names = {re.sub(r"_[A-Z]\w*/\w+$", "_METHOD", name) for name in values}
    assert [name for name in names if f"`{name}`" not in OPERATIONS] == []


def test_every_exported_name_of_the_engine_exists():
    assert set(kvstore.__all__) == set(kvstore._HOME)
    second = {"TensorInfo": "TensorSpec"}  # one class, two names
    assert all(getattr(kvstore, name).__name__ == second.get(name, name) for name in kvstore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Stor'"):
        _ = kvstore.Stor


def test_the_client_takes_only_light_modules_of_the_engine():
    allowed = {"arrays", "dtypes", "errors", "hit", "keys", "lookup", "options", "ownership", "prefix", "shm", "stats"}
    allowed |= {"device", "packed", "pieces", "ready"}
    # Once an encoded entry came, which none does unless it was asked for: see decoding.py.
    inside_functions = {"decoding.py": {"codecs", "entries", "kernels"}, "landing.py": {"codecs"}}
    inside_functions["paged.py"] = {"codecs", "kernels"}
    client = ROOT / "client" / "kvstored_client"
    # An integration runs inside its engine's process, where torch is; `simple` embeds a store there.
    for path in sorted(path for path in client.rglob("*.py") if "integrations" not in path.parts):
        text = path.read_text()
        taken = set(re.findall(r"^\s*(?:from|import) kvstore\.(\w+)", text, re.MULTILINE))
        taken |= set(re.findall(r"^\s*from kvstore import (\w+)", text, re.MULTILINE))
        assert taken <= allowed | inside_functions.get(path.name, set()), path
        at_import = set(re.findall(r"^(?:from|import) kvstore\.(\w+)", text, re.MULTILINE))
        assert at_import <= allowed, path


ENGINES = {"kvpress", "llama-cpp", "lmcache", "sglang", "vllm"}
"""Installed in venvs of their own, whose scripts in tools/engines/ pin them."""


def test_every_dependency_is_pinned_for_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra, names in project["optional-dependencies"].items() if extra not in ENGINES for name in names),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[<>=~! \[]", name)[0].lower().replace("_", "-") for name in wanted}
    ours = {project["name"], "kvstored-kernel"}  # an extra may name others of ours; the kernel is compiled from kernel/
    assert names - pinned - ours == set()


def test_nothing_in_the_tree_can_run_code_when_it_is_read_or_names_a_machine():
    # Written as patterns, so that this file may stand in the tree itself. safetensors' own load runs no code.
    forbidden = [
        r"import [p]ickle",
        r"[p]ickle\.loads?\(",
        r"(?<!safetensors\.)torch[.]load\(",
        r"/[w]ork/",
        r"/[r]oot/\w",
    ]
    # Reads back, as its user would, the model that the test itself has saved a line before.
    own = {"tests/e2e/test_generate_calls.py: " + forbidden[2]}
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in forbidden if re.search(word, text)]
    assert set(found) - own == set()


def test_the_defaults_of_the_engine_are_valid():
    assert StoreConfig() == Settings().store


def test_every_change_prepared_for_make_mutants_still_finds_its_line():
    assert len(prepared(ROOT)) > 60


def test_a_process_that_a_test_starts_sees_the_change_of_make_mutants(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    file, line = "kvstore/keys.py", b"KEY_MAX_NBYTES = "
    source = (ROOT / file).read_bytes()
    start = source.index(line) + len(line)
    put_first(change(Mutant(file, 1, "constant", (start, start), "", "1000 + "), source, tmp_path))
    asked = [sys.executable, "-c", "from kvstore.keys import KEY_MAX_NBYTES; print(KEY_MAX_NBYTES)"]
    said = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == (f"{1000 + KEY_MAX_NBYTES}\n", "")
