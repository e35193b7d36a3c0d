"""A daemon for clients with a GPU."""

import pytest

from tests.kvstored.inside import daemon_inside


@pytest.fixture(scope="module")
def daemon():
    with daemon_inside(segment_nbytes=8 << 20) as found:
        yield found
