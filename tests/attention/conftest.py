"""Fixtures of the tests of attention."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """For tensors so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
