import pytest


@pytest.fixture(autouse=True)
def one_thread_is_enough(one_thread):
    """Models as small as these only lose by a second."""
