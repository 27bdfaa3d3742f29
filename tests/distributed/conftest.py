"""Four processes for all tests of a file's worker."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    found = Ranks()
    yield found
    found.stop()
