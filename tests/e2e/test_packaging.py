"""What is shipped: the wheel's contents, and that its base install is the light client it claims to be."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, START_S

pytestmark = pytest.mark.slow

PACKAGES = ("kvstore", "kvstored", "kvstored_client")
HEAVY = ("torch", "lmdb", "zstandard", "safetensors", "transformers", "grpc_health")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheels` builds of this tree. -O1: the same bytes in half of the time to compile."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler: no wheel of the kernel")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [str(ROOT / "tools/wheels.sh"), sys.executable, str(out)], check=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, timeout=600, env=os.environ | {"CXXFLAGS": "-O1"},
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel of this tree."""
    return next(dist.glob("kvstored-*.whl"))


@pytest.fixture(scope="module")
def kernel_wheel(dist: Path) -> Path:
    """The wheel of its kernel."""
    return next(dist.glob("kvstored_kernel-*.whl"))


@pytest.fixture(scope="module")
def daemon_venv(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which `pip install kvstored[daemon]` was given the built files and no index.

    Links stand for what an index would give beside them: torch is too large to be copied for a test.
    """
    home = tmp_path_factory.mktemp("daemon") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    (packages,) = home.glob("lib/python*/site-packages")
    for found in Path(importlib.metadata.distribution("torch").locate_file("")).iterdir():
        if "kvstored" not in found.name and found.suffix != ".pth" and not (packages / found.name).exists():
            (packages / found.name).symlink_to(found)
    done = pip(home, "install", "--no-index", "--find-links", str(dist), "kvstored[daemon]")
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def pip(venv, *words):
    return run(venv, "python", "-m", "pip", "--disable-pip-version-check", "--isolated", *words)


@pytest.fixture(scope="module")
def bare_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and its base dependencies: no torch, no lmdb."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    install = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*install, "--constraint", str(ROOT / "constraints.txt"), str(wheel)],
        check=True, stdin=subprocess.DEVNULL, timeout=280,
    )  # fmt: skip
    return home


def run(venv, *command, **more):
    env = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("KVSTORED_")
    }
    # From /: a checkout in the working directory would be importable and hide a file missing from the wheel.
    return subprocess.run(
        [str(venv / "bin" / command[0]), *command[1:]],
        cwd="/", env=env | more, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_wheel_has_its_typed_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {*PACKAGES, "experiments"}
    assert {f"{top}/py.typed" for top in (*PACKAGES, "experiments")} <= set(names)
    assert "kvstored_client/wire/_pb/cache_pb2.pyi" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".so", ".toml.orig"))]


def test_the_wheel_has_what_an_operator_copies_and_reads(wheel):
    """Dashboard, alerts, pages and manual were in the tree only."""
    names = zipfile.ZipFile(wheel).namelist()
    shared = {name.split(".data/data/share/")[1] for name in names if ".data/data/share/" in name}
    pages = {f"doc/kvstored/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")}
    wanted = {
        "kvstored/grafana/kvstored.json",
        "kvstored/prometheus/alerts.yml",
        "man/man1/kvstored.1",
        "kvstored/deploy/compose.yml",
    }
    assert (pages | wanted | {"doc/kvstored/README.md", "doc/kvstored/CHANGELOG.md"}) - shared == set()


def test_both_wheels_have_a_licence_a_readme_and_the_projects_addresses(wheel, kernel_wheel):
    addresses = []
    for path in (wheel, kernel_wheel):
        file = zipfile.ZipFile(path)
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist()), path.name
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        told = file.read(metadata).decode()
        assert "License-Expression: Apache-2.0" in told
        assert len(told.split("\n\n", 1)[1].split()) > 100, f"{path.name}: no readme"
        addresses.append(re.search(r"^Project-URL: Repository, (https://\S+)$", told, re.MULTILINE)[1])
    assert len(set(addresses)) == 1
    assert (ROOT / "kernel/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_daemons_extra_names_the_kernel_of_the_same_version():
    ours, kernel = (
        tomllib.loads((ROOT / at).read_text())["project"] for at in ("pyproject.toml", "kernel/pyproject.toml")
    )
    assert f"{kernel['name']}=={kernel['version']}" in ours["optional-dependencies"]["daemon"]
    assert ours["version"] == kernel["version"]


def test_the_kernels_wheel_is_for_every_python_3_on_systems_that_have_its_symbols(kernel_wheel):
    name = re.fullmatch(r"kvstored_kernel-[\d.]+-py3-none-(\w+)\.whl", kernel_wheel.name)[1]
    found = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)", name)
    assert found, name
    assert 17 <= int(found[1]) <= 35
    file = zipfile.ZipFile(kernel_wheel)
    (wheel,) = (name for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
    assert f"Tag: py3-none-{name}\n" in file.read(wheel).decode()


def test_the_tag_follows_from_what_the_library_needs():
    """Each policy's own limit fits it, a symbol more needs the next, and an unknown library fits none."""
    hook = hook_of_the_kernel()
    libraries = ["libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"]
    for (glibc, glibcxx, cxxabi), after in zip(hook.POLICIES, hook.POLICIES[1:], strict=False):
        needs = {"GLIBC": glibc, "GLIBCXX": glibcxx, "CXXABI": cxxabi}
        assert hook.platform(needs, libraries, "aarch64") == f"manylinux_2_{glibc[1]}_aarch64"
        needs["GLIBC"] = (glibc[0], glibc[1] + 1)
        assert hook.platform(needs, libraries, "x86_64") == f"manylinux_2_{after[0][1]}_x86_64"
    assert hook.platform({"GLIBC": (2, 14)}, [*libraries, "libcuda.so.1"], "x86_64").startswith("linux_")
    assert hook.platform({"GLIBC": (2, 99)}, libraries, "x86_64").startswith("linux_")
    assert hook.platform({}, [], "x86_64").startswith("linux_"), "nothing is known without readelf"
    assert hook.platform({"GLIBC": (2, 14)}, libraries, "").startswith("linux_"), "not glibc"


def hook_of_the_kernel():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "kernel/hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_source_archives_have_what_they_are_built_from(dist):
    """The wheels were built from them; what only a reader or a packager wants is there, too."""
    for name, wanted in {
        "kvstored": ("tests/conftest.py", "kernel/compile.sh", "docs/operations.md", "SECURITY.md", "CITATION.cff"),
        "kvstored_kernel": ("src/kvstored_kernel.h", "compile.sh", "README.md", "LICENSE"),
    }.items():
        (path,) = dist.glob(f"{name}-[0-9]*.tar.gz")
        with tarfile.open(path) as archive:
            names = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
        assert set(wanted) <= names, path.name


@contextmanager
def serving(venv, top):
    """The environment's own daemon; yields its address and its log's path."""
    address, log = f"unix:{top}/k.sock", top / "log"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(venv / "bin/kvstored"), "serve", "--data-dir", str(top / "data"), "--address", address],
            cwd="/", env=env, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while "listening address=" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield address, log
    finally:
        process.terminate()
        process.wait(START_S)


NF4 = """
import sys, numpy as np
from kvstored_client import Client
with Client(sys.argv[1], on_error="raise", framework="numpy") as cache:
    k = np.random.default_rng(0).standard_normal((4, 256, 2, 64), dtype=np.float32)
    assert cache.put(b"k", {"k": k, "v": k})
    assert cache.demote(b"k") == 1
    hit = cache.get(b"k")
    print(hit.lossy, hit.encoding)
"""


def test_the_daemons_extra_brings_the_kernel_and_the_installed_daemon_uses_it(daemon_venv, tmp_path):
    """pip install kvstored[daemon] had none: encoding cost 35 times the CPU, and nothing said so."""
    with serving(daemon_venv, tmp_path) as (address, log):
        done = run(daemon_venv, "python", "-c", NF4, address)
        assert (done.returncode, done.stdout) == (0, "True nf4-kv2\n"), done.stderr
        assert "codec kernel" not in log.read_text()
        doctor = run(daemon_venv, "kvstored", "doctor", "--json", KVSTORED_ADDRESS=address)
        assert [line["verdict"] for line in map(json.loads, doctor.stdout.splitlines()) if "codec" in line["what"]] == [
            "good"
        ]
    where = run(
        daemon_venv,
        "python",
        "-c",
        "import kvstored_kernel, kvstore; print(kvstored_kernel.__file__, kvstore.__file__)",
    )
    assert all(path.startswith(str(daemon_venv)) for path in where.stdout.split())
    assert (daemon_venv / "share/kvstored/grafana/kvstored.json").exists()
    assert (daemon_venv / "share/man/man1/kvstored.1").exists()


def test_a_daemon_without_the_kernel_warns_at_start_and_doctor_calls_it_bad(daemon_venv, tmp_path):
    """Last of the tests with this environment: the kernel is taken out of it."""
    assert pip(daemon_venv, "uninstall", "--yes", "kvstored-kernel").returncode == 0
    with serving(daemon_venv, tmp_path) as (address, log):
        (line,) = (line for line in log.read_text().splitlines() if "codec kernel" in line)
        assert "WARNING" in line
        assert "pip install kvstored-kernel==" in line
        doctor = run(daemon_venv, "kvstored", "doctor", KVSTORED_ADDRESS=address)
        assert doctor.returncode == 4
        assert "BAD   no compiled codec kernel" in doctor.stdout
        done = run(daemon_venv, "python", "-c", NF4, address)
        assert (done.returncode, done.stdout) == (0, "True nf4-kv2\n"), done.stderr


def test_the_client_imports_nothing_heavy(bare_venv):
    code = "import sys, json, kvstored_client, kvstored.cli, kvstore; print(json.dumps(sorted(sys.modules)))"
    done = run(bare_venv, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(json.loads(done.stdout))
    for name in HEAVY:
        assert run(bare_venv, "python", "-c", f"import {name}").returncode == 1


def test_the_client_of_a_bare_install_speaks_to_a_daemon(bare_venv, daemon):
    code = """
import sys, numpy as np, ml_dtypes
from kvstored_client import Client
with Client(sys.argv[1], on_error="raise") as cache:
    k = np.arange(12, dtype=np.float32).reshape(3, 4)
    v = k.astype(ml_dtypes.bfloat16)
    assert cache.put(b"bare", {"k": k, "v": v})
    hit = cache.get(b"bare")
    assert (hit.tensors["k"] == k).all() and hit.tensors["v"].dtype == v.dtype
    print(hit.tier)
"""
    done = run(bare_venv, "python", "-c", code, daemon.address)
    assert (done.returncode, done.stdout) == (0, "hot\n"), done.stderr


def test_the_command_of_a_bare_install_runs_and_serve_names_the_extra(bare_venv, daemon, tmp_path):
    assert run(bare_venv, "kvstored", "--version").stdout.startswith("kvstored, version ")
    stats = run(bare_venv, "kvstored", "stats", "--json", KVSTORED_ADDRESS=daemon.address)
    assert stats.returncode == 0, stats.stderr
    serve = run(bare_venv, "kvstored", "serve", "--data-dir", str(tmp_path), "--address", f"unix:{tmp_path}/s")
    assert serve.returncode == 2
    assert "pip install 'kvstored[daemon]'" in serve.stderr
    experiments = run(bare_venv, "kvstored", "experiments", "run", "all")
    assert experiments.returncode == 2
    assert "pip install 'kvstored[experiments]'" in experiments.stderr


def test_the_engine_of_a_bare_install_says_what_is_missing(bare_venv):
    done = run(bare_venv, "python", "-c", "import kvstore; print(kvstore.Identity, kvstore.ConfigError); kvstore.Store")
    assert done.returncode == 1
    assert "torch" in done.stderr.splitlines()[-1]
