"""A compiled kernel of another ABI is not used, and somebody is told: it was installed to be used."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 - a client decodes by itself only where it is imported
from click.testing import CliRunner

from kvstore.kernels import cpu
from kvstored.cli import cli
from kvstored_client import decoding


def install(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    """A kernel that answers so, in place of the one that is installed or is not."""
    module = SimpleNamespace(LIBRARY_PATH="/nowhere/libkvstored_kernel.so")
    monkeypatch.setattr(cpu.importlib, "import_module", lambda _name: module)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _path: library)


OTHERS = [(SimpleNamespace(kvk_abi=lambda: cpu.ABI - 1), cpu.ABI - 1), (SimpleNamespace(), 0)]


@pytest.mark.parametrize(("library", "abi"), OTHERS, ids=["older", "without a number"])
def test_a_kernel_of_another_abi_is_left_out_with_one_warning_that_names_both(
    library: object, abi: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left out in silence, and codecs were ten times slower."""
    install(monkeypatch, library)
    with caplog.at_level(logging.INFO):
        assert cpu._opened() is None
    [line] = caplog.records
    assert line.levelno == logging.WARNING
    assert all(word in line.getMessage() for word in (f"abi={abi} ", f"needed={cpu.ABI} ", "make kernel"))


def test_no_kernel_is_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(_name: str) -> None:
        raise ImportError

    monkeypatch.setattr(cpu.importlib, "import_module", missing)
    assert cpu._opened() is None
    assert caplog.records == []


def test_doctor_calls_it_bad_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstored.cli.doctor import _kernel
    from kvstored.settings import Settings

    install(monkeypatch, OTHERS[0][0])
    [found] = _kernel(Settings())
    assert found.verdict == "bad"
    assert str(cpu.ABI - 1) in found.what
    assert str(cpu.ABI) in found.what
    assert "make kernel" in found.todo
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == 4
    assert found.what in [json.loads(line)["what"] for line in done.output.splitlines()]


def test_doctor_calls_a_missing_kernel_bad_and_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a note that named `make kernel`, which who installs with pip does not have."""
    monkeypatch.setattr(cpu, "LIBRARY", None)
    monkeypatch.setattr(cpu, "installed", lambda: (None, 0))
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == 4
    [found] = [line for line in map(json.loads, done.output.splitlines()) if "codec kernel" in line["what"]]
    assert found["verdict"] == "bad"
    assert "pip install kvstored-kernel==" in found["todo"]


def test_a_client_asks_for_nothing_encoded_where_the_kernel_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch decodes slower than the bytes travel."""
    monkeypatch.setattr(decoding, "find_spec", lambda _name: object())
    for library, accepted in ((None, ()), (object(), decoding.ENCODINGS)):
        monkeypatch.setattr(cpu, "LIBRARY", library)
        decoding._has_kernel.cache_clear()
        try:
            assert decoding.accepted("auto") == accepted
        finally:
            decoding._has_kernel.cache_clear()
