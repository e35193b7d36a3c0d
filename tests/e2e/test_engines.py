"""The contract suite over every adapter, each engine's in a process of its own with its wheel on the path."""

import pytest

from tests.conftest import DaemonProcess
from tests.side import adapters_tried, side, why_missing

pytestmark = [pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(1800)]
ENGINES = {
    "drop-in": [], "transformers": [], "lmcache": ["shared", "lmcache"], "sglang": ["shared", "sglang"],
    "vllm": ["shared", "vllm"], "kvpress": ["kvpress", "shared"], "llama": ["llama"],
}  # fmt: skip
"""Each engine's folders of wheels."""


@pytest.mark.parametrize("engine", ENGINES)
def test_adapter(engine: str, daemon: DaemonProcess) -> None:
    for folder in ENGINES[engine]:
        if missing := why_missing(folder):
            pytest.skip(missing)
    done = adapters_tried(engine, [side() / folder for folder in ENGINES[engine]], daemon.address)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
