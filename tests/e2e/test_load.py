"""The short form of `make load`: many clients, no error but RESOURCE_EXHAUSTED, memory within its budgets."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_clients_at_once_meet_no_error_but_exhaustion():
    done = subprocess.run(
        [sys.executable, "bench/load.py", "--clients", "4", "--streams", "8", "--seconds", "8", "--largest-mib", "8",
         "--json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == [], found
    assert found["put"]["calls"] > 0
    assert found["get"]["calls"] > 0
