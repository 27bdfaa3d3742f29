"""A Llama that engines load, and transformers beside them."""

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The model, and the folder where it is saved."""
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    from support.vllm_engines import build

    folder = tmp_path_factory.mktemp("llama")
    return build("Llama", folder), folder
