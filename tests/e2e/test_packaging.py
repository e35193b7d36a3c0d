"""What is shipped: the wheel's contents, and that its base install is the light client it claims to be."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

PACKAGES = ("kvstore", "kvstored", "kvstored_client")
HEAVY = ("torch", "lmdb", "zstandard", "safetensors", "transformers", "grpc_health")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: hatchling is in this environment, and nothing has to be downloaded.
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "-w", str(out), str(ROOT)],
        check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    return next(out.glob("kvstored-*.whl"))


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
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, "experiments"}
    assert {f"{top}/py.typed" for top in (*PACKAGES, "experiments")} <= set(names)
    assert "kvstored_client/wire/_pb/cache_pb2.pyi" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".so", ".toml.orig"))]


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
