"""What is installed, and from where: every file by its hash, nothing as root unannounced, and a bill of it all."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.conftest import ROOT

LOCKS = ROOT / "tools/locks"
UNLOCKED = {"torch"}
"""By version alone: tools/venv.sh says why."""
OURS = {"kvstored", "kvstored-kernel"}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    return {normal(match[1]): match[2] for line in text.splitlines() if (match := PIN.match(line))}


def locked(name):
    """Versions by package; each has a hash."""
    text = (LOCKS / f"{name}.lock").read_text()
    for block in re.split(r"\n(?=[A-Za-z])", text):
        if PIN.match(block):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    return pins(text)


def test_every_pin_is_locked_with_hashes_but_torch_alone():
    wanted = pins((ROOT / "constraints.txt").read_text())
    found = locked("all") | locked("installers") | locked("model")
    assert {name: version for name, version in wanted.items() if name not in UNLOCKED} == found
    assert {"pip", "setuptools"} <= set(locked("installers"))
    for pinned in LOCKS.glob("*.in"):
        assert pins(pinned.read_text()).items() <= locked(pinned.stem).items(), pinned.name


def test_every_installed_distribution_is_locked_at_its_version():
    wanted = locked("all") | locked("installers") | locked("model")
    installed = {normal(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    # pip and setuptools: an environment that several work trees share has what its Python brought.
    installers = {"pip", "setuptools"} if os.environ.get("VENV", ".venv") != ".venv" else set()
    # A build of torch for a GPU brings its libraries.
    aside = {name for name in installed if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    for name in OURS | UNLOCKED | installers | aside:
        installed.pop(name, None)
    assert {name: version for name, version in installed.items() if wanted.get(name) != version} == {}


def test_what_the_two_commands_install_from_an_index_they_install_by_hash():
    """Each pip command of theirs has --require-hashes, or --no-index, or names torch alone."""
    for script in ("tools/venv.sh", "tools/model.sh", "tools/engines/side.sh"):
        text = re.sub(r"\\\n\s*", " ", (ROOT / script).read_text())
        commands = [line for line in text.splitlines() if re.search(r"\bpip\b.* install\b|^\s*pip install\b", line)]
        commands = [line for line in commands if "fail " not in line and not line.lstrip().startswith("#")]
        assert commands, script
        for command in commands:
            known = "--require-hashes" in command or "--no-index" in command or "'^torch=='" in command
            assert known or command.strip() == 'pip install "$@"', command  # the caller's words: --bare
    for caller in ("Makefile", "tests/mutants.mk", "kernel/kernel.mk"):
        for line in (ROOT / caller).read_text().splitlines():
            if "--bare" in line and ".venv-lock" not in line:
                assert "--require-hashes" in line, line


def wheel(directory, name, version):
    """A wheel that nobody locked."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "raise SystemExit('not what was locked')\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_a_file_with_other_bytes_than_were_locked_is_refused_in_words_and_not_installed(tmp_path):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    for name, version in locked("installers").items():
        wheel(files, name, version)
    # An environment whose pip is this one's.
    venv.create(tmp_path / ".venv", with_pip=False)
    (packages,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (packages / "pip").symlink_to(str(importlib.metadata.distribution("pip").locate_file("pip")))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    done = subprocess.run(
        ["tools/venv.sh", sys.executable, ".venv"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(files), "PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "kvstored: not installed: see above. If it is a hash, the index gave a file with other bytes" in done.stderr
    assert not list(packages.glob("setuptools*"))


@pytest.fixture
def root_without_tools(tmp_path):
    """An environment in which root has none of the commands, and an apt-get that only says what it is told."""
    for name, text in {
        "id": "echo 0",
        "apt-get": 'echo "apt-get $*"',
        "grep": 'exec /bin/grep "$@"',
        "python3.11": 'case "$*" in *ensurepip*) exit 1;; *%d.%d*) echo 3.11;; *venv*) exit 3;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": str(tmp_path)}


def test_packages_are_announced_by_name_before_apt_get_runs(root_without_tools):
    done = subprocess.run(
        [str(ROOT / "tools/packages.sh")],
        env=root_without_tools,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first = done.stdout.splitlines()[0]
    assert first.startswith("kvstored: ")
    assert "as root I install them: apt-get update; apt-get install -y make git gcc g++" in first
    assert not first.startswith("apt-get")


def test_the_package_of_venv_is_announced_before_apt_get_runs(root_without_tools, tmp_path):
    done = subprocess.run(
        [str(ROOT / "tools/venv.sh"), "python3.11", str(tmp_path / "new")],
        env=root_without_tools, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "as root I run: apt-get update; apt-get install -y python3.11-venv" in done.stdout.splitlines()[0]


def test_the_bill_of_materials_names_every_distribution_and_who_needs_whom():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/sbom.py")], capture_output=True, text=True, timeout=60, check=True
    )
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    installed = {normal(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    listed = {normal(one["name"]): one["version"] for one in bill["components"]}
    assert listed == {name: version for name, version in installed.items() if name != "kvstored"}
    components = [bill["metadata"]["component"], *bill["components"]]
    references = [one["bom-ref"] for one in components]
    assert len(set(references)) == len(references)
    for one in components:
        assert one["type"] in ("library", "application")
        assert one["name"]
    for one in bill["components"]:
        assert one["purl"] == f"pkg:pypi/{normal(one['name'])}@{one['version']}"
    # What the specification asks of the graph: each entry once, and all of them in the document.
    graph = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    assert len(graph) == len(bill["dependencies"])
    assert set(graph) <= set(references)
    assert {name for needs in graph.values() for name in needs} <= set(references)
    grpcio = f"pkg:pypi/grpcio@{installed['grpcio']}"
    assert any(grpcio in needs for needs in graph.values())


def test_the_security_policy_names_a_way_to_report_and_what_is_supported():
    text = (ROOT / "SECURITY.md").read_text()
    for words in ("Report a vulnerability", "in private", "Supported", "tools/locks", "make sbom", "make audit"):
        assert words in text, words
    assert (ROOT / "docs/security.md").exists()
