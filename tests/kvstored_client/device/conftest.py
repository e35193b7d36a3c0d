"""A daemon for clients with a GPU."""

import pytest

from kvstored_client.integrations.guard import Guard
from tests.kvstored.inside import daemon_inside

from .tensors import COPIES
from .test_landing import Counting


@pytest.fixture(scope="module")
def daemon():
    with daemon_inside(segment_nbytes=8 << 20) as found:
        yield found


@pytest.fixture
def driver():
    COPIES.clear()
    return Counting(kernels=True)


@pytest.fixture
def guard(daemon, driver):
    guard = Guard(daemon.client(framework="torch", driver=driver))
    yield guard
    guard.cache.close()
